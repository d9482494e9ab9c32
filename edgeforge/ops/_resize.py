"""Where a resized image looks into its input: what both resize operations share."""

from __future__ import annotations

import math

import numpy as np

from edgeforge.ir.graph import NodeView

#: (step, start, unit): place o of the output is place ``(step * o + start) / unit`` of the input.
Place = tuple[int, int, int]


def place(coordinates: str, old: int, new: int) -> Place:
    """Along an axis of ``old`` elements that gets ``new``, with the coordinates that ONNX and torch define."""
    if coordinates == "half_pixel":
        terms = (2 * old, old - new, 2 * new)
    elif coordinates == "asymmetric":
        terms = (old, 0, new)
    else:
        terms = (old - 1, 0, new - 1) if new > 1 else (0, 0, 1)
    common = math.gcd(*terms)
    return terms[0] // common, terms[1] // common, terms[2] // common


def floors(at: Place, old: int, new: int) -> np.ndarray:
    """int64 [new]: whole places; both ends of the input are taken for what lies beyond."""
    step, start, unit = at
    return np.clip((step * np.arange(new) + start) // unit, 0, old - 1)


def infer(n: NodeView, known: tuple[str, ...]) -> tuple[int, ...]:
    n.require(len(n.shape(0)) == 4, f"resizes {n.shape(0)}, expected [N, C, H, W]")
    n.require(n["coordinates"] in known, f"coordinates {n['coordinates']!r}, expected one of {', '.join(known)}")
    n.require(len(n["size"]) == 2 and min(n["size"]) > 0, f"size {n['size']}, expected a height and a width")
    return (*n.shape(0)[:2], *n["size"])
