"""The exact value, rounded once: what a runtime's rule is compared with, and stands in for one that is not known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeforge.ir.fixed import (
    Array,
    Constants,
    Rule,
    clamp_codes,
    saturate,
    shift_right,
    with_range,
)
from edgeforge.ir.graph import NodeView
from edgeforge.ir.types import RANGE


def _derive_sum(n: NodeView) -> Constants:
    """Each operand's step over the output's, at 2**-40."""
    scales = [np.float64(n.q(i).scale) / np.float64(n.q(-1).scale) for i in range(n.arity)]
    return with_range(n, mult=np.rint(np.ldexp(np.array(scales), 40)).astype(np.int64))


def _apply_add(n: NodeView, *codes: Array) -> Array:
    """Sum of rescaled operands at 2**-40, rounded half up."""
    total = sum(
        m * (x.astype(np.int64) - n.zero(i)) for i, (m, x) in enumerate(zip(n.fixed["mult"], codes, strict=True))
    )
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
    return saturate(
        n, shift_right(product + (1 << (n.fixed["shift"] - 1) if n.fixed["shift"] > 0 else 0), n.fixed["shift"])
    )


def _derive_mean(n: NodeView) -> Constants:
    count = n.type(0).size // max(n.out.size, 1)
    if "kernel" in n.attrs:
        count = int(np.prod(n["kernel"]))
    s = np.float64(n.q(0).scale) / (np.float64(n.q(-1).scale) * count)
    exponent = int(np.ceil(np.log2(s)))
    return with_range(n, mult=int(np.rint(np.ldexp(s, 24 - exponent))), shift=24 - exponent, count=count)


def apply_mean(n: NodeView, total: Array) -> Array:
    """``total`` is the sum of (code - zero point) over the pooled elements."""
    return saturate(
        n,
        shift_right(
            total * n.fixed["mult"] + (1 << (n.fixed["shift"] - 1) if n.fixed["shift"] > 0 else 0), n.fixed["shift"]
        ),
    )


def derive_table(n: NodeView) -> Constants:
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


def apply_table(n: NodeView, x: Array) -> Array:
    return n.fixed["table"][x]


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


def normalized(n: NodeView, x: Array, center: bool) -> Array:
    """float64, over the last axis. The sums are exact integers; division and square root are IEEE float64."""
    codes = x.astype(np.int64) - n.zero(0)
    size, scale = codes.shape[-1], np.float64(n.q(0).scale)
    if center:
        codes = size * codes - codes.sum(-1, keepdims=True)
        scale = scale / size
    mean_square = (codes.astype(np.float64) ** 2).sum(-1, keepdims=True) * scale**2 / size
    return codes * scale / np.sqrt(mean_square + n["eps"])


def _norm(n: NodeView, x: Array, w: Array, b: Array | None, center: bool, rounding: Callable[[Array], Array]) -> Array:
    real = normalized(n, x, center) * ((w.astype(np.int64) - n.zero(1)) * np.float64(n.q(1).scale))
    if b is not None:
        real = real + b.astype(np.int64) * np.float64(n.q(2).scale)
    return saturate(n, rounding(real / np.float64(n.q(-1).scale)).astype(np.int64))


def _apply_norm(n: NodeView, x: Array, w: Array, b: Array | None = None) -> Array:
    return _norm(n, x, w, b, n.node.op == "layer_norm", np.rint)


#: width of the activations ("u8"; "u16" where one of them is) -> op or family -> rule.
Profile = dict[str, dict[str, str]]

#: The rounded exact value, for families whose rule on a runtime is not known.
EXACT_VALUE = {name: name for name in ("add", "sub", "mul", "mean", "table", "softmax", "norm", "resize")}

NOTE = "rounded exact value"
RULES = (
    Rule("add", _derive_sum, _apply_add, "bounded", NOTE),
    Rule("sub", _derive_sum, _apply_sub, "bounded", NOTE),
    Rule("mul", _derive_product, _apply_product, "bounded", NOTE),
    Rule("mean", _derive_mean, apply_mean, "bounded", NOTE),
    Rule("table", derive_table, apply_table, "bounded", NOTE),
    Rule("softmax", _derive_softmax, _apply_softmax, "bounded", NOTE),
    Rule("norm", _derive_norm, _apply_norm, "bounded", NOTE),
)
PROFILES: dict[str, Profile] = {}
