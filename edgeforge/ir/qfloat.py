"""Hexagon's vector float (qf32): a 24-bit two's complement significand with an implied half step below its last bit.

Values are carried as float32, which holds every result exactly; only the rounding differs from IEEE. In units of
2**(e - 23), e the exponent of the exact result, the representable magnitudes are 1, 2 and 3 modulo 4: a multiple of 4
does not exist and becomes the next value up. (Public: the instruction semantics in the Hexagon port of QEMU.)"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def _exponent(x: Array) -> Array:
    """floor(log2 |x|) of float32 values; that of the smallest normal number for zero."""
    fraction, exponent = np.frexp(x)
    return np.where(fraction == 0, -126, exponent - 1)


def _round(exact: Array, low: Array, e: Array) -> Array:
    """float64 magnitudes below 2**(e + 2), plus ``low`` (its sign counts), to qf32 as float32."""
    wide = exact >= np.ldexp(2.0, e)
    unit = np.ldexp(1.0, e - 23 + wide)
    steps = exact / unit
    base = np.floor(steps / 4) * 4
    rest = steps - base
    first, second = np.where(wide, 2.0, 1.5), np.where(wide, 2.0, 2.5)
    up = np.where((rest < first) | ((rest == first) & (low <= 0)), 1.0, 3.0)
    up = np.where((up == 3.0) & ((rest < second) | ((rest == second) & (low <= 0))), 2.0, up)
    up = np.where((rest == 0) & (low < 0), -1.0, up)
    return ((base + up) * unit).astype(np.float32)


def multiply(a: Array, b: Array) -> Array:
    """Product of float32 values. The sign is apart: a zero keeps it."""
    exact = np.abs(np.multiply(a, b, dtype=np.float64))
    result = _round(exact, np.float64(0), _exponent(a) + _exponent(b))
    result = np.where(exact == 0, np.float32(0), result)
    return np.where(np.signbit(a) ^ np.signbit(b), -result, result)


def add(a: Array, b: Array) -> Array:
    """Sum of float32 values; the sum must be positive or, of two zeros, zero."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    total = x + y
    shared = total - x
    lost = (x - (total - shared)) + (y - shared)
    result = _round(total, lost, np.maximum(_exponent(np.asarray(a)), _exponent(np.asarray(b))))
    return np.where((total == 0) & (lost == 0), np.float32(0), result)


def floor(x: Array) -> Array:
    """int64 floor. A negative zero lies half a step below zero: -1."""
    return np.floor(x).astype(np.int64) - ((x == 0) & np.signbit(x))


def rsqrt(x: Array) -> Array:
    """1 / sqrt(x): a first guess from the bits, then three Newton steps y = y (1.5 - ((x / 2) y) y)."""
    bits = np.int32(0x5F375A86) - (np.asarray(x, np.float32).view(np.int32) >> 1)
    y, half = bits.view(np.float32), np.float32(0.5) * x
    for _ in range(3):
        y = multiply(y, add(np.float32(1.5), -multiply(multiply(half, y), y)))
    return y
