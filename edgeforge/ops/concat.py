"""concat: inputs joined along ``axis``; all share one encoding."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    axis, first = n["axis"], n.shape(0)
    for i in range(1, n.arity):
        same = len(n.shape(i)) == len(first) and all(
            a == b for d, (a, b) in enumerate(zip(n.shape(i), first, strict=True)) if d != axis
        )
        n.require(same, f"input {i} is {n.shape(i)}, input 0 is {first}: they differ outside axis {axis}")
    return (*first[:axis], sum(n.shape(i)[axis] for i in range(n.arity)), *first[axis + 1 :])


def matched(xs: tuple[Any, ...]) -> int:
    return max(x.shape[0] for x in xs)


def integer(k: Any, n: NodeView, *xs: np.ndarray) -> np.ndarray:
    batch = matched(xs)
    return np.concatenate([np.broadcast_to(x, (batch, *x.shape[1:])) if n["axis"] else x for x in xs], n["axis"])


def onnx(g: Any, n: NodeView, *xs: str) -> str:
    return g("Concat", *xs, axis=n["axis"])


def torch(T: Any, n: NodeView, *xs: Any) -> Any:
    batch = matched(xs)
    return T.cat([x.expand(batch, *x.shape[1:]) if n["axis"] and x.shape[0] != batch else x for x in xs], n["axis"])


def tosa(g: Any, n: NodeView, *xs: str) -> str:
    return g.move("CONCAT", xs[0], xs[1:], n.out.shape, axis=n["axis"])


register(
    Op(
        "concat",
        (Port("x", variadic=True),),
        infer,
        integer,
        move_cost,
        onnx,
        torch,
        tosa=tosa,
        shared=True,
        doc=__doc__,
    )
)
