"""Fixed point: what the rounding rules of every runtime are made of.

A *rule* is the integer arithmetic of one op family on one runtime. It has two halves: ``derive`` turns the encodings
around a node into integer constants (stored in the node's attributes: the graph is the complete contract), ``apply``
computes codes from codes with nothing but those constants. The rules stand in `edgeforge.ir.rules`, one file per
runtime; nothing else shifts or overflows.

All ``apply`` arithmetic is int64 (proved not to overflow by `verify`), or IEEE float32/float64 operations that are
rounded once and therefore reproducible on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import CONVOLUTIONS
from edgeforge.ir.types import RANGE, QParams

Array = np.ndarray
Constants = dict[str, Any]

#: Block scales of LPBQ weights are 1..16 times the channel's.
LPBQ_STEPS = 16
#: By how much a block's scale may exceed a multiple that is still rounded down: the error of float32 at 16.
LPBQ_SLACK = 1e-5


@dataclass(frozen=True)
class Rule:
    """``status`` is "exact" (every integer equals the runtime's in the conformance runs), "bounded" (differs by what
    ``note`` says) or "unverified". ``bytewise``: ``apply`` takes the sums of a dot product at 1/256, joined
    from those of the high and the low byte of a 16-bit operand."""

    name: str
    derive: Callable[[NodeView], Constants]
    apply: Callable[..., Array]
    status: str
    note: str = ""
    bytewise: bool = False


# ---------------------------------------------------------------------------------------------------------- helpers


def clamp_codes(n: NodeView) -> tuple[int, int]:
    """Lowest and highest output code: the dtype's range, narrowed by a fused activation (attribute ``clamp``)."""
    return limit_codes(n, n["clamp"]) if "clamp" in n.attrs else RANGE[n.out.dtype]


def limit_codes(n: NodeView, limits: tuple[float, float]) -> tuple[int, int]:
    """The output codes of real limits, within the dtype's range."""
    q, (lowest, highest) = n.q(-1), RANGE[n.out.dtype]
    steps = (np.rint(np.clip(np.float64(x) / np.float64(q.scale), -(2.0**31), 2.0**31)) for x in limits)
    low, high = (min(max(int(step) + q.zero, lowest), highest) for step in steps)
    return low, high


def saturate(n: NodeView, code: Array) -> Array:
    """Add the zero point, clamp to the fused activation and store in the output's dtype."""
    return np.clip(code + n.q(-1).zero, n.fixed["low"], n.fixed["high"]).astype(
        np.uint16 if n.out.dtype == "u16" else np.uint8
    )


def shift_right(value: Array, bits: Array | int) -> Array:
    """Arithmetic shift right (floor); a negative count shifts left."""
    bits = np.asarray(bits)
    return np.where(bits >= 0, value >> np.maximum(bits, 0), value << np.maximum(-bits, 0))


def along_channel(n: NodeView, constants: Array) -> Array:
    """Per-channel constants [C] (or [1]) shaped to broadcast against the node's output."""
    if constants.size == 1:
        return constants.reshape(())
    axis = 1 if n.node.op in CONVOLUTIONS else len(n.out.shape) - 1
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


def f32(value: Any) -> Any:
    """``value`` rounded to float32, as an array."""
    return np.asarray(value, np.float32)


def ceil_log2(s: Array) -> Array:
    """Exact ceil(log2(s)) as int64, also at powers of two."""
    fraction, exponent = np.frexp(s)
    return np.where(fraction == 0.5, exponent - 1, exponent).astype(np.int64)


def signed_sums(weights: Array) -> tuple[Array, Array]:
    """int64 [C]: the sums of the positive and of the negative weights [C, ...]."""
    w = weights.reshape(weights.shape[0], -1)
    total, size = w.sum(1, dtype=np.int64), np.abs(w).sum(1, dtype=np.int64)
    return (size + total) // 2, (total - size) // 2


def dot_bound(sums: tuple[Array, Array], bias: Array | None, low: int, high: int) -> int:
    """Largest |accumulator| any input in [low, high] (zero point already subtracted) can reach, from the actual
    weights (their `signed_sums`) and bias [C]."""
    positive, negative = sums
    b = np.zeros(len(positive), np.int64) if bias is None else bias.astype(np.int64)
    return int(np.maximum(positive * high + negative * low + b, -(positive * low + negative * high + b)).max())
