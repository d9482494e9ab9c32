"""resize_bilinear: [N, C, H, W] to ``size`` = (height, width), between the four nearest places by their distance.

``coordinates``: half_pixel, align_corners or asymmetric, as ONNX names them. A mean of codes, rounded: the weights'
sum is 1, so that zero points drop out."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Cost, Op, Port, move_cost, register
from edgeforge.ops import _resize

COORDINATES = ("half_pixel", "align_corners", "asymmetric")


def infer(n: NodeView) -> tuple[int, ...]:
    return _resize.infer(n, COORDINATES)


def _taps(n: NodeView, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Along ``axis`` (2 or 3): places below and above each of the output's, the weight of the upper one (int64
    [size]), and the sum of both weights."""
    old, new = n.shape(0)[axis], n["size"][axis - 2]
    step, start, unit = _resize.place(n["coordinates"], old, new)
    at = np.clip(step * np.arange(new) + start, 0, (old - 1) * unit)
    return at // unit, np.minimum(at // unit + 1, old - 1), at % unit, unit


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    return k.apply(n, x, _taps(n, 2), _taps(n, 3))


def cost(n: NodeView) -> Cost:
    moved = move_cost(n)
    return Cost(4 * n.out.size, 0, moved.read_bytes, moved.write_bytes)


def onnx(g: Any, n: NodeView, x: str) -> str:
    how = {"coordinate_transformation_mode": n["coordinates"]}
    return g("Resize", x, "", "", g.ints(n.out.shape), mode="linear", **how)


def torch(T: Any, n: NodeView, x: Any) -> Any:
    if n["coordinates"] != "asymmetric":
        aligned = n["coordinates"] == "align_corners"
        return T.nn.functional.interpolate(x, tuple(n["size"]), mode="bilinear", align_corners=aligned)
    for axis in (2, 3):
        below, above, weight, unit = _taps(n, axis)
        share = T.from_numpy(weight / unit).to(x).reshape(-1, *[1] * (3 - axis))
        x = x.index_select(axis, T.from_numpy(below)) * (1 - share) + x.index_select(axis, T.from_numpy(above)) * share
    return x


def tosa(g: Any, n: NodeView, x: str) -> str:
    """RESIZE to int32 sums of products of codes and whole weights, RESCALE."""
    g.narrow(n.out)
    places = [_resize.place(n["coordinates"], *sizes) for sizes in zip(n.shape(0)[2:], n["size"], strict=True)]
    return g.nchw(g.resize(g.nhwc(x), places, n["size"], "BILINEAR", n.out))


PORTS = (Port("x"),)
register(
    Op("resize_bilinear", PORTS, infer, integer, cost, onnx, torch, tosa, numerics="resize", shared=True, doc=__doc__)
)
