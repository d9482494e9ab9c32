"""CPU runtimes that round with a float32 scale: XNNPACK and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from edgeforge.ir.fixed import (
    Array,
    Constants,
    Rule,
    along_channel,
    channel_scale,
    f32,
    saturate,
    shift_right,
    with_range,
)
from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import OPS
from edgeforge.ir.rules.exact import EXACT_VALUE, Profile, apply_table
from edgeforge.ir.rules.resize import Taps, mixed, no_constants
from edgeforge.ir.types import RANGE


def _derive_fp32(n: NodeView) -> Constants:
    """Both runtimes multiply and divide the scales in float32, in this order."""
    ratio = f32(n.q(0).scale * f32(channel_scale(n.q(1)).reshape(-1))) / n.q(-1).scale
    mantissa, exponent = np.frexp(f32(ratio))
    return with_range(n, mult=np.ldexp(mantissa, 24).astype(np.int64), shift=24 - exponent.astype(np.int64))


def _apply_fp32(n: NodeView, acc: Array) -> Array:
    """XNNPACK and ONNX Runtime: float32 scale (``mult * 2**-shift``), float32 product, half to even."""
    scale = np.ldexp(n.fixed["mult"].astype(np.float32), -n.fixed["shift"])
    product = acc.astype(np.float32) * along_channel(n, scale)
    return saturate(n, np.rint(product).astype(np.int64))


def _derive_xnnpack_sum(n: NodeView) -> Constants:
    """The larger ratio gets 21 bits (XNNPACK, qs8-vadd parameters)."""
    ratio = [f32(n.q(i).scale / n.q(-1).scale) for i in (0, 1)]
    shift = 20 - (int(np.frexp(max(ratio))[1]) - 1)
    mult = [int(np.rint(np.ldexp(np.float64(r), shift))) for r in ratio]
    mult[1] = -mult[1] if n.node.op == "sub" else mult[1]
    return with_range(n, mult=np.array(mult), shift=shift)


def _apply_xnnpack_sum(n: NodeView, a: Array, b: Array) -> Array:
    """Integer where nothing follows; an activation behind it keeps the sum in float32."""
    if "clamp" in n.attrs:
        return _by_inverse(n, _real_binary(n, a, b))
    left, right = n.fixed["mult"]
    total = left * (a.astype(np.int64) - n.zero(0)) + right * (b.astype(np.int64) - n.zero(1))
    return saturate(n, shift_right(total + (1 << (n.fixed["shift"] - 1)), n.fixed["shift"]))


def _float_scale(n: NodeView, scale: Any) -> Constants:
    mantissa, exponent = np.frexp(f32(scale))
    return with_range(n, mult=int(np.ldexp(mantissa, 24)), shift=24 - int(exponent))


def _derive_fp32_mul(n: NodeView) -> Constants:
    return _float_scale(n, f32(n.q(0).scale * n.q(1).scale) / n.q(-1).scale)


def _derive_fp32_mean(n: NodeView) -> Constants:
    count = int(np.prod(n["kernel"])) if "kernel" in n.attrs else n.type(0).size // n.out.size
    return _float_scale(n, f32(n.q(0).scale / n.q(-1).scale) / np.float32(count))


def _apply_float_scale(n: NodeView, total: Array) -> Array:
    scale = np.ldexp(np.float32(n.fixed["mult"]), -n.fixed["shift"])
    return saturate(n, np.rint(total.astype(np.float32) * scale).astype(np.int64))


def _apply_fp32_mul(n: NodeView, a: Array, b: Array) -> Array:
    if "clamp" in n.attrs:
        return _by_inverse(n, _real_binary(n, a, b))
    return _apply_float_scale(n, (a.astype(np.int64) - n.zero(0)) * (b.astype(np.int64) - n.zero(1)))


# ------------------------------------------------------------------------------- float operations between two roundings


def _real(n: NodeView, index: int, codes: Array) -> Array:
    """DequantizeLinear: float32, the product rounded once."""
    return (codes.astype(np.int64) - n.zero(index)).astype(np.float32) * n.q(index).scale


def _by_division(n: NodeView, real: Array) -> Array:
    """QuantizeLinear of ONNX Runtime: float32 quotient, half to even."""
    return saturate(n, _rounded(real / n.q(-1).scale))


def _by_inverse(n: NodeView, real: Array) -> Array:
    """XNNPACK's conversion to integers: float32 product with the inverse of the scale, half to even."""
    return saturate(n, _rounded(real * (np.float32(1) / n.q(-1).scale)))


def _rounded(steps: Array) -> Array:
    return np.clip(np.rint(steps), -(2.0**24), 2.0**24).astype(np.int64)


def _real_binary(n: NodeView, a: Array, b: Array) -> Array:
    x, y = _real(n, 0, a), _real(n, 1, b)
    return x + y if n.node.op == "add" else x - y if n.node.op == "sub" else x * y


def _derive_float_table(quantize: Callable[[NodeView, Array], Array]) -> Callable[[NodeView], Constants]:
    """Every input code's output code: float32 in, the function's value rounded to float32, then ``quantize``."""

    def derive(n: NodeView) -> Constants:
        real = OPS[n.node.op].real
        assert real is not None, n.node.op
        low, high = RANGE[n.type(0).dtype]
        x = _real(n, 0, np.arange(low, high + 1))
        bounded = NodeView(n.graph, replace(n.node, fixed=with_range(n)))
        return {"table": quantize(bounded, f32(real(n, x.astype(np.float64))))}

    return derive


# ------------------------------------------------------------------------------------- ONNX Runtime's integer kernels


def _fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c, rounded once (the float64 product of an 8-bit and a 24-bit number is exact)."""
    return f32(a.astype(np.float64) * np.float64(b) + c)


def _apply_ort_add(n: NodeView, a: Array, b: Array) -> Array:
    """QLinearAdd with AVX2: two fused multiply-adds on uncentered codes; an operand that is constant along the last
    axis comes first."""
    ratio = [f32(n.q(i).scale / n.q(-1).scale) for i in (0, 1)]
    taken = f32(ratio[0] * np.float32(n.zero(0))) + f32(ratio[1] * np.float32(n.zero(1)))
    fixed = np.float32(n.q(-1).zero) - taken
    first, second = ((b, ratio[1]), (a, ratio[0]))
    if a.shape[-1:] in ((), (1,)) and b.shape[-1:] > (1,):
        first, second = second, first
    inner = _fma(first[0], first[1], fixed)
    return saturate(n, _rounded(_fma(second[0], second[1], inner)) - n.q(-1).zero)


def _apply_ort_mul(n: NodeView, a: Array, b: Array) -> Array:
    """QLinearMul: float32 product with the ratio, the zero point added before rounding half to even."""
    ratio = f32(f32(n.q(0).scale * n.q(1).scale) / n.q(-1).scale)
    product = (a.astype(np.int64) - n.zero(0)) * (b.astype(np.int64) - n.zero(1))
    zero = n.q(-1).zero
    return saturate(n, _rounded(product.astype(np.float32) * ratio + np.float32(zero)) - zero)


def _derive_ort_softmax(n: NodeView) -> Constants:
    """QLinearSoftmax: float32 exponentials of (code - 255), lifted so that a row's sum stays far below overflow; the
    inverse of the output scale is cut to an integer."""
    size, scale = n.shape(0)[n["axis"]], np.float64(n.q(0).scale)
    lift = max(0.0, float(np.log(np.finfo(np.float32).max / np.float32(size))) - 5) / scale
    table = f32(np.exp((np.arange(256) - 255 + lift) * scale))
    return with_range(n, exp=table, steps=int(np.floor(np.float32(1) / n.q(-1).scale)))


def _apply_ort_softmax(n: NodeView, x: Array) -> Array:
    axis = n["axis"]
    power = n.fixed["exp"][255 - x.max(axis, keepdims=True).astype(np.int64) + x]
    # Summed one by one, in float32.
    total = np.take(np.add.accumulate(power, axis, dtype=np.float32), [-1], axis)
    return saturate(n, _rounded(power * np.float32(n.fixed["steps"]) / total))


def _derive_ort_mean(n: NodeView) -> Constants:
    """QLinearGlobalAveragePool: float32 s_x / (s_y * count). Other means are float32 operations."""
    count = n.type(0).size // n.out.size
    return _float_scale(n, n.q(0).scale / f32(n.q(-1).scale * np.float32(count)))


def _apply_ort_mean(n: NodeView, total: Array) -> Array:
    if n["axes"] == (2, 3) and n["keepdims"]:
        return _apply_float_scale(n, total)
    return _apply_mean_of_floats(n, total)


def _apply_mean_of_floats(n: NodeView, total: Array) -> Array:
    """As if the float32 sum were exact; the order in which it is taken is the runtime's affair."""
    count = int(np.prod(n["kernel"])) if "kernel" in n.attrs else n.type(0).size // n.out.size
    return _by_division(n, f32(total * np.float64(n.q(0).scale)) / np.float32(count))


def _apply_float_binary(n: NodeView, a: Array, b: Array) -> Array:
    return _by_division(n, _real_binary(n, a, b))


def _apply_float_resize(n: NodeView, x: Array, rows: Taps, columns: Taps) -> Array:
    """The mean of real values, as if float32 were exact."""
    unit = rows[3] * columns[3]
    total = mixed(mixed(x.astype(np.int64) - n.zero(0), 2, rows), 3, columns)
    return (np.rint(total / unit).astype(np.int64) + n.zero(0)).astype(x.dtype)


FLOAT = "float32 kernel: sums and functions differ in their last bit, so a tie can fall either way"
RULES = (
    Rule("fp32", _derive_fp32, _apply_fp32, "exact"),
    Rule("fp32_mul", _derive_fp32_mul, _apply_fp32_mul, "exact"),
    Rule("fp32_mean", _derive_fp32_mean, _apply_float_scale, "exact"),
    Rule("xnnpack_sum", _derive_xnnpack_sum, _apply_xnnpack_sum, "exact"),
    Rule("ort_add", with_range, _apply_ort_add, "exact"),
    Rule("ort_mul", with_range, _apply_ort_mul, "exact"),
    Rule("ort_float", with_range, _apply_float_binary, "exact"),
    Rule("ort_softmax", _derive_ort_softmax, _apply_ort_softmax, "bounded", FLOAT),
    Rule("ort_mean", _derive_ort_mean, _apply_ort_mean, "bounded", FLOAT),
    Rule("ort_float_mean", with_range, _apply_mean_of_floats, "bounded", FLOAT),
    Rule("float_resize", no_constants, _apply_float_resize, "bounded", FLOAT),
    Rule("ort_float_dot", _derive_fp32, _apply_fp32, "bounded", FLOAT),
    Rule("ort_float_table", _derive_float_table(_by_division), apply_table, "bounded", FLOAT),
    Rule("ort_table", _derive_float_table(_by_division), apply_table, "exact"),
    Rule("xnnpack_table", _derive_float_table(_by_inverse), apply_table, "exact"),
)
_XNNPACK = {
    "dot": "fp32",
    "add": "xnnpack_sum",
    "sub": "xnnpack_sum",
    "mul": "fp32_mul",
    "mean": "fp32_mean",
    "resize": "float_resize",
    "table": "xnnpack_table",
}
#: Functions that are one correctly rounded float32 operation.
_ROUNDED_ONCE = ("clip", "neg", "reciprocal", "relu", "requantize", "sqrt")
_ORT = {
    **EXACT_VALUE,
    "dot": "ort_float_dot",
    "add": "ort_float",
    "sub": "ort_float",
    "mul": "ort_float",
    "mean": "ort_float_mean",
    "resize": "float_resize",
    "table": "ort_float_table",
    **{op: "ort_table" for op in _ROUNDED_ONCE},
}
_ORT8 = {
    "dot": "fp32",
    "dot_i4": "ort_float_dot",
    "conv_transpose2d": "ort_float_dot",
    "add": "ort_add",
    "mul": "ort_mul",
    "reduce_mean": "ort_mean",
    "softmax": "ort_softmax",
    "table": "ort_table",
    "hardswish": "ort_float_table",
    # Alone exact; between two others ONNX Runtime merges the two encodings into one.
    "requantize": "ort_float_table",
}
PROFILES: dict[str, Profile] = {
    "xnnpack": {"u8": {**EXACT_VALUE, **_XNNPACK}, "u16": {**EXACT_VALUE, "dot": "fp32"}},
    "ort-cpu": {"u8": {**_ORT, **_ORT8}, "u16": _ORT},
}
