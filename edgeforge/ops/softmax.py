"""softmax: y = exp(x - max) / sum(exp(x - max)) along ``axis``."""

from __future__ import annotations

from typing import Any

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    n.require(0 <= n["axis"] < len(n.shape(0)), f"axis {n['axis']} of {n.shape(0)}")
    return n.shape(0)


def integer(k: Any, n: NodeView, x: Any) -> Any:
    return k.apply(n, x)


def onnx(g: Any, n: NodeView, x: str) -> str:
    return g("Softmax", x, axis=n["axis"])


def torch(T: Any, n: NodeView, x: Any) -> Any:
    return T.softmax(x, n["axis"])


register(Op("softmax", (Port("x"),), infer, integer, move_cost, onnx, torch, numerics="softmax", doc=__doc__))
