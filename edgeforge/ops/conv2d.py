"""conv2d: y = requant(sum((x - zx) * w) + b), weights [O, I/groups, KH, KW] per output channel, NCHW."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import ACT, BIAS, WEIGHT, Cost, Op, Port, register


def infer(n: NodeView) -> tuple[int, ...]:
    (batch, channels, height, width), (out, depth, kh, kw) = n.shape(0), n.shape(1)
    groups, (sh, sw), (dh, dw) = n["groups"], n["stride"], n["dilation"]
    top, left, bottom, right = n["pads"]
    n.require(channels == depth * groups, f"{channels} input channels, weights take {depth} x {groups} groups")
    n.require(out % groups == 0, f"{out} output channels do not divide into {groups} groups")
    y = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1
    x = (width + left + right - dw * (kw - 1) - 1) // sw + 1
    n.require(y > 0 and x > 0, f"kernel {kh}x{kw} exceeds the padded input {n.shape(0)}")
    return (batch, out, y, x)


def integer(k: Any, n: NodeView, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    top, left, bottom, right = n["pads"]
    x = k.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), n.zero(0))
    weight_sum = w.reshape(len(w), -1).sum(1, dtype=np.int64)
    return k.dot(n, x, w, weight_sum, b, lambda part: k.conv2d(part, w, n["stride"], n["dilation"], n["groups"]))


def cost(n: NodeView) -> Cost:
    macs = n.out.size * int(np.prod(n.shape(1)[1:]))
    weights = sum(n.type(i).nbytes for i in range(1, n.arity))
    return Cost(macs, weights, n.type(0).nbytes, n.out.nbytes)


def onnx(g: Any, n: NodeView, *names: str) -> str:
    attributes = {"strides": n["stride"], "pads": n["pads"], "dilations": n["dilation"], "group": n["groups"]}
    return g.clamp(n, g("Conv", *names, **attributes))


def torch(T: Any, n: NodeView, x: Any, w: Any, b: Any = None) -> Any:
    top, left, bottom, right = n["pads"]
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = T.nn.functional.pad(x, (left, right, top, bottom)), (0, 0)
    y = T.nn.functional.conv2d(x, w, b, n["stride"], padding, n["dilation"], n["groups"])
    return y.clamp(*n["clamp"]) if "clamp" in n.attrs else y


def tosa(g: Any, n: NodeView, x: str, *names: str) -> str:
    """CONV2D, DEPTHWISE_CONV2D, or a CONV2D per group."""
    weights, bias, groups, dtype = n.data(1), g.bias(n), n["groups"], n.type(1).dtype.replace("i", "INT")
    assert weights is not None
    depth, sides = weights.shape[1], weights.shape[2:]
    reach = [(side - 1) * step + 1 for side, step in zip(sides, n["dilation"], strict=True)]
    x, pads = g.fitted(g.nhwc(x), reach, n["stride"], n["pads"])
    if groups > 1 and depth == 1:
        taps = weights.reshape(groups, -1, *sides).transpose(2, 3, 0, 1)
        return g.nchw(g.finish(n, g.convolution(n, x, taps, bias, dtype, pads, "DEPTHWISE_CONV2D")))
    weights = weights.transpose(0, 2, 3, 1)
    if groups == 1:
        return g.nchw(g.finish(n, g.convolution(n, x, weights, bias, dtype, pads)))
    size = [*g.shape(x)[:3], depth]
    sums = [
        g.convolution(n, g.slice(x, [0, 0, 0, i * depth], size), part, added, dtype, pads)
        for i, (part, added) in enumerate(zip(np.split(weights, groups), np.split(bias, groups), strict=True))
    ]
    joined = g.move("CONCAT", sums[0], sums[1:], [*g.shape(sums[0])[:3], len(bias)], axis=3)
    return g.nchw(g.finish(n, joined))


PORTS = (Port("x", ACT), Port("w", WEIGHT, const=True), Port("b", BIAS, const=True, optional=True))
register(Op("conv2d", PORTS, infer, integer, cost, onnx, torch, tosa, numerics="dot", doc=__doc__))
