"""linear: y = requant((x - zx) @ w.T + b), weights [O, I] per output channel, x [..., I].

Attribute ``dynamic`` (float graphs): y = round8(x) @ w.T + b, x rounded to int8 with a range for each row."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.fixed import expand_blocks
from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import ACT, BIAS, WEIGHT, Cost, Op, Port, register


def infer(n: NodeView) -> tuple[int, ...]:
    depth, (out, inner) = n.shape(0)[-1], n.shape(1)
    n.require(depth == inner, f"input has {depth} features, weights take {inner}")
    return (*n.shape(0)[:-1], out)


def integer(k: Any, n: NodeView, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    w = expand_blocks(n.q(1), w)
    return k.dot(n, x, w, w.sum(1, dtype=np.int64), b, lambda part: k.matmul(part, w.T))


def cost(n: NodeView) -> Cost:
    weights = sum(n.type(i).nbytes for i in range(1, n.arity))
    return Cost(n.out.size * n.shape(1)[1], weights, n.type(0).nbytes, n.out.nbytes)


def onnx(g: Any, n: NodeView, x: str, w: str, b: str | None = None) -> str:
    return g.clamp(n, g.linear(n, x, w, b))


def torch(T: Any, n: NodeView, x: Any, w: Any, b: Any = None) -> Any:
    y = T.nn.functional.linear(round8(T, x) if "dynamic" in n.attrs else x, w, b)
    return y.clamp(*n["clamp"]) if "clamp" in n.attrs else y


def round8(T: Any, x: Any) -> Any:
    """Each row as int8 codes stand for it: ``scale = (max(x, 0) - min(x, 0)) / 255``, the zero point by the end that
    it misses less (choose_qparams_per_token_asymmetric of torch's quantized_decomposed)."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=T.finfo(T.float32).eps)
    bottom, top = low / scale, high / scale
    zero = T.where(bottom + top - 1 > 0, -128 - bottom, 127 - top).clamp(-128, 127).round()
    return ((x / scale).round().add(zero).clamp(-128, 127) - zero) * scale


def tosa(g: Any, n: NodeView, x: str, *names: str) -> str:
    """CONV2D of images of one pixel. Block-wise codes, times their block's integer scale, fit int8."""
    codes, (out, depth) = n.data(1), n.shape(1)
    assert codes is not None
    dtype = "INT4" if n.type(1).dtype == "i4" and n.q(1).block is None else "INT8"
    weights = expand_blocks(n.q(1), codes).reshape(out, 1, 1, depth)
    x = g.reshape(x, (n.type(0).size // depth, 1, 1, depth))
    return g.reshape(g.finish(n, g.convolution(n, x, weights, g.bias(n), dtype)), n.out.shape)


PORTS = (Port("x", ACT), Port("w", WEIGHT, const=True), Port("b", BIAS, const=True, optional=True))
register(Op("linear", PORTS, infer, integer, cost, onnx, torch, tosa, numerics="dot", doc=__doc__))
