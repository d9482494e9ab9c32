"""Fixed point: how exact integer sums become output codes. The one file with shifts and overflow in it.

A *rule* is the integer arithmetic of one op family on one runtime. It has two halves: ``derive`` turns the encodings
around a node into integer constants (stored in the node's attributes: the graph is the complete contract), ``apply``
computes codes from codes with nothing but those constants. A *profile* says which rule a runtime uses per family.

All ``apply`` arithmetic is int64 (proved not to overflow by `verify`), or IEEE float32/float64 operations that are
rounded once and therefore reproducible on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.types import RANGE, QParams

Array = np.ndarray
Constants = dict[str, Any]

#: Block scales of LPBQ weights are 1..16 times the channel's.
LPBQ_STEPS = 16


@dataclass(frozen=True)
class Rule:
    """``status`` is "exact" (every integer equals the runtime's in the conformance runs), "bounded" (differs by what
    ``note`` says) or "unverified"."""

    name: str
    derive: Callable[[NodeView], Constants]
    apply: Callable[..., Array]
    status: str
    note: str = ""


# ---------------------------------------------------------------------------------------------------------- helpers


def clamp_codes(n: NodeView) -> tuple[int, int]:
    """Lowest and highest output code: the dtype's range, narrowed by a fused activation (attribute ``clamp``)."""
    low, high = RANGE[n.out.dtype]
    if "clamp" in n.attrs:
        q = n.q(-1)
        real_low, real_high = n["clamp"]
        low = max(low, int(np.rint(np.float64(real_low) / np.float64(q.scale))) + q.zero)
        high = min(high, int(np.rint(min(np.float64(real_high) / np.float64(q.scale), 2.0**31))) + q.zero)
    return low, high


def saturate(n: NodeView, code: Array) -> Array:
    """Add the zero point, clamp to the fused activation and store in the output's dtype."""
    return np.clip(code + n.q(-1).zero, n.fixed["low"], n.fixed["high"]).astype(np.uint16 if n.out.dtype == "u16" else np.uint8)


def shift_right(value: Array, bits: Array | int) -> Array:
    """Arithmetic shift right (floor); a negative count shifts left."""
    bits = np.asarray(bits)
    return np.where(bits >= 0, value >> np.maximum(bits, 0), value << np.maximum(-bits, 0))


def along_channel(n: NodeView, constants: Array) -> Array:
    """Per-channel constants [C] (or [1]) shaped to broadcast against the node's output."""
    if constants.size == 1:
        return constants.reshape(())
    axis = 1 if n.node.op == "conv2d" else len(n.out.shape) - 1
    return constants.reshape([-1 if i == axis else 1 for i in range(len(n.out.shape))])


def ratios(n: NodeView) -> Array:
    """float64 [C] or [1]: accumulator step over output step, ``s_x * s_w[c] / s_y``."""
    return np.float64(n.q(0).scale) * channel_scale(n.q(1)).reshape(-1) / np.float64(n.q(-1).scale)


def channel_scale(q: QParams) -> Array:
    """float64 scale per output channel; of block-wise weights, the scale that every block's is a multiple of."""
    scale = q.scale.astype(np.float64)
    return scale if q.block is None else scale.max(1) / LPBQ_STEPS


def expand_blocks(q: QParams, codes: Array) -> Array:
    """Block-wise 4-bit codes times their block's integer scale: plain codes at `channel_scale` (at most 112)."""
    if q.block is None:
        return codes
    steps = np.rint(q.scale / channel_scale(q)[:, None]).astype(np.int8)
    return codes * np.repeat(steps, q.block, axis=1)


def with_range(n: NodeView, **constants: Any) -> Constants:
    low, high = clamp_codes(n)
    return {**constants, "low": low, "high": high}


# ---------------------------------------------------------------------------------------------- dot products: Hexagon
#
# Found by probing the HTP emulator (QNN 2.49) with integers in and integers out; docs/numerics.md has the evidence.


def _ceil_log2(s: Array) -> Array:
    """Exact ceil(log2(s)), also at powers of two."""
    fraction, exponent = np.frexp(s)
    return np.where(fraction == 0.5, exponent - 1, exponent).astype(np.int64)


def _f32(value: Any) -> Any:
    return np.asarray(value, np.float32)


def htp_bias(n: NodeView, divisor: int) -> Constants:
    """The bias HTP really adds (divided by ``divisor``): a float32 round trip truncated toward zero; per-channel biases
    first become multiples of a common step, max|b| / 2**28."""
    if n.arity < 3 or (codes := n.data(2)) is None:
        return {}
    step = _f32(n.q(0).scale * _f32(channel_scale(n.q(1))).max())
    real = _f32(codes) * step
    largest = np.abs(real).max()
    if largest == 0:
        return {"bias": np.zeros(codes.shape, np.int64)}
    common = _f32(largest / np.float32(2.0**28))
    rounded = np.rint(real * _f32(np.float32(1) / common))
    return {"bias": np.trunc(_f32(rounded * common) / _f32(step * np.float32(divisor))).astype(np.int64)}


def htp_ratio(n: NodeView) -> Array:
    """float32 ((s_x * max s_w) / s_y) * (s_w / max s_w), as float64 [C] or [1]."""
    scales = _f32(channel_scale(n.q(1)).reshape(-1))
    widest = scales.max()
    tensor = _f32(_f32(n.q(0).scale * widest) / n.q(-1).scale)
    return _f32(tensor * _f32(scales / widest)).astype(np.float64)


def _derive_htp8(n: NodeView) -> Constants:
    s = htp_ratio(n)
    shift = -_ceil_log2(s) - 3
    return with_range(n, mult=np.floor(np.ldexp(s, shift + 15) + 0.5).astype(np.int64), shift=shift, **htp_bias(n, 1))


def _apply_htp8(n: NodeView, acc: Array) -> Array:
    """Hexagon v73-v81, 8-bit activations: ``((2h + 1) * mult + 2**15) >> 16`` with ``h = acc >> shift``."""
    h = shift_right(acc, along_channel(n, n.fixed["shift"]))
    return saturate(n, ((2 * h + 1) * along_channel(n, n.fixed["mult"]) + (1 << 15)) >> 16)


def _derive_htp8_dw2(n: NodeView) -> Constants:
    s = htp_ratio(n)
    shift = 15 - _ceil_log2(s)
    bias = np.zeros(s.shape, np.int64) if n.arity < 3 else np.asarray(n.data(2), np.int64)
    folded = _f32(_f32(bias) + _f32(n.q(-1).zero / s))
    offset = np.floor(folded.astype(np.float64) + 0.5).astype(np.int64) - bias
    return with_range(n, mult=np.rint(np.ldexp(s, shift)).astype(np.int64), shift=shift, offset=offset)


def _apply_htp8_dw2(n: NodeView, acc: Array) -> Array:
    """Depthwise convolution with stride 2 (another kernel): 15-bit multiplier, the zero point inside the accumulator."""
    mult, shift, offset = (along_channel(n, n.fixed[key]) for key in ("mult", "shift", "offset"))
    code = shift_right((acc + offset) * mult + (np.int64(1) << (shift - 1)), shift)
    return saturate(n, code - n.q(-1).zero)


def _derive_htp16(n: NodeView) -> Constants:
    s = 256 * htp_ratio(n)
    shift = -_ceil_log2(s) - 7
    mult = np.floor(np.ldexp(s, shift + 29) + 0.5).astype(np.int64)
    return with_range(n, mult=mult, shift=shift, **htp_bias(n, 256))


def _apply_htp16(n: NodeView, acc256: Array) -> Array:
    """Hexagon v73-v81, 16-bit activations; ``acc256`` is the accumulator at 1/256 (see `join_bytes`)."""
    h = shift_right(acc256, along_channel(n, n.fixed["shift"]))
    return saturate(n, ((2 * h + 1) * along_channel(n, n.fixed["mult"]) + (1 << 29)) >> 30)


def join_bytes(high: Array, low: Array, offset: Array) -> Array:
    """Byte-split dot product at 1/256: the low byte's partial sum is truncated, the zero point's share rounded half up."""
    return high + (low >> 8) - ((offset + 128) >> 8)


# --------------------------------------------------------------------------------------- element-wise, pooling: Hexagon


def _derive_htp_sum(n: NodeView) -> Constants:
    """Multipliers share the exponent that keeps their sum (of a subtraction: the larger) below 2**14 * 4095 / 4096."""
    inverse = _f32(np.float32(1) / n.q(-1).scale)
    m = [float(_f32(n.q(i).scale * inverse)) for i in (0, 1)]
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
    s = float(_f32(n.q(0).scale * _f32(np.float32(1) / n.q(-1).scale)))
    fraction, exponent = np.frexp(s)
    mult, k = int(np.rint(fraction * 2**15)), 6 if exponent <= 1 else 7 - int(exponent)
    fine = 15 - int(exponent) - k
    value = shift_right((np.arange(256) - n.zero(0)) * mult + ((1 << fine) >> 1 if fine > 0 else 0), fine)
    value = shift_right(value + ((1 << k) >> 1 if k > 0 else 0), k)
    low, high = clamp_codes(n)
    return {"table": np.clip(value + n.q(-1).zero, low, high).astype(np.uint8)}


# -------------------------------------------------------------------------------- dot products: ONNX Runtime, XNNPACK


def _derive_fp32(n: NodeView) -> Constants:
    mantissa, exponent = np.frexp(ratios(n).astype(np.float32))
    return with_range(n, mult=np.ldexp(mantissa, 24).astype(np.int64), shift=24 - exponent.astype(np.int64))


def _apply_fp32(n: NodeView, acc: Array) -> Array:
    """XNNPACK and ONNX Runtime: float32 scale (``mult * 2**-shift``), float32 product, half to even."""
    scale = np.ldexp(n.fixed["mult"].astype(np.float32), -n.fixed["shift"])
    product = acc.astype(np.float32) * along_channel(n, scale)
    return saturate(n, np.rint(product).astype(np.int64))


# --------------------------------------------------------------------------------------------- element-wise: XNNPACK


def _derive_xnnpack_sum(n: NodeView) -> Constants:
    """The larger ratio gets 21 bits (XNNPACK, qs8-vadd parameters)."""
    ratio = [_f32(n.q(i).scale / n.q(-1).scale) for i in (0, 1)]
    shift = 20 - (int(np.frexp(max(ratio))[1]) - 1)
    mult = [int(np.rint(np.ldexp(np.float64(r), shift))) for r in ratio]
    mult[1] = -mult[1] if n.node.op == "sub" else mult[1]
    return with_range(n, mult=np.array(mult), shift=shift)


def _apply_xnnpack_sum(n: NodeView, a: Array, b: Array) -> Array:
    left, right = n.fixed["mult"]
    total = left * (a.astype(np.int64) - n.zero(0)) + right * (b.astype(np.int64) - n.zero(1))
    return saturate(n, shift_right(total + (1 << (n.fixed["shift"] - 1)), n.fixed["shift"]))


def _float_scale(n: NodeView, scale: Any) -> Constants:
    mantissa, exponent = np.frexp(_f32(scale))
    return with_range(n, mult=int(np.ldexp(mantissa, 24)), shift=24 - int(exponent))


def _derive_fp32_mul(n: NodeView) -> Constants:
    return _float_scale(n, _f32(n.q(0).scale * n.q(1).scale) / n.q(-1).scale)


def _derive_fp32_mean(n: NodeView) -> Constants:
    count = int(np.prod(n["kernel"])) if "kernel" in n.attrs else n.type(0).size // n.out.size
    return _float_scale(n, _f32(n.q(0).scale / n.q(-1).scale) / np.float32(count))


def _apply_float_scale(n: NodeView, total: Array) -> Array:
    scale = np.ldexp(np.float32(n.fixed["mult"]), -n.fixed["shift"])
    return saturate(n, np.rint(total.astype(np.float32) * scale).astype(np.int64))


def _apply_fp32_mul(n: NodeView, a: Array, b: Array) -> Array:
    return _apply_float_scale(n, (a.astype(np.int64) - n.zero(0)) * (b.astype(np.int64) - n.zero(1)))


# ------------------------------------------------------------------------------------------- exact value, rounded once


def _derive_sum(n: NodeView) -> Constants:
    """Each operand's step over the output's, at 2**-40."""
    scales = [np.float64(n.q(i).scale) / np.float64(n.q(-1).scale) for i in range(n.arity)]
    return with_range(n, mult=np.rint(np.ldexp(np.array(scales), 40)).astype(np.int64))


def _apply_add(n: NodeView, *codes: Array) -> Array:
    """Sum of rescaled operands at 2**-40, rounded half up."""
    total = sum(m * (x.astype(np.int64) - n.zero(i)) for i, (m, x) in enumerate(zip(n.fixed["mult"], codes, strict=True)))
    return saturate(n, (total + (1 << 39)) >> 40)


def _apply_sub(n: NodeView, a: Array, b: Array) -> Array:
    left, right = n.fixed["mult"]
    total = left * (a.astype(np.int64) - n.zero(0)) - right * (b.astype(np.int64) - n.zero(1))
    return saturate(n, (total + (1 << 39)) >> 40)


def _derive_product(n: NodeView) -> Constants:
    s = np.float64(n.q(0).scale) * np.float64(n.q(1).scale) / np.float64(n.q(-1).scale)
    exponent = int(np.ceil(np.log2(s)))
    return with_range(n, mult=int(np.rint(np.ldexp(s, 24 - exponent))), shift=24 - exponent)


def _apply_product(n: NodeView, a: Array, b: Array) -> Array:
    product = (a.astype(np.int64) - n.zero(0)) * (b.astype(np.int64) - n.zero(1)) * n.fixed["mult"]
    return saturate(n, shift_right(product + (1 << (n.fixed["shift"] - 1) if n.fixed["shift"] > 0 else 0), n.fixed["shift"]))


def _derive_mean(n: NodeView) -> Constants:
    count = n.type(0).size // max(n.out.size, 1)
    if "kernel" in n.attrs:
        count = int(np.prod(n["kernel"]))
    s = np.float64(n.q(0).scale) / (np.float64(n.q(-1).scale) * count)
    exponent = int(np.ceil(np.log2(s)))
    return with_range(n, mult=int(np.rint(np.ldexp(s, 24 - exponent))), shift=24 - exponent, count=count)


def _apply_mean(n: NodeView, total: Array) -> Array:
    """``total`` is the sum of (code - zero point) over the pooled elements."""
    return saturate(n, shift_right(total * n.fixed["mult"] + (1 << (n.fixed["shift"] - 1) if n.fixed["shift"] > 0 else 0), n.fixed["shift"]))


def _derive_table(n: NodeView) -> Constants:
    """Every input code's output code: the function is known on all of its inputs."""
    from edgeforge.ir.op import OPS

    real = OPS[n.node.op].real
    assert real is not None, n.node.op
    q, out = n.q(0), n.q(-1)
    low, high = RANGE[n.type(0).dtype]
    x = (np.arange(low, high + 1) - q.zero) * np.float64(q.scale)
    code = np.rint(real(n, x) / np.float64(out.scale)) + out.zero
    low, high = clamp_codes(n)
    return {"table": np.clip(code, low, high).astype(np.uint16 if n.out.dtype == "u16" else np.uint8)}


def _apply_table(n: NodeView, x: Array) -> Array:
    return n.fixed["table"][x]


def _derive_requantize(n: NodeView) -> Constants:
    return _derive_table(n) if n.type(0).dtype in ("u8", "u16") else {}


def _derive_softmax(n: NodeView) -> Constants:
    """exp of every possible difference to the row's maximum, at 2**-30."""
    low, high = RANGE[n.type(0).dtype]
    steps = np.arange(high - low + 1) * np.float64(n.q(0).scale)
    return with_range(n, exp=np.rint(np.ldexp(np.exp(-steps), 30)).astype(np.int64))


def _apply_softmax(n: NodeView, x: Array) -> Array:
    x = x.astype(np.int64)
    numerator = n.fixed["exp"][x.max(n["axis"], keepdims=True) - x]
    total = numerator.sum(n["axis"], keepdims=True)
    return saturate(n, np.rint(numerator / (total * np.float64(n.q(-1).scale))).astype(np.int64))


def _derive_norm(n: NodeView) -> Constants:
    return with_range(n)


def _norm(n: NodeView, x: Array, w: Array, b: Array | None, center: bool, rounding: Callable[[Array], Array]) -> Array:
    """Normalization over the last axis. The sums are exact integers; division and square root are IEEE float64."""
    codes = x.astype(np.int64) - n.zero(0)
    size, scale = codes.shape[-1], np.float64(n.q(0).scale)
    if center:
        codes = size * codes - codes.sum(-1, keepdims=True)
        scale = scale / size
    mean_square = (codes.astype(np.float64) ** 2).sum(-1, keepdims=True) * scale**2 / size
    gain = (w.astype(np.int64) - n.zero(1)) * np.float64(n.q(1).scale)
    real = codes * scale / np.sqrt(mean_square + n["eps"]) * gain
    if b is not None:
        real = real + b.astype(np.int64) * np.float64(n.q(2).scale)
    return saturate(n, rounding(real / np.float64(n.q(-1).scale)).astype(np.int64))


def _apply_norm(n: NodeView, x: Array, w: Array, b: Array | None = None) -> Array:
    return _norm(n, x, w, b, n.node.op == "layer_norm", np.rint)


RULES = {
    rule.name: rule
    for rule in (
        Rule("htp8", _derive_htp8, _apply_htp8, "exact"),
        Rule("htp8_dw2", _derive_htp8_dw2, _apply_htp8_dw2, "exact"),
        Rule("htp16", _derive_htp16, _apply_htp16, "exact"),
        Rule("htp_sum", _derive_htp_sum, _apply_htp_sum, "exact"),
        Rule("htp_mean", _derive_htp_mean, _apply_mean, "exact"),
        Rule("htp_requantize", _derive_htp_requantize, _apply_table, "exact"),
        Rule("htp_table", _derive_table, _apply_table, "exact"),
        Rule("xnnpack_sum", _derive_xnnpack_sum, _apply_xnnpack_sum, "exact"),
        Rule("fp32_mul", _derive_fp32_mul, _apply_fp32_mul, "exact"),
        Rule("fp32_mean", _derive_fp32_mean, _apply_float_scale, "exact"),
        Rule("fp32", _derive_fp32, _apply_fp32, "exact"),
        Rule("add", _derive_sum, _apply_add, "bounded", "rounded exact value"),
        Rule("sub", _derive_sum, _apply_sub, "bounded", "rounded exact value"),
        Rule("mul", _derive_product, _apply_product, "bounded", "rounded exact value"),
        Rule("mean", _derive_mean, _apply_mean, "bounded", "rounded exact value"),
        Rule("table", _derive_table, _apply_table, "bounded", "rounded exact value"),
        Rule("softmax", _derive_softmax, _apply_softmax, "bounded", "rounded exact value"),
        Rule("norm", _derive_norm, _apply_norm, "bounded", "rounded exact value"),
    )
}

_EXACT_VALUE = {name: name for name in ("add", "sub", "mul", "mean", "table", "softmax", "norm")}

_HTP8 = {"dot": "htp8", "dot_dw2": "htp8_dw2", "add": "htp_sum", "sub": "htp_sum", "mean": "htp_mean"}
_HTP8 |= {"requantize": "htp_requantize", "table": "htp_table"}
_XNNPACK = {"dot": "fp32", "add": "xnnpack_sum", "sub": "xnnpack_sum", "mul": "fp32_mul", "mean": "fp32_mean"}

#: profile -> op family -> (rule at 8 bits, rule at 16 bits or of mixed widths).
PROFILES: dict[str, dict[str, tuple[str, str]]] = {}
for _profile, _narrow, _wide in (
    ("htp-v73", _HTP8, {"dot": "htp16"}),
    ("htp-v68", {"dot": "htp8"}, {"dot": "htp16"}),
    ("xnnpack", _XNNPACK, {"dot": "fp32"}),
    ("ort-cpu", {"dot": "fp32"}, {"dot": "fp32"}),
):
    _narrow = {**_EXACT_VALUE, **_narrow}
    _wide = {**_EXACT_VALUE, **_wide}
    PROFILES[_profile] = {f: (_narrow[f], _wide.get(f, _wide.get(f.split("_")[0], "table"))) for f in _narrow}


def rule_of(profile: str, family: str, n: NodeView) -> Rule:
    """The rule a runtime uses for a node of that op family."""
    table = PROFILES[profile]
    if n.node.op == "requantize" and "requantize" in table:
        family = "requantize"
    if n.node.op == "conv2d" and "dot_dw2" in table and n.type(0).dtype == "u8":
        depthwise = n["groups"] == n.shape(0)[1] == n.shape(1)[0] and n["groups"] > 1
        family = "dot_dw2" if depthwise and n["stride"] == (2, 2) else family
    narrow, wide = table[family]
    activations = {n.type(i).dtype for i in range(n.arity) if n.type(i).dtype in ("u8", "u16")} | {n.out.dtype}
    first_wide = n.type(0).dtype == "u16"
    return RULES[wide if (first_wide if family.startswith("dot") else activations != {"u8"}) else narrow]


# ------------------------------------------------------------------------------------------------ accumulator bounds


def dot_bound(weights: Array, bias: Array | None, low: int, high: int) -> int:
    """Largest |accumulator| any input in [low, high] (zero point already subtracted) can reach, from the actual
    weights [C, ...] and bias [C]."""
    w = weights.reshape(weights.shape[0], -1).astype(np.int64)
    positive, negative = np.maximum(w, 0).sum(1), np.minimum(w, 0).sum(1)
    b = np.zeros(len(w), np.int64) if bias is None else bias.astype(np.int64)
    return int(np.maximum(positive * high + negative * low + b, -(positive * low + negative * high + b)).max())
