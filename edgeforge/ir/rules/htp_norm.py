"""Hexagon's softmax and RMSNorm, v73-v81: rules found by probing the HTP emulator (QNN 2.49) with integers in and
integers out. docs/numerics.md has the evidence."""

from __future__ import annotations

import numpy as np

from edgeforge.ir import qfloat
from edgeforge.ir.fixed import Array, Constants, Rule, f32, saturate, with_range
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import Profile, normalized
from edgeforge.ir.types import QParams


def _derive_rms_norm(n: NodeView) -> Constants:
    """float32 bit patterns. gain: ((w - zero) * s_w) / s_y; eps: in squared input codes."""
    codes = n.data(1)
    assert codes is not None
    gain = f32(f32(f32(codes.astype(np.int64) - n.zero(1)) * n.q(1).scale) / n.q(-1).scale)
    eps = f32(f32(n["eps"]) / f32(n.q(0).scale * n.q(0).scale))
    return with_range(n, gain=gain.view(np.int32), eps=int(eps.view(np.int32)))


def mean_of_squares(codes: Array) -> Array:
    """float32 [..., 1]. The sum is an exact integer in three pieces (above bit 32, two of 16 bits), each times its
    float32 weight over the length, added from the lowest."""
    total = (codes * codes).sum(-1, keepdims=True)
    weight = f32(1) / f32(codes.shape[-1])
    high, middle, low = (
        qfloat.multiply(f32(piece), weight * f32(2.0**place))
        for piece, place in ((total >> 32, 32), (total >> 16 & 65535, 16), (total & 65535, 0))
    )
    return qfloat.add(high, qfloat.add(middle, low))


def _scaled(n: NodeView, x: Array) -> Array:
    """``(gain * rsqrt(mean(c^2) + eps)) * c``, c the centered codes, in output codes."""
    codes = x.astype(np.int64) - n.zero(0)
    gain, eps = (np.asarray(n.fixed[key], np.int32).view(np.float32) for key in ("gain", "eps"))
    inverse = qfloat.rsqrt(qfloat.add(mean_of_squares(codes), eps))
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
    """``gain_scale``: a float32 bit pattern."""
    gain, q, bias = narrow_gain(n)
    return with_range(n, gain=gain.astype(np.int64) - q.zero, gain_scale=int(q.scale.view(np.int32)), bias=bias)


def _apply_layer_norm(n: NodeView, x: Array, w: Array, b: Array) -> Array:
    """The exact value of the form that HTP takes, rounded once."""
    scale = np.float64(np.asarray(n.fixed["gain_scale"], np.int32).view(np.float32))
    offset = n.fixed["bias"] * (np.float64(n.q(0).scale) * scale)
    real = normalized(n, x, True) * (n.fixed["gain"] * scale) + offset
    return saturate(n, np.rint(real / np.float64(n.q(-1).scale)).astype(np.int64))


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


SHORT = "rows of 1 or 2 have another kernel: the rule of longer rows, at most 12 LSB"
LAYER_NORM = "the exact value of a uint8 gain: 79 % identical at 8 bits, 87 % at 16, 1 LSB"
RULES = (
    Rule("htp_layer_norm", _derive_layer_norm, _apply_layer_norm, "bounded", LAYER_NORM),
    Rule("htp_softmax16", _derive_softmax16, _apply_softmax16, "exact"),
    Rule("htp_softmax16_short", _derive_softmax16, _apply_softmax16, "bounded", SHORT),
    Rule("htp_rms_norm8", _derive_rms_norm, _apply_rms_norm8, "exact"),
    Rule("htp_rms_norm16", _derive_rms_norm, _apply_rms_norm16, "exact"),
)
PROFILES: dict[str, Profile] = {}

#: What Hexagon's profiles say about these ops.
NORMS: Profile = {
    "u8": {"rms_norm": "htp_rms_norm8", "layer_norm": "htp_layer_norm"},
    "u16": {
        "rms_norm": "htp_rms_norm16",
        "layer_norm": "htp_layer_norm",
        "softmax": "htp_softmax16",
        "softmax_short": "htp_softmax16_short",
    },
}
