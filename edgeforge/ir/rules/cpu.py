"""CPU runtimes that round with a float32 scale: XNNPACK and ONNX Runtime."""

from __future__ import annotations

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
from edgeforge.ir.rules.exact import EXACT_VALUE, Profile


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
    return _apply_float_scale(n, (a.astype(np.int64) - n.zero(0)) * (b.astype(np.int64) - n.zero(1)))


RULES = (
    Rule("fp32", _derive_fp32, _apply_fp32, "exact"),
    Rule("fp32_mul", _derive_fp32_mul, _apply_fp32_mul, "exact"),
    Rule("fp32_mean", _derive_fp32_mean, _apply_float_scale, "exact"),
    Rule("xnnpack_sum", _derive_xnnpack_sum, _apply_xnnpack_sum, "exact"),
)
_XNNPACK = {"dot": "fp32", "add": "xnnpack_sum", "sub": "xnnpack_sum", "mul": "fp32_mul", "mean": "fp32_mean"}
PROFILES: dict[str, Profile] = {
    "xnnpack": {"u8": {**EXACT_VALUE, **_XNNPACK}, "u16": {**EXACT_VALUE, "dot": "fp32"}},
    "ort-cpu": {"u8": {**EXACT_VALUE, "dot": "fp32"}, "u16": {**EXACT_VALUE, "dot": "fp32"}},
}
