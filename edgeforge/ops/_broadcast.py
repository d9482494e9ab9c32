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


def binary(name: str, torch: Callable[..., Any], onnx_type: str, tosa: Callable[..., Any], doc: str) -> None:
    """Register an element-wise op of two activations; its rounding rule is the family of the same name."""

    def integer(k: Any, n: NodeView, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return k.apply(n, a, b)

    def onnx(g: Any, n: NodeView, a: str, b: str) -> str:
        return g.clamp(n, g(onnx_type, a, b))

    def clamped(T: Any, n: NodeView, a: Any, b: Any) -> Any:
        y = torch(T, n, a, b)
        return y.clamp(*n["clamp"]) if "clamp" in n.attrs else y

    ports = (Port("a"), Port("b"))
    register(Op(name, ports, infer, integer, move_cost, onnx, clamped, tosa, numerics=name, doc=doc))


def tosa_sum(op: str) -> Callable[..., Any]:
    """ADD or SUB of operands that a RESCALE each brought to one scale, and the RESCALE of their sum."""

    def tosa(g: Any, n: NodeView, *names: str) -> str:
        g.narrow(n.type(0), n.type(1), n.out)
        parts = []
        for i, x in enumerate(names):
            mult, shift = n.fixed["operand_mult"][i], n.fixed["operand_shift"][i]
            parts.append(g.rescale(g.of_rank(x, len(n.out.shape)), mult, shift, n.type(i), None))
        return g.finish(n, g(op, parts, n.out.shape, "INT32"))

    return tosa
