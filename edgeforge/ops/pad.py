"""pad: zeros (real 0) around the last two dimensions of NCHW, ``pads`` = (top, left, bottom, right)."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    top, left, bottom, right = n["pads"]
    n.require(len(n.shape(0)) == 4 and min(n["pads"]) >= 0, f"pads {n['pads']} of {n.shape(0)}")
    batch, channels, height, width = n.shape(0)
    return (batch, channels, height + top + bottom, width + left + right)


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    top, left, bottom, right = n["pads"]
    return k.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), n.zero(0))


def onnx(g: Any, n: NodeView, x: str) -> str:
    top, left, bottom, right = n["pads"]
    return g("Pad", x, g.ints([0, 0, top, left, 0, 0, bottom, right]))


def torch(T: Any, n: NodeView, x: Any) -> Any:
    top, left, bottom, right = n["pads"]
    return T.nn.functional.pad(x, (left, right, top, bottom))


def tosa(g: Any, n: NodeView, x: str) -> str:
    top, left, bottom, right = n["pads"]
    return g.pad(x, [0, 0, 0, 0, top, bottom, left, right], n.out)


register(Op("pad", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, shared=True, doc=__doc__))
