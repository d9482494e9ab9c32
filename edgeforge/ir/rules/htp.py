"""Qualcomm's Hexagon tensor processor: rules found by probing the HTP emulator (QNN 2.49) with integers in and integers
out. docs/numerics.md has the evidence."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.fixed import (
    Array,
    Constants,
    Rule,
    along_channel,
    ceil_log2,
    channel_scale,
    f32,
    saturate,
    shift_right,
    with_range,
)
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import EXACT_VALUE, Profile
from edgeforge.ir.rules.htp_norm import NORMS


def _bias(n: NodeView) -> tuple[Array, Array] | None:
    """float32: the bias that HTP adds and its step, that of the products of the widest channel. Real values on that
    step have become multiples of max|b| / 2**28."""
    if n.arity < 3 or (codes := n.data(2)) is None:
        return None
    step = f32(n.q(0).scale * f32(channel_scale(n.q(1))).max())
    real = f32(codes) * step
    common = f32(np.abs(real).max() / np.float32(2.0**28))
    if common == 0:
        return real, step
    return f32(f32(np.rint(real * f32(np.float32(1) / common))) * common), step


def _cut_bias(n: NodeView, divisor: int) -> Constants:
    """In steps of the accumulator times ``divisor``, truncated toward zero."""
    found = _bias(n)
    return {} if found is None else {"bias": np.trunc(found[0] / f32(found[1] * np.float32(divisor))).astype(np.int64)}


def _rounded_bias(n: NodeView) -> Constants:
    """In steps of the accumulator, by its inverse, to the nearest."""
    found = _bias(n)
    return {} if found is None else {"bias": np.rint(found[0] * f32(np.float32(1) / found[1])).astype(np.int64)}


def htp_ratio(n: NodeView) -> Array:
    """float32 ((s_x * max s_w) / s_y) * (s_w / max s_w), as float64 [C] or [1]. The weights of an average are 1."""
    scales = f32([1 / np.prod(n["kernel"])] if "kernel" in n.attrs else channel_scale(n.q(1)).reshape(-1))
    widest = scales.max()
    tensor = f32(f32(n.q(0).scale * widest) / n.q(-1).scale)
    return f32(tensor * f32(scales / widest)).astype(np.float64)


def _derive_htp8(n: NodeView) -> Constants:
    s = htp_ratio(n)
    shift = -ceil_log2(s) - 3
    return with_range(n, mult=np.floor(np.ldexp(s, shift + 15) + 0.5).astype(np.int64), shift=shift, **_cut_bias(n, 1))


def _apply_htp8(n: NodeView, acc: Array) -> Array:
    """Hexagon v73-v81, 8-bit activations: ``((2h + 1) * mult + 2**15) >> 16`` with ``h = acc >> shift``."""
    h = shift_right(acc, along_channel(n, n.fixed["shift"]))
    return saturate(n, ((2 * h + 1) * along_channel(n, n.fixed["mult"]) + (1 << 15)) >> 16)


def _folded_zero(n: NodeView, s: Array) -> Array:
    """The output's zero point in accumulator steps [C]: rounded together with the bias, in float32."""
    bias = np.zeros(s.shape, np.int64) if n.arity < 3 else np.asarray(n.data(2), np.int64)
    folded = f32(f32(bias) + f32(n.q(-1).zero / s))
    return np.floor(folded.astype(np.float64) + 0.5).astype(np.int64) - bias


def _derive_htp8_v68(n: NodeView) -> Constants:
    s = htp_ratio(n)
    shift = -ceil_log2(s) - 3
    mult = np.floor(np.ldexp(s, shift + 14) + 0.5).astype(np.int64)
    return with_range(n, mult=mult, shift=shift, offset=_folded_zero(n, s))


def _apply_htp8_v68(n: NodeView, acc: Array) -> Array:
    """Hexagon v68 and v69: ``(h * mult + 2**13) >> 14`` with ``h = (acc + offset) >> shift``; at 16 bits ``acc`` is the
    accumulator at 1/256 (see `join_bytes`)."""
    mult, shift, offset = (along_channel(n, n.fixed[key]) for key in ("mult", "shift", "offset"))
    code = (shift_right(acc + offset, shift) * mult + (1 << 13)) >> 14
    return saturate(n, code - n.q(-1).zero)


def _derive_htp16_v68(n: NodeView) -> Constants:
    """As 8 bits, for an accumulator at 1/256; the bias is in the offset, whose low byte is cut."""
    ratio = htp_ratio(n)
    bias = np.zeros(1, np.int64) if n.arity < 3 else np.asarray(n.data(2), np.int64)
    shift = -ceil_log2(256 * ratio) - 3
    mult = np.floor(np.ldexp(ratio, shift + 22) + 0.5).astype(np.int64)
    return with_range(n, mult=mult, shift=shift, offset=_folded_zero(n, ratio) + bias >> 8, bias=np.zeros(1, np.int64))


def _derive_depthwise_2(n: NodeView) -> Constants:
    """``half``: what rounds a channel, which does without where all 32 channels of its vector have s > 1/2."""
    s = htp_ratio(n)
    exponent = ceil_log2(s)
    shift = 15 - exponent
    vectors = np.arange(s.size) // 32
    rounds = np.array([(exponent[vectors == v] < 0).any() for v in vectors])
    zero = np.floor(f32(f32(n.q(-1).zero / s) + np.float32(0.5))).astype(np.int64)
    half = np.where(rounds, np.int64(1) << shift - 1, 0)
    mult = np.floor(np.ldexp(s, shift) + 0.5).astype(np.int64)
    return with_range(n, mult=mult, shift=shift, offset=zero, half=half, **_rounded_bias(n))


def _apply_depthwise_2(n: NodeView, acc: Array) -> Array:
    """Depthwise convolution with stride 2, another kernel, for both widths of codes: the whole accumulator, a 15-bit
    multiplier, the zero point inside: ``((acc + offset) * mult + half) >> shift``."""
    mult, shift, offset, half = (along_channel(n, n.fixed[key]) for key in ("mult", "shift", "offset", "half"))
    return saturate(n, shift_right((acc + offset) * mult + half, shift) - n.q(-1).zero)


def _derive_htp16(n: NodeView) -> Constants:
    s = 256 * htp_ratio(n)
    shift = -ceil_log2(s) - 7
    mult = np.floor(np.ldexp(s, shift + 29) + 0.5).astype(np.int64)
    return with_range(n, mult=mult, shift=shift, **_cut_bias(n, 256))


def _apply_htp16(n: NodeView, acc256: Array) -> Array:
    """Hexagon v73-v81, 16-bit activations; ``acc256`` is the accumulator at 1/256 (see `join_bytes`)."""
    h = shift_right(acc256, along_channel(n, n.fixed["shift"]))
    return saturate(n, ((2 * h + 1) * along_channel(n, n.fixed["mult"]) + (1 << 29)) >> 30)


def join_bytes(high: Array, low: Array, offset: Array) -> Array:
    """Byte-split dot product at 1/256: the low byte's sum is truncated, the zero point's share rounded half up."""
    return high + (low >> 8) - ((offset + 128) >> 8)


def _window16(n: NodeView, total: Array) -> Array:
    """``total``, the sum of (code - zero point), as a sum of weights 1 comes out of `join_bytes`."""
    offset = int(np.prod(n["kernel"])) * n.zero(0)
    return ((total + offset) >> 8) - ((offset + 128) >> 8)


def _apply_window16(n: NodeView, total: Array) -> Array:
    return _apply_htp16(n, _window16(n, total))


def _apply_window16_v68(n: NodeView, total: Array) -> Array:
    return _apply_htp8_v68(n, _window16(n, total))


def _derive_htp_mean(n: NodeView) -> Constants:
    """``half``: half a step, and at 16 bits the highest bit of the number of elements."""
    count = n.type(0).size // n.out.size
    fraction, exponent = np.frexp(float(n.q(0).scale) / float(n.q(-1).scale) / count)
    shift = 15 - int(exponent)
    half = (1 << shift >> 1 if shift > 0 else 0) + (1 << count.bit_length() - 1 if n.type(0).dtype == "u16" else 0)
    return with_range(n, mult=int(np.rint(fraction * 2**15)), shift=shift, half=half)


def _apply_htp_mean(n: NodeView, total: Array) -> Array:
    """``(total * mult + half) >> shift``; ``total`` is the sum of (code - zero point), the multiplier has 15 bits."""
    return saturate(n, shift_right(total * n.fixed["mult"] + n.fixed["half"], n.fixed["shift"]))


_EXACT8 = {
    "dot": "htp8",
    "depthwise_2": "htp_depthwise_2",
    "avg_pool": "htp8",
    "add": "htp_sum",
    "sub": "htp_sum",
    "mul": "htp_product",
    "global": "htp_mean",
    "reduce_mean": "htp_mean",
    "requantize": "htp_requantize",
    "requantize_beside_table": "htp_table",
    "table": "htp_table",
}

V68 = "99.5 % identical, 1 LSB, with a bias at ratios below 2**-11; depthwise 2x2 of stride 2: another kernel, 506 LSB"
RULES = (
    Rule("htp8", _derive_htp8, _apply_htp8, "exact"),
    Rule("htp8_v68", _derive_htp8_v68, _apply_htp8_v68, "exact"),
    Rule("htp_depthwise_2", _derive_depthwise_2, _apply_depthwise_2, "exact"),
    Rule("htp16", _derive_htp16, _apply_htp16, "exact", bytewise=True),
    Rule("htp16_v68", _derive_htp16_v68, _apply_htp8_v68, "bounded", V68, bytewise=True),
    Rule("htp_window16", _derive_htp16, _apply_window16, "exact"),
    Rule("htp_window16_v68", _derive_htp16_v68, _apply_window16_v68, "bounded", V68),
    Rule("htp_mean", _derive_htp_mean, _apply_htp_mean, "exact"),
)
_EXACT16 = {
    "dot": "htp16",
    "depthwise_2": "htp_depthwise_2",
    "avg_pool": "htp_window16",
    "add": "htp_sum16",
    "sub": "htp_sum16",
    "mul": "htp_product16",
    "global": "htp_mean",
    "reduce_mean": "htp_mean",
    "requantize": "htp_requantize16",
}
PROFILES: dict[str, Profile] = {
    "htp-v73": {
        "u8": {**EXACT_VALUE, **_EXACT8, **NORMS["u8"]},
        "u16": {**EXACT_VALUE, **_EXACT16, **NORMS["u16"]},
    },
    "htp-v68": {
        "u8": {**EXACT_VALUE, **_EXACT8, **NORMS["u8"], "dot": "htp8_v68", "avg_pool": "htp8_v68"},
        "u16": {**EXACT_VALUE, **_EXACT16, **NORMS["u16"], "dot": "htp16_v68", "avg_pool": "htp_window16_v68"},
    },
}
