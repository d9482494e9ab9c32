"""gather: rows of a constant table [V, D] picked by integer ids (an embedding)."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import ACT, INDEX, Cost, Op, Port, register


def infer(n: NodeView) -> tuple[int, ...]:
    n.require(len(n.shape(0)) == 2, f"the table is {n.shape(0)}, expected [rows, features]")
    return (*n.shape(1), n.shape(0)[1])


def integer(k: Any, n: NodeView, table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return table[ids]


def cost(n: NodeView) -> Cost:
    return Cost(read_bytes=n.out.nbytes + n.type(1).nbytes, write_bytes=n.out.nbytes)


def onnx(g: Any, n: NodeView, table: str, ids: str) -> str:
    return g("Gather", table, ids, axis=0)


def torch(T: Any, n: NodeView, table: Any, ids: Any) -> Any:
    return T.nn.functional.embedding(ids, table)


def tosa(g: Any, n: NodeView, table: str, ids: str) -> str:
    (rows, features), count = n.shape(0), n.type(1).size
    table, ids = g.reshape(table, (1, rows, features)), g.reshape(ids, (1, count))
    return g.reshape(g.move("GATHER", table, [ids], (1, count, features)), n.out.shape)


PORTS = (Port("table", ACT, const=True), Port("ids", INDEX))
register(Op("gather", PORTS, infer, integer, cost, onnx, torch, tosa, shared=True, doc=__doc__))
