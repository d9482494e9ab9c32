"""Bilinear resizing: means of four codes, which lie between them. Input and output have one encoding, so that a rule is
how the weights and the mean are rounded."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.fixed import Array, Constants, Rule
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import NOTE, Profile

#: Along an axis: places below and above each of the output's, weight of the upper one (int64), sum of both weights.
Taps = tuple[Array, Array, Array, int]


def no_constants(n: NodeView) -> Constants:
    return {}


def mixed(x: Array, axis: int, taps: Taps) -> Array:
    """int64 sums along ``axis`` of two places' weighted codes."""
    below, above, weight, unit = taps
    weight = weight.reshape(-1, *[1] * (3 - axis))
    return x.take(below, axis) * (unit - weight) + x.take(above, axis) * weight


def _apply_resize(n: NodeView, x: Array, rows: Taps, columns: Taps) -> Array:
    """The exact mean, rounded half up."""
    total, unit = mixed(mixed(x.astype(np.int64), 2, rows), 3, columns), rows[3] * columns[3]
    return ((2 * total + unit) // (2 * unit)).astype(x.dtype)


# -------------------------------------------------------------------------------------------------- Hexagon, v73 to v81

#: Hexagon's weights have 15 bits; those of the rows of 8-bit codes are multiples of 1/240, so that their sums fit in
#: 16 bits.
BITS, STEPS = 15, 240
#: 1 / STEPS at 2**-20.
INVERSE = 4369


def _cut(taps: Taps, unit: int) -> Taps:
    """Weights as multiples of ``1 / unit``, ties down."""
    below, above, weight, old = taps
    return below, above, -((old - 2 * unit * weight) // (2 * old)), unit


def _apply_htp_resize8(n: NodeView, x: Array, rows: Taps, columns: Taps) -> Array:
    """Rows by multiples of 1/240, columns by multiples of 2**-15, one rounding."""
    total = mixed(mixed(x.astype(np.int64), 2, _cut(rows, STEPS)), 3, _cut(columns, 1 << BITS))
    return ((total * INVERSE + ((1 << 19) + (1 << 12) << BITS)) >> 20 + BITS).astype(x.dtype)


def _apply_htp_resize16(n: NodeView, x: Array, rows: Taps, columns: Taps) -> Array:
    """Weights at 2**-15. The sum is rounded to 2**-15, then one more is added."""
    total = mixed(mixed(x.astype(np.int64), 2, _cut(rows, 1 << BITS)), 3, _cut(columns, 1 << BITS))
    half = 1 << BITS - 1
    return (((total + half >> BITS) + half + 1) >> BITS).astype(x.dtype)


def _apply_htp_double16(n: NodeView, x: Array, rows: Taps, columns: Taps) -> Array:
    """Halves along the columns, then along the rows, both rounded half up."""
    mean = mixed(x.astype(np.int64), 3, columns) + 1 >> 1
    return (mixed(mean, 2, rows) + 1 >> 1).astype(x.dtype)


RULES = (
    Rule("resize", no_constants, _apply_resize, "bounded", NOTE),
    Rule("htp_resize8", no_constants, _apply_htp_resize8, "bounded", "99.9 % identical, 1 LSB"),
    Rule("htp_resize16", no_constants, _apply_htp_resize16, "exact"),
    Rule("htp_double16", no_constants, _apply_htp_double16, "exact"),
)
_HTP: Profile = {
    "u8": {"resize": "htp_resize8"},
    "u16": {"resize": "htp_resize16", "doubled": "htp_double16"},
}
PROFILES: dict[str, Profile] = {"htp-v73": _HTP, "htp-v68": _HTP}
