"""transpose: dimensions permuted by ``perm``."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    n.require(sorted(n["perm"]) == list(range(len(n.shape(0)))), f"{n['perm']} does not permute {n.shape(0)}")
    return tuple(n.shape(0)[axis] for axis in n["perm"])


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(n["perm"]))


def onnx(g: Any, n: NodeView, x: str) -> str:
    return g("Transpose", x, perm=n["perm"])


def torch(T: Any, n: NodeView, x: Any) -> Any:
    return x.permute(n["perm"])


def tosa(g: Any, n: NodeView, x: str) -> str:
    return g.transpose(x, n["perm"])


register(Op("transpose", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, shared=True, doc=__doc__))
