"""Loops that numba compiles, for rules along the last axis: Hexagon's RMSNorm and softmax on rows [R, C].

The arithmetic of vector float is that of `edgeforge.ir.qfloat`, one number at a time (the tests compare the two). What
a loop calls stands in this file: numba's files on disk follow changes of the file of the loop alone."""

from __future__ import annotations

import numpy as np

from edgeforge.sim.compiled import compiled


@compiled
def _power(exponent):
    """2.0 ** exponent, from its bits."""
    return np.int64((exponent + 1023) << 52).view(np.float64)


@compiled
def _exponent(x):
    """floor(log2 |x|) of a float32 held in float64; that of the smallest normal number for zero."""
    return np.int64(-126) if x == 0 else (np.float64(abs(x)).view(np.int64) >> 52) - 1023


@compiled
def _rounded(exact, low, e):
    wide = np.int64(exact >= _power(e + 1))
    steps = exact * _power(23 - e - wide)
    base = np.floor(steps * 0.25) * 4.0
    rest = steps - base
    first, second = (2.0, 2.0) if wide else (1.5, 2.5)
    up = 1.0 if rest < first or (rest == first and low <= 0) else 3.0
    up = 2.0 if up == 3.0 and (rest < second or (rest == second and low <= 0)) else up
    up = -1.0 if rest == 0 and low < 0 else up
    return np.float32((base + up) * _power(e - 23 + wide))


@compiled
def multiply(a, b):
    """Product of float32 values in vector float."""
    x, y = np.float64(a), np.float64(b)
    product = x * y
    size = np.float32(0) if product == 0 else _rounded(abs(product), 0.0, _exponent(x) + _exponent(y))
    return np.copysign(size, np.float32(product))


@compiled
def add(a, b):
    """Sum of float32 values in vector float; it must not be negative."""
    x, y = np.float64(a), np.float64(b)
    total = x + y
    shared = total - x
    lost = (x - (total - shared)) + (y - shared)
    result = _rounded(total, lost, max(_exponent(x), _exponent(y)))
    return np.float32(0) if total == 0 and lost == 0 else result


@compiled
def rsqrt(x):
    bits = np.int32(np.int32(0x5F375A86) - (np.float32(x).view(np.int32) >> np.int32(1)))
    y, half = bits.view(np.float32), np.float32(0.5) * x
    for _ in range(3):
        y = multiply(y, add(np.float32(1.5), -multiply(multiply(half, y), y)))
    return y


@compiled
def _inverse_root(row, center, eps):
    """1 / sqrt(mean(c^2) + eps) of centered codes c; the exact sum goes in three pieces, from the lowest."""
    total, weight = np.int64(0), np.float32(1) / np.float32(row.size)
    for c in range(row.size):
        code = np.int64(row[c]) - center
        total += code * code
    mean = multiply(np.float32(total & 65535), weight)
    mean = add(multiply(np.float32(total >> 16 & 65535), weight * np.float32(2.0**16)), mean)
    mean = add(multiply(np.float32(total >> 32), weight * np.float32(2.0**32)), mean)
    return rsqrt(add(mean, eps))


@compiled
def rms_norm16(codes, center, gain, eps, zero, low, high, out):
    """The rule htp_rms_norm16; gain float32 [C], eps float32."""
    for i in range(codes.shape[0]):
        row, line = codes[i], out[i]
        inverse = _inverse_root(row, center, eps)
        for c in range(row.size):
            scaled = multiply(multiply(gain[c], inverse), np.float32(np.int64(row[c]) - center))
            below = np.int64(scaled == 0 and np.copysign(np.float32(1), scaled) < 0)
            line[c] = min(max(np.int64(np.floor(scaled)) - below + zero, low), high)


@compiled
def rms_norm8(codes, center, gain, eps, zero, low, high, out):
    """The rule htp_rms_norm8; gain float32 [C], eps float32."""
    for i in range(codes.shape[0]):
        row, line = codes[i], out[i]
        inverse = _inverse_root(row, center, eps)
        for c in range(row.size):
            scaled = multiply(multiply(gain[c], inverse), np.float32(np.int64(row[c]) - center))
            real = min(add(max(scaled, np.float32(-zero)), np.float32(zero)), np.float32(256))
            # To 11 bits, half to even: what is added leaves that many in float32.
            raised = np.float32(1.5 * _power(max(_exponent(np.float64(real)), -14) + 13))
            line[c] = min(max(np.int64(np.floor(np.float32(real + raised) - raised)), low), high)


@compiled
def softmax16(codes, quarters, step, low, high, power, out):
    """The rule htp_softmax16; quarters: coefficients int64 [3, 4]; power: int64 [C], overwritten."""
    for i in range(codes.shape[0]):
        row, line = codes[i], out[i]
        largest = np.int64(row.max())
        total = np.int64(0)
        for c in range(row.size):
            steps = (largest - row[c]) * step
            g = 65535 - (steps >> 6 & 65535)
            quarter = np.uint64(g >> 14)
            square, linear, constant = quarters[0, quarter], quarters[1, quarter], quarters[2, quarter]
            inner = ((linear << 15) + g * square) >> 16
            power[c] = (((constant << 15) + g * inner) >> 16) >> min(steps >> 22, 16)
            total += power[c]
        exponent = max(_exponent(np.float64(total)) + 1 - 16, 0)
        whole, bits = exponent + 14, min(exponent + 14, 16)
        k, y = total >> 1, np.int64(1) << (bits - 1)
        for _ in range(5):
            y = (y * ((np.int64(2) << whole) - ((k * y) >> bits))) >> whole
        inverse = min(y << (16 - bits), 65536)
        for c in range(row.size):
            line[c] = min(max(power[c] * inverse >> (15 + exponent), low), high)
