"""resize_nearest: [N, C, H, W] to ``size`` = (height, width), each element taken from one place of the input.

``coordinates``: "asymmetric", rounded down (torch's nearest), or "half_pixel", rounded half up (its nearest-exact)."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register
from edgeforge.ops import _resize

ROUNDING = {"asymmetric": "floor", "half_pixel": "round_prefer_ceil"}
MODES = {"asymmetric": "nearest", "half_pixel": "nearest-exact"}


def infer(n: NodeView) -> tuple[int, ...]:
    return _resize.infer(n, tuple(ROUNDING))


def place(coordinates: str, old: int, new: int) -> _resize.Place:
    """Its floor is the place in the input."""
    step, start, unit = _resize.place(coordinates, old, new)
    return 2 * step, 2 * start + (unit if coordinates == "half_pixel" else 0), 2 * unit


def _axes(n: NodeView) -> list[tuple[_resize.Place, int, int]]:
    return [(place(n["coordinates"], old, new), old, new) for old, new in zip(n.shape(0)[2:], n["size"], strict=True)]


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    rows, columns = (_resize.floors(*axis) for axis in _axes(n))
    return x[:, :, rows[:, None], columns]


def onnx(g: Any, n: NodeView, x: str) -> str:
    how = {"coordinate_transformation_mode": n["coordinates"], "nearest_mode": ROUNDING[n["coordinates"]]}
    return g("Resize", x, "", "", g.ints(n.out.shape), mode="nearest", **how)


def torch(T: Any, n: NodeView, x: Any) -> Any:
    """By places at other ratios: torch's float32 coordinates can fall below a whole one."""
    if all(new % old == 0 for old, new in zip(n.shape(0)[2:], n["size"], strict=True)):
        return T.nn.functional.interpolate(x, tuple(n["size"]), mode=MODES[n["coordinates"]])
    rows, columns = (T.from_numpy(_resize.floors(*axis)) for axis in _axes(n))
    return x.index_select(2, rows).index_select(3, columns)


def tosa(g: Any, n: NodeView, x: str) -> str:
    """RESIZE takes the nearest place, half up: half a place less makes that the place below."""
    places = [(2 * step, 2 * start - unit, 2 * unit) for (step, start, unit), *_ in _axes(n)]
    return g.nchw(g.resize(g.nhwc(x), places, n["size"], "NEAREST"))


register(Op("resize_nearest", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, shared=True, doc=__doc__))
