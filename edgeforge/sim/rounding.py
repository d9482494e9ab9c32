"""Rounding in one pass over a block: after a dot product (`finish`), of two operands (`pairwise`), of one (`lanewise`),
along the last axis (`rowwise`).

Rules that networks spend their time in have a compiled loop, which equals the rule's ``apply`` for every input (the
tests compare the two); any other rule is applied to the block as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import CONVOLUTIONS
from edgeforge.ir.rules import RULES
from edgeforge.ir.rules.htp_norm import QUARTERS
from edgeforge.ir.types import NUMPY
from edgeforge.sim import compiled, rows

Array = np.ndarray

#: (sums [planes, rows, columns] int32, first row, first column, (base, carry), codes [positions, channels]).
Loop = Callable[[Array, int, int, tuple[Array, Array], Array], None]


@dataclass(frozen=True)
class Finish:
    """The end of a node's dot products. Sums come per byte plane of the input codes, each less ``lowered``.

    It is kept as long as the graph, and therefore must not hold it: the node is passed in."""

    channels: int
    planes: int
    lowered: int
    loop: Loop | None

    def base(self, n: NodeView, weight_sum: Array, bias: Array | None) -> tuple[Array, Array]:
        """(base, carry) int64 [channels]: what to add to the (joined) sums, and to the low byte's before it is cut."""
        added = np.asarray(n.fixed.get("bias", 0 if bias is None else bias), np.int64)
        offset, carry = n.zero(0) * weight_sum, self.lowered * weight_sum
        if RULES[n.node.rule].bytewise:
            base = added + carry - ((offset + 128) >> 8)
        else:
            base = added + carry * (257 if self.planes == 2 else 1) - offset
        return np.broadcast_to(base, self.channels).copy(), carry

    def __call__(
        self, n: NodeView, sums: Array, row: int, column: int, base: tuple[Array, Array], codes: Array
    ) -> None:
        if self.loop is not None:
            self.loop(sums, row, column, base, codes)
            return
        total = sums[0].astype(np.int64)
        if RULES[n.node.rule].bytewise:
            total += (sums[1] + base[1]) >> 8
        elif self.planes == 2:
            total = 256 * total + sums[1]
        codes[row : row + len(total)] = _apply(n, total + base[0])


def _apply(n: NodeView, sums: Array) -> Array:
    """The rule on sums [rows, channels], which it sees with the rank and the channel axis of the node's output."""
    apply, rank = RULES[n.node.rule].apply, len(n.out.shape)
    if n.node.op in CONVOLUTIONS:
        return apply(n, sums.T[None, :, :, None])[0, :, :, 0].T
    return apply(n, sums.reshape((1,) * (rank - 2) + sums.shape)).reshape(sums.shape)


def finish(n: NodeView, channels: int, lowered: int) -> Finish:
    """The end of ``n``'s dot products with ``channels`` columns."""
    planes = NUMPY[n.type(0).dtype].itemsize
    make = _LOOPS.get(n.node.rule)
    loop = make(n, channels) if make is not None and _fits(n, planes) else None
    return Finish(channels, planes, lowered, loop)


def _fits(n: NodeView, planes: int) -> bool:
    """Whether a compiled loop covers the node: the width of input codes that its rule is made for, and its shifts."""
    shift = np.asarray(n.fixed["shift"])
    if n.node.rule == "htp_depthwise_2":
        return bool(shift.min() >= 0 and shift.max() < 63)
    if planes != (2 if RULES[n.node.rule].bytewise else 1):
        return False
    return n.node.rule in ("fp32", "ort_float_dot") or bool(np.abs(shift).max() < 63)


def _spread(constant: Any, channels: int, dtype: type) -> Array:
    return np.broadcast_to(np.asarray(constant).reshape(-1), channels).astype(dtype)


def _both_ways(n: NodeView, channels: int) -> tuple[Array, Array, Array]:
    """Shifts to the left, shifts to the right, multipliers; int64 per channel."""
    shift, mult = (_spread(n.fixed[key], channels, np.int64) for key in ("shift", "mult"))
    return np.maximum(-shift, 0), np.maximum(shift, 0), mult


def _htp8(n: NodeView, channels: int) -> Loop:
    """``((2h + 1) * mult + 2**15) >> 16``"""
    mult = _spread(n.fixed["mult"], channels, np.int64)
    return _shift_multiply(n, 2 * mult, mult + (1 << 15), n.q(-1).zero, np.zeros_like(mult))


def _htp8_v68(n: NodeView, channels: int) -> Loop:
    """``(h * mult + 2**13) >> 14``, ``offset`` in the sum"""
    mult, offset = (_spread(n.fixed[key], channels, np.int64) for key in ("mult", "offset"))
    return _shift_multiply(n, 4 * mult, np.full_like(mult, 1 << 15), 0, offset)


def _shift_multiply(n: NodeView, mult: Array, added: Array, zero: int, offset: Array) -> Loop:
    left, right, _ = _both_ways(n, len(mult))
    limits = [int(x) for x in (zero, n.fixed["low"], n.fixed["high"])]
    if n.out.dtype != "u8" or left.any() or offset.any():

        def wide(sums: Array, row: int, column: int, base: tuple[Array, Array], codes: Array) -> None:
            compiled.htp8_wide(sums[0], row, column, base[0] + offset, left, right, mult, added, *limits, codes)

        return wide
    shift, small = np.minimum(right, 31).astype(np.int32), [np.int32(x) for x in limits]
    mult, added = mult.astype(np.int32), added.astype(np.int32)

    def loop(sums: Array, row: int, column: int, base: tuple[Array, Array], codes: Array) -> None:
        compiled.htp8(sums[0], row, column, base[0].astype(np.int32), shift, mult, added, *small, codes)

    return loop


def _htp16(n: NodeView, channels: int) -> Loop:
    shifts = _both_ways(n, channels)
    limits = [int(x) for x in (n.q(-1).zero, n.fixed["low"], n.fixed["high"])]

    def loop(sums: Array, row: int, column: int, base: tuple[Array, Array], codes: Array) -> None:
        compiled.htp16(sums[0], sums[1], row, column, *base, *shifts, *limits, codes)

    return loop


def _htp_depthwise_2(n: NodeView, channels: int) -> Loop:
    shift, mult, offset, half = (
        _spread(n.fixed[key], channels, np.int64) for key in ("shift", "mult", "offset", "half")
    )
    limits = [int(n.fixed[key]) for key in ("low", "high")]

    def loop(sums: Array, row: int, column: int, base: tuple[Array, Array], codes: Array) -> None:
        compiled.multiply_shift(sums, row, column, base[0] + offset, shift, mult, half, *limits, codes)

    return loop


def _fp32(n: NodeView, channels: int) -> Loop:
    scale = np.ldexp(np.asarray(n.fixed["mult"], np.float32), -np.asarray(n.fixed["shift"]))
    scale = _spread(scale, channels, np.float32)
    zero = n.q(-1).zero
    limits = [np.float32(n.fixed[key] - zero) for key in ("low", "high")]

    def loop(sums: Array, row: int, column: int, base: tuple[Array, Array], codes: Array) -> None:
        compiled.fp32(sums[0], row, column, base[0].astype(np.int32), scale, np.int32(zero), *limits, codes)

    return loop


_LOOPS: dict[str, Callable[[NodeView, int], Loop]] = {
    "htp8": _htp8,
    "htp8_v68": _htp8_v68,
    "htp_depthwise_2": _htp_depthwise_2,
    "htp16": _htp16,
    "fp32": _fp32,
    "ort_float_dot": _fp32,
}


def pairwise(n: NodeView) -> Callable[[Array, Array, Array], None] | None:
    """A compiled loop (a, b, output codes), all one-dimensional, for a 16-bit sum or product; None if there is none."""
    make = _PAIRS.get(n.node.rule)
    return make(n) if make is not None and "mult" in n.fixed and n.fixed["shift"] >= 0 else None


def _htp_sum16(n: NodeView) -> Callable[[Array, Array, Array], None]:
    left, right = map(int, n.fixed["mult"])
    constants = [int(n.fixed[key]) for key in ("offset", "shift", "low", "high")]
    return lambda a, b, out: compiled.weighted_sum(a, b, left, right, *constants, out)


def _htp_product16(n: NodeView) -> Callable[[Array, Array, Array], None]:
    constants = [int(n.fixed[key]) for key in ("taken", "mult", "shift", "offset", "step", "coarse", "low", "high")]
    zeros = (n.zero(0), n.zero(1), n.q(-1).zero)
    return lambda a, b, out: compiled.htp_product(a, b, *zeros, *constants, out)


_PAIRS = {"htp_sum16": _htp_sum16, "htp_product16": _htp_product16}


def lanewise(n: NodeView) -> Callable[[Array, int, Array], None] | None:
    """A compiled loop (codes, place of the first in its tensor, output codes), one-dimensional, for a 16-bit function
    whose rounding alternates from one code of the tensor to the next; None if there is none."""
    if n.type(0).dtype != "u16":
        return None
    mult = int(n.fixed["mult"]) if "mult" in n.fixed else 0
    if n.node.rule in ("htp_affine16", "htp_clip16"):
        constants = (0, mult, int(n.fixed["lane"]), 0, 0, int(n.fixed["offset"]), 18)
    elif n.node.rule == "htp_requantize16" and n.out.dtype == "u16":
        constants = (32768, mult, 1 << 14, 0, 15, int(n.fixed["offset"]) + 4, 3)
    elif n.node.rule == "htp_requantize16":
        shift, offset, step = (int(n.fixed[key]) for key in ("shift", "offset", "step"))
        constants = (32767, mult, 1 << shift - 1, 1 << shift - 1, shift, offset, step)
    else:
        return None
    limits = (int(n.fixed["low"]), int(n.fixed["high"]))
    return lambda codes, first, out: compiled.affine(codes, first, *constants, *limits, out)


def rowwise(n: NodeView) -> Callable[[Array, Array], None] | None:
    """A compiled loop (codes, output codes) on rows [R, C], for a rule along the last axis; None if there is none."""
    make = _ROWS.get(n.node.rule)
    return None if make is None else make(n)


def _htp_rms_norm(n: NodeView) -> Callable[[Array, Array], None]:
    gain, eps = (np.asarray(n.fixed[key], np.int32).view(np.float32) for key in ("gain", "eps"))
    loop = rows.rms_norm8 if n.node.rule == "htp_rms_norm8" else rows.rms_norm16
    limits = [int(x) for x in (n.q(-1).zero, n.fixed["low"], n.fixed["high"])]
    return lambda codes, out: loop(codes, n.zero(0), gain, eps[()], *limits, out)


def _htp_softmax16(n: NodeView) -> Callable[[Array, Array], None]:
    constants = [int(n.fixed[key]) for key in ("step", "low", "high")]
    return lambda codes, out: rows.softmax16(codes, QUARTERS, *constants, np.empty(codes.shape[1], np.int64), out)


_ROWS = {"htp_rms_norm8": _htp_rms_norm, "htp_rms_norm16": _htp_rms_norm, "htp_softmax16": _htp_softmax16}
