"""Loops that numba compiles: sums of products, rounding, look-up. No loop here knows a graph.

The codes of an image are [N, H, W, C] (channels innermost: that is what vectorizes); loops index slices that start at
the channel in question, or LLVM would not vectorize them. Each runs in one thread and leaves Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numba import njit
from numba.core.caching import FunctionCache


class _Files(FunctionCache):
    """numba's files on disk, which a run can do without: a full disk is no reason to fail."""

    def save_overload(self, *made: Any) -> None:
        with suppress(OSError):
            super().save_overload(*made)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call and kept on disk; where no folder can be written, compiled in every process."""
    loop = njit(nogil=True)(function)
    with suppress(RuntimeError):
        loop._cache = _Files(function)
    return loop


@compiled
def patches(codes, channels, channel, byte, fill, kernel, stride, dilation, corner, size, start, rows):
    """int8 rows [R, KH * KW * C]: one byte of the codes [N, H, W * channels] under each window, less 128.

    The windows of output positions start.. of an output of ``size`` (H, W); ``corner``: (top, left) padding with the
    code ``fill``; the channels are channel..channel + C."""
    height, width = codes.shape[1], codes.shape[2] // channels
    depth = rows.shape[1] // (kernel[0] * kernel[1])
    outside = np.int8(((fill >> byte) & 255) - 128)
    joined = dilation[1] == 1 and depth == channels
    for i in range(rows.shape[0]):
        image, place = divmod(start + i, size[0] * size[1])
        top, left = place // size[1] * stride[0] - corner[0], place % size[1] * stride[1] - corner[1]
        at = 0
        for ky in range(kernel[0]):
            y = top + ky * dilation[0]
            whole = joined and 0 <= y < height and left >= 0 and left + kernel[1] <= width
            run = depth * kernel[1] if whole else depth
            for kx in range(1 if whole else kernel[1]):
                x = left + kx * dilation[1]
                row = rows[i, at : at + run]
                if 0 <= y < height and 0 <= x < width:
                    pixel = codes[image, y, x * channels + channel : x * channels + channel + run]
                    for c in range(run):
                        row[c] = np.int8(((pixel[c] >> byte) & 255) ^ 128)
                else:
                    row[:] = outside
                at += run


@compiled
def depthwise(codes, weights, byte, fill, kernel, stride, dilation, corner, size, start, sums):
    """int32 sums [R, C] of one byte of the codes times weights [KH * KW, C], as `patches` walks."""
    height, width, depth = codes.shape[1], codes.shape[2], sums.shape[1]
    outside = np.int32((fill >> byte) & 255)
    for i in range(sums.shape[0]):
        image, place = divmod(start + i, size[0] * size[1])
        top, left = place // size[1] * stride[0] - corner[0], place % size[1] * stride[1] - corner[1]
        total = sums[i]
        total[:] = 0
        for ky in range(kernel[0]):
            y = top + ky * dilation[0]
            for kx in range(kernel[1]):
                x = left + kx * dilation[1]
                w = weights[ky * kernel[1] + kx]
                if 0 <= y < height and 0 <= x < width:
                    pixel = codes[image, y, x]
                    for c in range(depth):
                        total[c] += np.int32(np.int32((pixel[c] >> byte) & 255) * np.int32(w[c]))
                else:
                    for c in range(depth):
                        total[c] += np.int32(outside * np.int32(w[c]))


@compiled
def htp8(sums, row, column, base, shift, mult, added, zero, low, high, codes):
    """``(h * mult + added) >> 16`` with ``h = sum >> shift``, in 32 bits: the rules htp8 and htp8_v68 for 8-bit codes,
    which |h| >= 8192 saturates whatever the multiplier (at least 2**12)."""
    width = sums.shape[1]
    b, s = base[column : column + width], shift[column : column + width]
    m, a = mult[column : column + width], added[column : column + width]
    for i in range(sums.shape[0]):
        acc, out = sums[i], codes[row + i, column : column + width]
        for c in range(width):
            h = np.int32(np.int32(acc[c] + b[c]) >> (s[c] & np.int32(31)))
            h = np.int32(min(max(h, np.int32(-8192)), np.int32(8191)))
            code = np.int32(np.int32(np.int32(np.int32(h * m[c]) + a[c]) >> np.int32(16)) + zero)
            out[c] = np.int32(min(max(code, low), high))


@compiled
def htp8_wide(sums, row, column, base, left, right, mult, added, zero, low, high, codes):
    """As `htp8` in 64 bits, shifted ``left`` or ``right``, for codes of any width."""
    width = sums.shape[1]
    up, down = left[column : column + width], right[column : column + width]
    b, m, a = base[column : column + width], mult[column : column + width], added[column : column + width]
    for i in range(sums.shape[0]):
        acc, out = sums[i], codes[row + i, column : column + width]
        for c in range(width):
            h = ((acc[c] + b[c]) << (up[c] & 63)) >> (down[c] & 63)
            out[c] = min(max(((h * m[c] + a[c]) >> 16) + zero, low), high)


@compiled
def htp16(high_sums, low_sums, row, column, base, carry, left, right, mult, zero, low, high, codes):
    """The rule htp16, shifted ``left`` or ``right``; ``carry`` belongs to the low byte's sum before it is cut."""
    width = high_sums.shape[1]
    b, k = base[column : column + width], carry[column : column + width]
    up, down, m = left[column : column + width], right[column : column + width], mult[column : column + width]
    for i in range(high_sums.shape[0]):
        upper, lower, out = high_sums[i], low_sums[i], codes[row + i, column : column + width]
        for c in range(width):
            acc = np.int64(upper[c]) + (np.int64(lower[c] + k[c]) >> 8) + b[c]
            h = (acc << (up[c] & 63)) >> (down[c] & 63)
            code = (((2 * h + 1) * m[c] + (np.int64(1) << 29)) >> 30) + zero
            out[c] = min(max(code, low), high)


@compiled
def multiply_shift(sums, row, column, base, shift, mult, half, low, high, codes):
    """``((acc + base) * mult + half) >> shift`` of sums [planes, R, C]: of codes, or of their high and low bytes."""
    width, planes = sums.shape[2], sums.shape[0]
    b, s, m = base[column : column + width], shift[column : column + width], mult[column : column + width]
    h = half[column : column + width]
    for i in range(sums.shape[1]):
        first, last, out = sums[0, i], sums[planes - 1, i], codes[row + i, column : column + width]
        for c in range(width):
            acc = np.int64(last[c])
            if planes == 2:
                acc += np.int64(first[c]) << 8
            out[c] = min(max(((acc + b[c]) * m[c] + h[c]) >> (s[c] & 63), low), high)


@compiled
def fp32(sums, row, column, base, scale, zero, low, high, codes):
    """The rule fp32 on 8-bit activations; ``low`` and ``high`` lie ``zero`` below the codes."""
    width = sums.shape[1]
    b, s = base[column : column + width], scale[column : column + width]
    for i in range(sums.shape[0]):
        acc, out = sums[i], codes[row + i, column : column + width]
        for c in range(width):
            real = np.float32(np.int32(acc[c] + b[c])) * s[c]
            out[c] = np.int32(min(max(np.rint(real), low), high)) + zero


@compiled
def weighted_sum(a, b, left, right, offset, shift, low, high, out):
    """``(left * a + right * b + offset) >> shift``, all one-dimensional."""
    for i in range(out.size):
        total = (left * np.int64(a[i]) + right * np.int64(b[i]) + offset) >> shift
        out[i] = min(max(total, low), high)


@compiled
def htp_product(a, b, zero_a, zero_b, zero, taken, mult, shift, offset, step, coarse, low, high, out):
    """The rule htp_product16, all one-dimensional; in two parts, as 66 bits would be needed."""
    half, half_step = np.int64(1) << (shift - 1), (np.int64(1) << step) >> 1
    for i in range(out.size):
        product = (np.int64(a[i]) - zero_a) * (np.int64(b[i]) - zero_b) - taken
        lower = ((product & 0xFFFF) * mult + half) >> 15
        fine = (((product >> 16) * mult << 1) + lower) >> (shift - 15)
        out[i] = min(max((((fine + offset + half_step) >> step) << coarse) + zero, low), high)


@compiled
def affine(codes, first, center, mult, even, odd, shift, offset, step, low, high, out):
    """``((((code - center) * mult + lane) >> shift) + offset) >> step``, all one-dimensional; lane: ``even`` or ``odd``
    as ``first`` plus the index is."""
    for i in range(codes.size):
        lane = odd if (first + i) & 1 else even
        fine = ((np.int64(codes[i]) - center) * mult + lane) >> shift
        out[i] = min(max((fine + offset) >> step, low), high)


@compiled
def look_up(table, codes, out):
    """``table[codes]``, all one-dimensional."""
    for i in range(codes.size):
        out[i] = table[codes[i]]


@compiled
def look_up_pairs(table, left, right, out):
    """``table[left * 256 + right]`` for 8-bit operands, all one-dimensional."""
    for i in range(left.size):
        out[i] = table[(np.int64(left[i]) << 8) | np.int64(right[i])]
