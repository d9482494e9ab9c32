"""Compiled forms of the rules that end a dot product: exact sums (as floats) in, codes out, in one pass.

Each equals the rule's ``apply`` in `ir.fixed` for every sum; the tests compare the two. Sums are [positions, channels]
with per-channel constants; 32-bit arithmetic where a saturating clip before the multiplication allows it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit, prange

from edgeforge.ir.graph import NodeView

Array = np.ndarray
Finish = Callable[[NodeView, list[Array], Array, Array], None]


def fits(n: NodeView) -> bool:
    """Whether the shifts go to the right (left shifts are rare and left to the reference)."""
    return (
        "shift" in n.fixed and bool(np.min(n.fixed["shift"]) >= 0 and np.max(n.fixed["shift"]) < 63)
    ) or n.node.rule == "fp32"


def _spread(constant: Array, like: Array, dtype: type) -> Array:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(constant).reshape(-1), like.shape), dtype)


@njit(parallel=True, cache=True)
def _htp8(sums, base, shift, mult, zero, low, high, codes):  # type: ignore[no-untyped-def]
    for row in prange(sums.shape[0]):
        for c in range(sums.shape[1]):
            h = (np.int32(sums[row, c]) + base[c]) >> shift[c]
            h = min(max(h, np.int32(-8192)), np.int32(8191))
            code = (((2 * h + 1) * mult[c] + np.int32(32768)) >> 16) + zero
            codes[row, c] = min(max(code, low), high)


def htp8(n: NodeView, sums: list[Array], base: Array, codes: Array) -> None:
    """|h| >= 8192 saturates 8-bit codes whatever the multiplier, which lies in 2**14..2**15."""
    constants = [_spread(n.fixed[key], base, np.int32) for key in ("shift", "mult")]
    limits = [np.int32(x) for x in (n.q(-1).zero, n.fixed["low"], n.fixed["high"])]
    _htp8(sums[0], base.astype(np.int32), *constants, *limits, codes)


@njit(parallel=True, cache=True)
def _multiply_shift(sums, base, shift, mult, zero, low, high, codes):  # type: ignore[no-untyped-def]
    for row in prange(sums.shape[0]):
        for c in range(sums.shape[1]):
            half = (np.int64(1) << shift[c]) >> 1
            code = (((np.int64(sums[row, c]) + base[c]) * mult[c] + half) >> shift[c]) - zero
            codes[row, c] = min(max(code + zero, low), high)


@njit(parallel=True, cache=True)
def _htp16(high_sums, low_sums, base, shift, mult, zero, low, high, codes):  # type: ignore[no-untyped-def]
    for row in prange(high_sums.shape[0]):
        for c in range(high_sums.shape[1]):
            total = np.int64(high_sums[row, c]) + (np.int64(low_sums[row, c]) >> 8) + base[c]
            code = (((2 * (total >> shift[c]) + 1) * mult[c] + (np.int64(1) << 29)) >> 30) + zero
            codes[row, c] = min(max(code, low), high)


def htp16(n: NodeView, sums: list[Array], base: Array, codes: Array) -> None:
    constants = [_spread(n.fixed[key], base, np.int64) for key in ("shift", "mult")]
    limits = [np.int64(x) for x in (n.q(-1).zero, n.fixed["low"], n.fixed["high"])]
    _htp16(*sums, base.astype(np.int64), *constants, *limits, codes)


@njit(parallel=True, cache=True)
def _fp32(sums, base, scale, zero, low, high, codes):  # type: ignore[no-untyped-def]
    for row in prange(sums.shape[0]):
        for c in range(sums.shape[1]):
            real = np.float32(np.int32(sums[row, c]) + base[c]) * scale[c]
            codes[row, c] = np.int32(min(max(np.rint(real), low), high)) + zero


def fp32(n: NodeView, sums: list[Array], base: Array, codes: Array) -> None:
    scale = np.ldexp(np.asarray(n.fixed["mult"], np.float32), -np.asarray(n.fixed["shift"]))
    zero = np.int32(n.q(-1).zero)
    low, high = (np.float32(n.fixed[key] - n.q(-1).zero) for key in ("low", "high"))
    _fp32(sums[0], base.astype(np.int32), _spread(scale, base, np.float32), zero, low, high, codes)


KERNELS: dict[str, Finish] = {"htp8": htp8, "htp16": htp16, "fp32": fp32}
