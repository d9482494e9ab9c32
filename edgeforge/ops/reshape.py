"""reshape: the same elements in another shape; the leading (batch) dimension may grow when evaluating."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    size = int(np.prod(n["shape"], dtype=np.int64))
    n.require(size == n.type(0).size, f"{n.shape(0)} does not reshape to {n['shape']}")
    return n["shape"]


def batched(n: NodeView, x: Any) -> tuple[int, ...]:
    """The target shape, with the leading dimension scaled as the evaluated batch is."""
    grown = x.shape[0] // n.shape(0)[0] if n.shape(0) and n["shape"] else 1
    return (n["shape"][0] * grown, *n["shape"][1:]) if grown > 1 else n["shape"]


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    return x.reshape(batched(n, x))


def onnx(g: Any, n: NodeView, x: str) -> str:
    return g("Reshape", x, g.ints(n["shape"]))


def torch(T: Any, n: NodeView, x: Any) -> Any:
    return x.reshape(batched(n, x))


def tosa(g: Any, n: NodeView, x: str) -> str:
    return g.reshape(x, n.out.shape)


register(Op("reshape", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, shared=True, doc=__doc__))
