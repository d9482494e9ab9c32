"""matmul: y = requant((a - za) @ (b - zb)), both operands activations, [..., M, K] x [..., K, N]."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Cost, Op, Port, register


def infer(n: NodeView) -> tuple[int, ...]:
    a, b = n.shape(0), n.shape(1)
    n.require(len(a) >= 2 and len(b) >= 2, f"operands {a} and {b} must have at least two dimensions")
    n.require(a[-1] == b[-2], f"inner dimensions of {a} and {b} differ")
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def integer(k: Any, n: NodeView, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    centered = b.astype(np.int32) - n.zero(1)
    return k.dot(n, a, centered, centered.sum(-2, keepdims=True, dtype=np.int64), None, lambda x: k.matmul(x, centered))


def cost(n: NodeView) -> Cost:
    return Cost(n.out.size * n.shape(0)[-1], 0, n.type(0).nbytes + n.type(1).nbytes, n.out.nbytes)


def onnx(g: Any, n: NodeView, a: str, b: str) -> str:
    return g("MatMul", a, b)


def torch(T: Any, n: NodeView, a: Any, b: Any) -> Any:
    return T.matmul(a, b)


def tosa(g: Any, n: NodeView, a: str, b: str) -> str:
    """MATMUL of [batch, rows, depth] and [batch, depth, columns]."""
    *batch, rows, columns = n.out.shape
    count, operands = int(np.prod(batch)), []
    for i, x in enumerate((a, b)):
        shape = (*batch, *n.shape(i)[-2:])
        x = x if n.shape(i) == shape else g.tile(x, shape)
        operands.append(g.reshape(x, (count, *shape[-2:])))
    zeros = [g.zero_point(n.type(0)), g.zero_point(n.type(1))]
    acc = g("MATMUL", [*operands, *zeros], (count, rows, columns), "INT32")
    return g.reshape(g.finish(n, acc), n.out.shape)


register(Op("matmul", (Port("a"), Port("b")), infer, integer, cost, onnx, torch, tosa, numerics="dot", doc=__doc__))
