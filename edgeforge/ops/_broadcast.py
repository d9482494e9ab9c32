"""What all element-wise functions of two inputs share: NumPy broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(n.shape(0), n.shape(1))
    except ValueError:
        n.require(False, f"shapes {n.shape(0)} and {n.shape(1)} do not broadcast")
        raise


def binary(name: str, torch: Callable[..., Any], onnx_type: str, doc: str) -> None:
    """Register an element-wise op of two activations; its rounding rule is the family of the same name."""

    def integer(k: Any, n: NodeView, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return k.apply(n, a, b)

    def onnx(g: Any, n: NodeView, a: str, b: str) -> str:
        return g.clamp(n, g(onnx_type, a, b))

    def clamped(T: Any, n: NodeView, a: Any, b: Any) -> Any:
        y = torch(T, n, a, b)
        return y.clamp(*n["clamp"]) if "clamp" in n.attrs else y

    ports = (Port("a"), Port("b"))
    register(Op(name, ports, infer, integer, move_cost, onnx, clamped, numerics=name, doc=doc))
