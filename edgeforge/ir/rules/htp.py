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
    clamp_codes,
    f32,
    saturate,
    shift_right,
    with_range,
)
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import EXACT_VALUE, Profile, apply_mean, apply_table


def htp_bias(n: NodeView, divisor: int) -> Constants:
    """The bias HTP really adds (divided by ``divisor``): a float32 round trip truncated toward zero; per-channel biases
    first become multiples of a common step, max|b| / 2**28."""
    if n.arity < 3 or (codes := n.data(2)) is None:
        return {}
    step = f32(n.q(0).scale * f32(channel_scale(n.q(1))).max())
    real = f32(codes) * step
    largest = np.abs(real).max()
    if largest == 0:
        return {"bias": np.zeros(codes.shape, np.int64)}
    common = f32(largest / np.float32(2.0**28))
    rounded = np.rint(real * f32(np.float32(1) / common))
    return {"bias": np.trunc(f32(rounded * common) / f32(step * np.float32(divisor))).astype(np.int64)}


def htp_ratio(n: NodeView) -> Array:
    """float32 ((s_x * max s_w) / s_y) * (s_w / max s_w), as float64 [C] or [1]."""
    scales = f32(channel_scale(n.q(1)).reshape(-1))
    widest = scales.max()
    tensor = f32(f32(n.q(0).scale * widest) / n.q(-1).scale)
    return f32(tensor * f32(scales / widest)).astype(np.float64)


def _derive_htp8(n: NodeView) -> Constants:
    s = htp_ratio(n)
    shift = -ceil_log2(s) - 3
    return with_range(n, mult=np.floor(np.ldexp(s, shift + 15) + 0.5).astype(np.int64), shift=shift, **htp_bias(n, 1))


def _apply_htp8(n: NodeView, acc: Array) -> Array:
    """Hexagon v73-v81, 8-bit activations: ``((2h + 1) * mult + 2**15) >> 16`` with ``h = acc >> shift``."""
    h = shift_right(acc, along_channel(n, n.fixed["shift"]))
    return saturate(n, ((2 * h + 1) * along_channel(n, n.fixed["mult"]) + (1 << 15)) >> 16)


def _derive_htp8_dw2(n: NodeView) -> Constants:
    s = htp_ratio(n)
    shift = 15 - ceil_log2(s)
    bias = np.zeros(s.shape, np.int64) if n.arity < 3 else np.asarray(n.data(2), np.int64)
    folded = f32(f32(bias) + f32(n.q(-1).zero / s))
    offset = np.floor(folded.astype(np.float64) + 0.5).astype(np.int64) - bias
    return with_range(n, mult=np.rint(np.ldexp(s, shift)).astype(np.int64), shift=shift, offset=offset)


def _apply_htp8_dw2(n: NodeView, acc: Array) -> Array:
    """Depthwise convolution with stride 2, another kernel: 15-bit multiplier, the zero point inside the accumulator."""
    mult, shift, offset = (along_channel(n, n.fixed[key]) for key in ("mult", "shift", "offset"))
    code = shift_right((acc + offset) * mult + (np.int64(1) << (shift - 1)), shift)
    return saturate(n, code - n.q(-1).zero)


def _derive_htp16(n: NodeView) -> Constants:
    s = 256 * htp_ratio(n)
    shift = -ceil_log2(s) - 7
    mult = np.floor(np.ldexp(s, shift + 29) + 0.5).astype(np.int64)
    return with_range(n, mult=mult, shift=shift, **htp_bias(n, 256))


def _apply_htp16(n: NodeView, acc256: Array) -> Array:
    """Hexagon v73-v81, 16-bit activations; ``acc256`` is the accumulator at 1/256 (see `join_bytes`)."""
    h = shift_right(acc256, along_channel(n, n.fixed["shift"]))
    return saturate(n, ((2 * h + 1) * along_channel(n, n.fixed["mult"]) + (1 << 29)) >> 30)


def join_bytes(high: Array, low: Array, offset: Array) -> Array:
    """Byte-split dot product at 1/256: the low byte's sum is truncated, the zero point's share rounded half up."""
    return high + (low >> 8) - ((offset + 128) >> 8)


def _derive_htp_sum(n: NodeView) -> Constants:
    """Multipliers share the exponent that keeps their sum (of a subtraction: the larger) below 2**14 * 4095 / 4096."""
    inverse = f32(np.float32(1) / n.q(-1).scale)
    m = [float(f32(n.q(i).scale * inverse)) for i in (0, 1)]
    subtract = n.node.op == "sub"
    reach, exponent = (max(m) if subtract else sum(m)), 15
    while reach * 2.0**exponent >= 16380:
        exponent -= 1
    mult = [int(np.rint(x * 2.0**exponent)) for x in m]
    mult[1] = -mult[1] if subtract else mult[1]
    taken = (mult[0] * n.zero(0) + mult[1] * n.zero(1) + 128) >> 8
    offset = int(np.floor((2 * n.q(-1).zero + 1) * 2.0 ** (exponent - 9))) - taken
    # The hardware keeps the offset in 16 bits: it wraps.
    offset = (offset + 32768) % 65536 - 32768
    return with_range(n, mult=np.array(mult), shift=exponent, offset=offset)


def _apply_htp_sum(n: NodeView, a: Array, b: Array) -> Array:
    left, right = n.fixed["mult"]
    total = left * a.astype(np.int64) + right * b.astype(np.int64) + 256 * n.fixed["offset"]
    return saturate(n, shift_right(total, n.fixed["shift"]) - n.q(-1).zero)


def _derive_htp_mean(n: NodeView) -> Constants:
    count = int(np.prod(n["kernel"])) if "kernel" in n.attrs else n.type(0).size // n.out.size
    s = float(n.q(0).scale) / float(n.q(-1).scale) / count
    fraction, exponent = np.frexp(s)
    return with_range(n, mult=int(np.rint(fraction * 2**15)), shift=15 - int(exponent))


def _derive_htp_requantize(n: NodeView) -> Constants:
    """15-bit multiplier, a first rounding at 2**-k of an output step, a second at the step; kept as a table."""
    s = float(f32(n.q(0).scale * f32(np.float32(1) / n.q(-1).scale)))
    fraction, exponent = np.frexp(s)
    mult, k = int(np.rint(fraction * 2**15)), 6 if exponent <= 1 else 7 - int(exponent)
    fine = 15 - int(exponent) - k
    value = shift_right((np.arange(256) - n.zero(0)) * mult + ((1 << fine) >> 1 if fine > 0 else 0), fine)
    value = shift_right(value + ((1 << k) >> 1 if k > 0 else 0), k)
    low, high = clamp_codes(n)
    return {"table": np.clip(value + n.q(-1).zero, low, high).astype(np.uint8)}


# -------------------------------------------------------------------------------- dot products: ONNX Runtime, XNNPACK


_EXACT8 = {
    "dot": "htp8",
    "dot_dw2": "htp8_dw2",
    "add": "htp_sum",
    "sub": "htp_sum",
    "mean": "htp_mean",
    "requantize": "htp_requantize",
    "table": "htp_table",
}

RULES = (
    Rule("htp8", _derive_htp8, _apply_htp8, "exact"),
    Rule("htp8_dw2", _derive_htp8_dw2, _apply_htp8_dw2, "exact"),
    Rule("htp16", _derive_htp16, _apply_htp16, "exact", bytewise=True),
    Rule("htp_sum", _derive_htp_sum, _apply_htp_sum, "exact"),
    Rule("htp_mean", _derive_htp_mean, apply_mean, "exact"),
    Rule("htp_requantize", _derive_htp_requantize, apply_table, "exact"),
)
PROFILES: dict[str, Profile] = {
    "htp-v73": {"u8": {**EXACT_VALUE, **_EXACT8}, "u16": {**EXACT_VALUE, "dot": "htp16"}},
    "htp-v68": {"u8": {**EXACT_VALUE, "dot": "htp8"}, "u16": {**EXACT_VALUE, "dot": "htp16"}},
}
