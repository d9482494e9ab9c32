"""Element-wise functions on Hexagon: the closed rules, and tables that were measured. docs/numerics.md has the
evidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeforge.ir.fixed import Array, Constants, Rule, clamp_codes, f32
from edgeforge.ir.graph import Node, NodeView
from edgeforge.ir.op import OPS
from edgeforge.ir.rules.exact import Profile, apply_table
from edgeforge.ir.types import NUMPY, RANGE


def _derive_affine16(n: NodeView) -> Constants:
    """``mult``: the ratio of the scales at 2**-18. ``offset``: what the zero points and the half step add, a multiple
    of 2**15 (neg: of a float32 product and difference). ``lane``: added at even places of the tensor."""
    neg, zero = n.node.op == "neg", n.q(-1).zero
    sign = -1 if neg else 1
    mult = int(np.rint(np.float64(f32(n.q(0).scale / n.q(-1).scale)) * 2.0**18))
    taken = np.float64(sign * n.zero(0)) * (mult / 2.0**15)
    eighths = int(np.rint(f32(f32(8 * zero + 4) - f32(taken)) if neg else 8 * zero + 4 - taken))
    limits = {"relu": (0.0, np.inf), "clip": (n.attrs.get("low_real"), n.attrs.get("high_real"))}
    attrs = {} if neg else {"clamp": limits[n.node.op]}
    low, high = clamp_codes(NodeView(n.graph, replace(n.node, attrs=attrs)))
    lane = 1 << 14 if neg else 0
    return {"mult": sign * mult, "offset": eighths << 15, "lane": lane, "low": low, "high": high}


def _apply_affine16(n: NodeView, x: Array) -> Array:
    """``(mult * x + offset + lane) >> 18``. Where even and odd lanes of a vector round apart, a code depends on whether
    it stands at an even place of its tensor."""
    flat = x.reshape(-1, n.out.size).astype(np.int64)
    lane = np.where(np.arange(n.out.size) % 2, 0, n.fixed["lane"])
    code = (n.fixed["mult"] * flat + n.fixed["offset"] + lane) >> 18
    return np.clip(code, n.fixed["low"], n.fixed["high"]).astype(np.uint16).reshape(x.shape)


def _derive_table(n: NodeView) -> Constants:
    """The function of every input code, scaled and moved to the output's codes in float32. GELU is always the erf form,
    whichever was asked for."""
    node = replace(n.node, attrs={"approximate": "none"}) if n.node.op == "gelu" else n.node
    real = OPS[node.op].real
    assert real is not None, node.op
    low, high = RANGE[n.type(0).dtype]
    x = f32(np.arange(low, high + 1) - n.zero(0)) * n.q(0).scale
    y = f32(real(NodeView(n.graph, node), x)) * f32(np.float32(1) / n.q(-1).scale)
    return {"table": np.clip(np.rint(y + f32(n.q(-1).zero)), *clamp_codes(n)).astype(NUMPY[n.out.dtype])}


# --------------------------------------------------------------------------------------------------- measured tables

MEASURED = "htp_measured"


def measured_node(node: Node, table: Array, profile: str) -> Node:
    """``node`` with its output code for every input code, as the runtime that ``profile`` describes gave them."""
    return replace(node, rule=MEASURED, fixed={"table": table, "profile": profile})


def _derive_measured(n: NodeView) -> Constants:
    """A measurement follows from nothing: it is what the node holds."""
    return dict(n.fixed)


RULES = (
    Rule("htp_affine16", _derive_affine16, _apply_affine16, "exact", "neg: places are counted in the order of memory"),
    Rule("htp_clip16", _derive_affine16, _apply_affine16, "bounded", "a relu directly behind it lifts its upper limit"),
    Rule("htp_table", _derive_table, apply_table, "exact"),
    Rule(MEASURED, _derive_measured, apply_table, "exact", "(table measured from the HTP emulator)"),
)
_FUNCTIONS: Profile = {
    "u8": dict.fromkeys(("hardsigmoid", "neg", "reciprocal", "rsqrt", "sigmoid", "sqrt", "tanh"), "table"),
    "u16": {"clip": "htp_clip16", "neg": "htp_affine16", "relu": "htp_affine16"},
}
PROFILES: dict[str, Profile] = {"htp-v73": _FUNCTIONS, "htp-v68": _FUNCTIONS}
