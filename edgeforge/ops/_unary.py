"""What all element-wise functions of one input share: a table over the input codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def _function(g: Any, n: NodeView, x: str) -> str:
    return g.function(n, x)


def unary(
    name: str,
    real: Callable[[NodeView, np.ndarray], np.ndarray],
    torch: Any,
    onnx: Any,
    doc: str,
    tosa: Any = _function,
) -> None:
    """Register an element-wise op. real: float64 -> float64, the exact function the table is made from."""

    def infer(n: NodeView) -> tuple[int, ...]:
        return n.shape(0)

    def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
        return k.table(n, x)

    columns = (infer, integer, move_cost, onnx, torch, tosa)
    register(Op(name, (Port("x"),), *columns, numerics="table", real=real, doc=doc))
