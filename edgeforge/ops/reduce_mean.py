"""reduce_mean: mean over ``axes`` (kept as size 1 with ``keepdims``); requantized."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    n.require(all(0 <= axis < len(n.shape(0)) for axis in n["axes"]), f"axes {n['axes']} of {n.shape(0)}")
    kept = [1 if axis in n["axes"] else size for axis, size in enumerate(n.shape(0))]
    return tuple(kept) if n["keepdims"] else tuple(s for axis, s in enumerate(kept) if axis not in n["axes"])


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    total = x.sum(n["axes"], keepdims=n["keepdims"], dtype=np.int64)
    count = n.type(0).size // n.out.size
    return k.apply(n, total - count * n.zero(0))


def onnx(g: Any, n: NodeView, x: str) -> str:
    if n["axes"] == (2, 3) and n["keepdims"]:
        return g("GlobalAveragePool", x)
    return g("ReduceMean", x, g.ints(n["axes"]), keepdims=int(n["keepdims"]))


def torch(T: Any, n: NodeView, x: Any) -> Any:
    return x.mean(n["axes"], keepdim=n["keepdims"])


def tosa(g: Any, n: NodeView, x: str) -> str:
    """int32 sums over one axis after the other, RESCALE."""
    total = g.centered(x, n.type(0))
    for axis in n["axes"]:
        shape = [1 if i == axis else size for i, size in enumerate(g.shape(total))]
        total = g("REDUCE_SUM", [total], shape, "INT32", axis=int(axis))
    return g.reshape(g.finish(n, total), n.out.shape)


register(Op("reduce_mean", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, numerics="mean", doc=__doc__))
