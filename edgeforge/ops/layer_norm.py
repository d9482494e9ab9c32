"""layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b over the last axis."""

from __future__ import annotations

from typing import Any

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import ACT, BIAS, Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    n.require(n.shape(1) == n.shape(0)[-1:] == n.shape(2), f"gain {n.shape(1)} or bias does not fit {n.shape(0)}")
    return n.shape(0)


def integer(k: Any, n: NodeView, x: Any, w: Any, b: Any) -> Any:
    return k.apply(n, x, w, b)


def onnx(g: Any, n: NodeView, x: str, w: str, b: str) -> str:
    return g("LayerNormalization", x, w, b, axis=-1, epsilon=n["eps"])


def torch(T: Any, n: NodeView, x: Any, w: Any, b: Any) -> Any:
    return T.nn.functional.layer_norm(x, w.shape, w, b, n["eps"])


PORTS = (Port("x"), Port("w", ACT, const=True), Port("b", BIAS, const=True))
register(Op("layer_norm", PORTS, infer, integer, move_cost, onnx, torch, numerics="norm", doc=__doc__))
