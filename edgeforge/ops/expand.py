"""expand: size-1 dimensions repeated to ``shape``."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    fits = np.broadcast_shapes(n.shape(0), n["shape"]) == tuple(n["shape"])
    n.require(fits, f"{n.shape(0)} does not expand to {n['shape']}")
    return n["shape"]


def grown(n: NodeView, x: Any) -> tuple[int, ...]:
    """The target shape, with the leading dimension as large as the evaluated batch."""
    return (max(x.shape[0], n["shape"][0]), *n["shape"][1:]) if len(x.shape) == len(n["shape"]) else n["shape"]


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, grown(n, x))


def onnx(g: Any, n: NodeView, x: str) -> str:
    return g("Expand", x, g.ints(n["shape"]))


def torch(T: Any, n: NodeView, x: Any) -> Any:
    return x.expand(grown(n, x))


def tosa(g: Any, n: NodeView, x: str) -> str:
    return g.tile(x, n.out.shape)


register(Op("expand", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, shared=True, doc=__doc__))
