"""Hexagon's softmax, RMSNorm and LayerNorm, v73-v81: rules found by probing the HTP emulator (QNN 2.49) with integers
in and integers out. docs/numerics.md has the evidence."""

from __future__ import annotations

import numpy as np

from edgeforge.ir import qfloat
from edgeforge.ir.fixed import Array, Constants, Rule, f32, saturate, with_range
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import Profile
from edgeforge.ir.types import QParams


def _derive_rms_norm(n: NodeView) -> Constants:
    """float32 bit patterns. gain: ((w - zero) * s_w) / s_y; eps: in squared input codes."""
    codes = n.data(1)
    assert codes is not None
    gain = f32(f32(f32(codes.astype(np.int64) - n.zero(1)) * n.q(1).scale) / n.q(-1).scale)
    eps = f32(f32(n["eps"]) / f32(n.q(0).scale * n.q(0).scale))
    return with_range(n, gain=gain.view(np.int32), eps=int(eps.view(np.int32)))


def quotient(total: Array, count: int) -> Array:
    """float32 ``total / count`` of exact integers >= 0: three pieces of the total (above bit 32, two of 16 bits), each
    times its float32 weight over the count, added from the lowest."""
    weight = f32(1 / np.float64(count))
    high, middle, low = (
        qfloat.multiply(f32(piece), weight * f32(2.0**place))
        for piece, place in ((total >> 32, 32), (total >> 16 & 65535, 16), (total & 65535, 0))
    )
    return qfloat.add(high, qfloat.add(middle, low))


def _scaled(n: NodeView, x: Array) -> Array:
    """``(gain * rsqrt(mean(c^2) + eps)) * c``, c the centered codes, in output codes."""
    codes = x.astype(np.int64) - n.zero(0)
    gain, eps = (np.asarray(n.fixed[key], np.int32).view(np.float32) for key in ("gain", "eps"))
    squares = (codes * codes).sum(-1, keepdims=True)
    inverse = qfloat.rsqrt(qfloat.add(quotient(squares, codes.shape[-1]), eps))
    return qfloat.multiply(qfloat.multiply(gain, inverse), f32(codes))


def _apply_rms_norm16(n: NodeView, x: Array, w: Array) -> Array:
    """The floor, then the zero point."""
    return saturate(n, qfloat.floor(_scaled(n, x)))


def _apply_rms_norm8(n: NodeView, x: Array, w: Array) -> Array:
    """The zero point is added in vector float and the sum rounded to half precision before the floor."""
    scaled, zero = _scaled(n, x), f32(n.q(-1).zero)
    positive = np.where(scaled > -zero, scaled, -zero)
    half = np.float16(np.minimum(qfloat.add(positive, zero), 256))
    return saturate(n, np.floor(half).astype(np.int64) - n.q(-1).zero)


def narrow_gain(n: NodeView) -> tuple[Array, QParams, Array]:
    """LayerNorm's gain as uint8 codes, their encoding, and its bias as int32 codes at s_x * s_gain."""
    gain, bias, q = n.data(1), n.data(2), n.q(1)
    assert gain is not None and bias is not None
    if n.type(1).dtype != "u8":
        real = q.dequantize(gain)
        low, high = min(float(real.min()), 0.0), max(float(real.max()), 0.0)
        scale = np.float32(((high - low) or 1.0) / 255)
        q = QParams(scale, int(np.rint(-low / np.float64(scale))))
        gain = q.quantize(real, "u8")
    return gain, q, QParams(n.q(0).scale * q.scale).quantize(n.q(2).dequantize(bias), "i32")


def _derive_layer_norm(n: NodeView) -> Constants:
    """gain: centered uint8 codes; scale (s_gain / s_y) and eps (in squared input codes): float32 bit patterns; bias:
    whole output steps, ties away from zero."""
    gain, q, codes = narrow_gain(n)
    scale, eps = f32(q.scale / n.q(-1).scale), f32(f32(n["eps"]) / f32(n.q(0).scale * n.q(0).scale))
    step = f32(n.q(0).scale * q.scale)
    if n.out.dtype == "u8":
        bias = np.float64(f32(f32(codes * step) * f32(1 / n.q(-1).scale)))
    else:
        bias = codes * np.float64(step) / np.float64(n.q(-1).scale)
    bias = np.trunc(bias + np.copysign(0.5, bias)).astype(np.int64)
    constants = {"scale": int(scale.view(np.int32)), "eps": int(eps.view(np.int32))}
    return with_range(n, gain=gain.astype(np.int64) - q.zero, bias=bias, **constants)


def _normalizer(n: NodeView, codes: Array) -> tuple[Array, Array]:
    """scale * rsqrt(variance + eps) as a fraction in [1/2, 1), float64, and an exponent. The variance is that of the
    codes: an exact integer over the squared length. At 16 bits it is zero for a constant row."""
    scale, eps = (np.asarray(n.fixed[key], np.int32).view(np.float32) for key in ("scale", "eps"))
    count, total = codes.shape[-1], codes.sum(-1, keepdims=True)
    spread = count * (codes * codes).sum(-1, keepdims=True) - total * total
    inverse = qfloat.rsqrt(qfloat.add(quotient(spread, count * count), eps))
    normalizer = qfloat.multiply(inverse, scale).astype(np.float64)
    return np.frexp(normalizer if n.out.dtype == "u8" else np.where(spread > 0, normalizer, 0))


def _apply_layer_norm8(n: NodeView, x: Array, w: Array, b: Array) -> Array:
    """``(gain * M * (64 c - mean) + half) >> 22``, plus the bias: the mean is cut to 1/64 of a code, the normalizer M
    to 16 bits and to a multiple of 2**-16."""
    codes = x.astype(np.int64)
    fraction, exponent = _normalizer(n, codes)
    mult = np.floor(np.ldexp(np.floor(fraction * 65536), exponent)).astype(np.int64)
    mean = np.floor(64 * codes.sum(-1, keepdims=True) * np.float64(f32(1 / np.float64(codes.shape[-1]))))
    product = n.fixed["gain"] * (mult * (64 * codes - mean.astype(np.int64)))
    return saturate(n, (product + (1 << 21) >> 22) + n.fixed["bias"])


def _apply_layer_norm16(n: NodeView, x: Array, w: Array, b: Array) -> Array:
    """``gain * M * (c - mean)``, rounded half up, plus the bias: the mean in vector float, the normalizer M rounded to
    16 bits."""
    codes = x.astype(np.int64)
    fraction, exponent = _normalizer(n, codes)
    mean = quotient(codes.sum(-1, keepdims=True), codes.shape[-1]).astype(np.float64)
    product = n.fixed["gain"] * (np.rint(fraction * 65536) * (codes - mean))
    return saturate(n, np.floor(np.ldexp(product, exponent - 16) + 0.5).astype(np.int64) + n.fixed["bias"])


#: 2**(g / 65536) at 2**-14 is a quadratic in each quarter of g = 0..65535: coefficients of g^2 at 2**-16, of g and the
#: constant in half steps.
QUARTERS = np.array([[4300, 5119, 6087, 7227], [22652, 21816, 19857, 16401], [32769, 32876, 33371, 34681]])


def power_of_two(steps: Array) -> Array:
    """2**(-steps / 2**22) at 2**-15, at most 32767, of int64 steps >= 0."""
    g = 65535 - (steps >> 6 & 65535)
    square, linear, constant = QUARTERS[:, g >> 14]
    inner = (linear << 15) + g * square >> 16
    return ((constant << 15) + g * inner >> 16) >> np.minimum(steps >> 22, 16)


def reciprocal(total: Array) -> tuple[Array, Array]:
    """2**31 over ``total`` (at least 32767) scaled into 2**15..2**16, and the scaling's exponent: five Newton steps
    y = y (2 - k y) from y = 1/2 in integers, k half the total, y of 16 bits (14 or 15 for totals below 2**17)."""
    exponent = np.maximum(np.frexp(total.astype(np.float64))[1].astype(np.int64) - 16, 0)
    whole, bits = exponent + 14, np.minimum(exponent + 14, 16)
    k, y = total >> 1, np.int64(1) << bits - 1
    for _ in range(5):
        y = y * ((np.int64(2) << whole) - (k * y >> bits)) >> whole
    return np.minimum(y << 16 - bits, 65536), exponent


def _derive_softmax16(n: NodeView) -> Constants:
    """An input code in octaves, at 2**-22."""
    return with_range(n, step=int(np.floor(np.ldexp(np.float64(n.q(0).scale) * np.log2(np.e), 22))))


def _apply_softmax16(n: NodeView, x: Array) -> Array:
    """Powers of two at 2**-15, their sum, its reciprocal; the product is cut to steps of 1/65536 with zero point 0,
    whatever the output declares."""
    x = x.astype(np.int64)
    power = power_of_two((x.max(n["axis"], keepdims=True) - x) * n.fixed["step"])
    inverse, exponent = reciprocal(power.sum(n["axis"], keepdims=True))
    return saturate(n, (power * inverse >> 15 + exponent) - n.q(-1).zero)


def _derive_softmax8(n: NodeView) -> Constants:
    """An input code in octaves, at 2**-22: its first 8 bits."""
    fraction, exponent = np.frexp(np.float64(n.q(0).scale) * np.log2(np.e))
    return with_range(n, step=int(np.ldexp(np.floor(fraction * 256), int(exponent) + 14)))


def _apply_softmax8(n: NodeView, x: Array) -> Array:
    """Powers of two at 2**-15 over their sum, rounded to steps of 1/256."""
    x = x.astype(np.int64)
    power = power_of_two((x.max(n["axis"], keepdims=True) - x) * n.fixed["step"])
    return saturate(n, np.rint(256 * power / power.sum(n["axis"], keepdims=True)).astype(np.int64) - n.q(-1).zero)


NEAR = "the reciprocal of the sum is not known to the last bit: 99.99 % identical, 1 LSB"
SHORT = "rows of 1 or 2 have another kernel: the rule of longer rows, at most 12 LSB"
LAYER_NORM = "the normalizer of 1 row in 40 is one too large in 16 bits: 99.99 % identical, 1 LSB"
RULES = (
    Rule("htp_layer_norm8", _derive_layer_norm, _apply_layer_norm8, "bounded", LAYER_NORM),
    Rule("htp_layer_norm16", _derive_layer_norm, _apply_layer_norm16, "exact"),
    Rule("htp_softmax8", _derive_softmax8, _apply_softmax8, "bounded", NEAR),
    Rule("htp_softmax16", _derive_softmax16, _apply_softmax16, "exact"),
    Rule("htp_softmax16_short", _derive_softmax16, _apply_softmax16, "bounded", SHORT),
    Rule("htp_rms_norm8", _derive_rms_norm, _apply_rms_norm8, "exact"),
    Rule("htp_rms_norm16", _derive_rms_norm, _apply_rms_norm16, "exact"),
)
PROFILES: dict[str, Profile] = {}

#: What Hexagon's profiles say about these ops.
NORMS: Profile = {
    "u8": {
        "rms_norm": "htp_rms_norm8",
        "layer_norm": "htp_layer_norm8",
        "softmax": "htp_softmax8",
        "softmax_narrow": "softmax",
    },
    "u16": {
        "rms_norm": "htp_rms_norm16",
        "layer_norm": "htp_layer_norm16",
        "softmax": "htp_softmax16",
        "softmax_short": "htp_softmax16_short",
    },
}
