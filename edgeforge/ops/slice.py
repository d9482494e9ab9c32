"""slice: elements ``start:end:step`` along ``axis``."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    axis, shape = n["axis"], n.shape(0)
    length = len(range(shape[axis])[n["start"] : n["end"] : n["step"]])
    n.require(length > 0, f"slice {n['start']}:{n['end']}:{n['step']} of {shape} along axis {axis} is empty")
    return (*shape[:axis], length, *shape[axis + 1 :])


def window(n: NodeView) -> tuple[slice, ...]:
    return (*[slice(None)] * n["axis"], slice(n["start"], n["end"], n["step"]))


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    return x[window(n)]


def onnx(g: Any, n: NodeView, x: str) -> str:
    return g("Slice", x, g.ints([n["start"]]), g.ints([n["end"]]), g.ints([n["axis"]]), g.ints([n["step"]]))


def torch(T: Any, n: NodeView, x: Any) -> Any:
    return x[window(n)]


def tosa(g: Any, n: NodeView, x: str) -> str:
    """SLICE; of every ``step``-th element, the first of each [count, step] after padding to full steps."""
    axis, step, shape, count = n["axis"], n["step"], n.shape(0), n.out.shape[n["axis"]]
    start = range(shape[axis])[n["start"] : n["end"] : step].start
    before, after = shape[:axis], shape[axis + 1 :]
    x = g.slice(x, [start if i == axis else 0 for i in range(len(shape))], [*before, (count - 1) * step + 1, *after])
    if step == 1:
        return x
    x = g.pad(x, [step - 1 if i == 2 * axis + 1 else 0 for i in range(2 * len(shape))], n.out)
    x = g.reshape(x, [*before, count, step, *after])
    return g.reshape(g.slice(x, [0] * (len(shape) + 1), [*before, count, 1, *after]), n.out.shape)


register(Op("slice", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, shared=True, doc=__doc__))
