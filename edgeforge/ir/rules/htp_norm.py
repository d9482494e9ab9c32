"""Hexagon's softmax and norms, v73-v81: rules found by probing the HTP emulator (QNN 2.49) with integers in and integers
out. docs/numerics-norm.md has the evidence."""

from __future__ import annotations

import numpy as np

from edgeforge.ir import qfloat
from edgeforge.ir.fixed import Array, Constants, Rule, f32, saturate, with_range
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import Profile


def _derive_rms_norm(n: NodeView) -> Constants:
    """gain: float32 ((w - zero) * s_w) / s_y; eps: in squared input codes."""
    codes = n.data(1)
    assert codes is not None
    gain = f32(f32(f32(codes.astype(np.int64) - n.zero(1)) * n.q(1).scale) / n.q(-1).scale)
    return with_range(n, gain=gain, eps=f32(f32(n["eps"]) / f32(n.q(0).scale * n.q(0).scale)))


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
    codes = x.astype(np.int64) - n.zero(0)
    inverse = qfloat.rsqrt(qfloat.add(mean_of_squares(codes), n.fixed["eps"]))
    return qfloat.multiply(qfloat.multiply(n.fixed["gain"], inverse), f32(codes))


def _apply_rms_norm16(n: NodeView, x: Array, w: Array) -> Array:
    """``floor((gain * rsqrt(mean(c^2) + eps)) * c)`` in vector float, then the zero point."""
    return saturate(n, qfloat.floor(_scaled(n, x)))


def _apply_rms_norm8(n: NodeView, x: Array, w: Array) -> Array:
    """As with 16 bits, but the zero point is added in vector float and the sum rounded to half precision before the
    floor. A sum that is not positive saturates."""
    scaled, zero = _scaled(n, x), f32(n.q(-1).zero)
    positive = np.where(scaled > -zero, scaled, -zero)
    half = np.float16(np.minimum(qfloat.add(positive, zero), 256))
    return saturate(n, np.floor(half).astype(np.int64) - n.q(-1).zero)


RULES = (
    Rule("htp_rms_norm8", _derive_rms_norm, _apply_rms_norm8, "exact"),
    Rule("htp_rms_norm16", _derive_rms_norm, _apply_rms_norm16, "exact"),
)
PROFILES: dict[str, Profile] = {}

#: What Hexagon's profiles say about these ops.
NORMS: Profile = {"u8": {"rms_norm": "htp_rms_norm8"}, "u16": {"rms_norm": "htp_rms_norm16"}}
