"""rms_norm: y = x / sqrt(mean(x^2) + eps) * w over the last axis."""

from __future__ import annotations

from typing import Any

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import ACT, Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    n.require(n.shape(1) == n.shape(0)[-1:], f"gain {n.shape(1)} does not fit {n.shape(0)}")
    return n.shape(0)


def integer(k: Any, n: NodeView, x: Any, w: Any) -> Any:
    return k.apply(n, x, w)


def onnx(g: Any, n: NodeView, x: str, w: str) -> str:
    return g("RMSNormalization", x, w, axis=-1, epsilon=n["eps"])


def torch(T: Any, n: NodeView, x: Any, w: Any) -> Any:
    return T.nn.functional.rms_norm(x, w.shape, w, n["eps"])


PORTS = (Port("x"), Port("w", ACT, const=True))
register(Op("rms_norm", PORTS, infer, integer, move_cost, onnx, torch, numerics="norm", doc=__doc__))
