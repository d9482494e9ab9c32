"""TOSA: 31-bit multipliers, a shift, one rounding (RESCALE with SINGLE_ROUND; TOSA 1.0 specification, "Numeric
Conversion Helpers"). The dialect writes these constants into the artifact as they stand in the node.

TOSA leaves the choice of multipliers, and how add, sub, mul and means are put together from RESCALEs, to compilers. The
choice here is that of TensorFlow Lite's converter, rounded once."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.fixed import Array, Constants, Rule, along_channel, ratios, saturate, with_range
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import EXACT_VALUE, Profile, apply_table, derive_table
from edgeforge.ir.rules.resize import Taps, mixed, no_constants

#: Both operands of a sum are brought to 2**-20 of twice the larger scale.
SUM_BITS = 20
#: The largest shift of RESCALE; smaller ratios lose bits of their multiplier.
MOST_SHIFT = 62


def apply_scale_32(value: Array, mult: Array | int, shift: Array | int) -> Array:
    """``(value * mult + 2**(shift - 1)) >> shift``"""
    value, shift = np.asarray(value, np.int64), np.asarray(shift, np.int64)
    return (value * mult + (np.int64(1) << (shift - 1))) >> shift


def scale_32(ratio: Array | float) -> tuple[Array, Array]:
    """Multipliers (31 bits) and shifts, int64, with ``mult * 2**-shift`` nearest to ``ratio``."""
    fraction, exponent = np.frexp(np.asarray(ratio, np.float64))
    mult, shift = np.rint(np.ldexp(fraction, 31)).astype(np.int64), 31 - exponent.astype(np.int64)
    carried = mult == 1 << 31
    mult, shift = np.where(carried, 1 << 30, mult), np.where(carried, shift - 1, shift)
    return mult >> np.maximum(shift - MOST_SHIFT, 0), np.minimum(shift, MOST_SHIFT)


def reciprocal_scale(count: int) -> tuple[int, int]:
    """The specification's multiplier and shift for ``1 / count``, by which AVG_POOL2D divides."""
    bits = (count - 1).bit_length()
    return (((1 << 30) + 1) << bits) // count, 30 + bits


def _scale(n: NodeView, index: int) -> np.float64:
    return np.float64(n.q(index).scale)


def _rescaled(n: NodeView, ratio: Array | float) -> Constants:
    mult, shift = scale_32(ratio)
    return with_range(n, mult=mult, shift=shift) if mult.ndim else with_range(n, mult=int(mult), shift=int(shift))


def _derive_dot(n: NodeView) -> Constants:
    return _rescaled(n, ratios(n))


def _apply_dot(n: NodeView, acc: Array) -> Array:
    return saturate(n, apply_scale_32(acc, along_channel(n, n.fixed["mult"]), along_channel(n, n.fixed["shift"])))


def _derive_sum(n: NodeView) -> Constants:
    """``operand_mult``, ``operand_shift``: of both operands; ``mult``, ``shift``: of the sum."""
    unit = 2 * max(_scale(n, 0), _scale(n, 1)) / 2.0**SUM_BITS
    mult, shift = scale_32(np.array([_scale(n, 0), _scale(n, 1)]) / unit)
    return {**_rescaled(n, unit / _scale(n, -1)), "operand_mult": mult, "operand_shift": shift}


def _apply_sum(n: NodeView, a: Array, b: Array) -> Array:
    x, y = (
        apply_scale_32(codes.astype(np.int64) - n.zero(i), n.fixed["operand_mult"][i], n.fixed["operand_shift"][i])
        for i, codes in enumerate((a, b))
    )
    return _apply_scaled(n, x + y if n.node.op == "add" else x - y)


def _derive_mul(n: NodeView) -> Constants:
    return _rescaled(n, _scale(n, 0) * _scale(n, 1) / _scale(n, -1))


def _apply_mul(n: NodeView, a: Array, b: Array) -> Array:
    return _apply_scaled(n, (a.astype(np.int64) - n.zero(0)) * (b.astype(np.int64) - n.zero(1)))


def _apply_scaled(n: NodeView, value: Array) -> Array:
    return saturate(n, apply_scale_32(value, n.fixed["mult"], n.fixed["shift"]))


def _derive_requantize(n: NodeView) -> Constants:
    return _rescaled(n, _scale(n, 0) / _scale(n, -1))


def _apply_requantize(n: NodeView, x: Array) -> Array:
    return _apply_scaled(n, x.astype(np.int64) - n.zero(0))


def _derive_mean(n: NodeView) -> Constants:
    count = n.type(0).size // n.out.size
    return _rescaled(n, _scale(n, 0) / (_scale(n, -1) * count))


def _apply_average(n: NodeView, total: Array) -> Array:
    """AVG_POOL2D rounds the mean to a code of the input's encoding; RESCALE brings it to the output's."""
    return _apply_scaled(n, apply_scale_32(total, *reciprocal_scale(int(np.prod(n["kernel"])))))


def _apply_resize(n: NodeView, x: Array, rows: Taps, columns: Taps) -> Array:
    """RESIZE's sum of signed codes, then RESCALE."""
    total = mixed(mixed(x.astype(np.int64) - 128, 2, rows), 3, columns)
    return (apply_scale_32(total, *scale_32(1 / (rows[3] * columns[3]))) + 128).astype(x.dtype)


RULES = (
    Rule("tosa_dot", _derive_dot, _apply_dot, "exact"),
    Rule("tosa_sum", _derive_sum, _apply_sum, "exact"),
    Rule("tosa_mul", _derive_mul, _apply_mul, "exact"),
    Rule("tosa_requantize", _derive_requantize, _apply_requantize, "exact"),
    Rule("tosa_mean", _derive_mean, _apply_scaled, "exact"),
    Rule("tosa_average", _derive_requantize, _apply_average, "exact"),
    Rule("tosa_resize", no_constants, _apply_resize, "exact"),
    Rule("tosa_table", derive_table, apply_table, "exact"),
    Rule("tosa_dot16", _derive_dot, _apply_dot, "unverified", "16-bit codes of TOSA have no zero point"),
)
_TOSA8 = {
    "dot": "tosa_dot",
    "add": "tosa_sum",
    "sub": "tosa_sum",
    "mul": "tosa_mul",
    "mean": "tosa_mean",
    "avg_pool": "tosa_average",
    "resize": "tosa_resize",
    "table": "tosa_table",
    "requantize": "tosa_requantize",
}
PROFILES: dict[str, Profile] = {
    "tosa": {"u8": {**EXACT_VALUE, **_TOSA8}, "u16": {**EXACT_VALUE, "dot": "tosa_dot16"}},
}
