"""Hexagon's rules for sums, products and changes of encoding, all generations alike (docs/numerics.md has the
evidence)."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.fixed import Array, Constants, Rule, clamp_codes, f32, saturate, shift_right, with_range
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import Profile
from edgeforge.ir.types import NUMPY, RANGE


def _broadcasts(n: NodeView) -> bool:
    """Whether an operand is repeated: HTP has other kernels for that."""
    return not n.type(0).size == n.type(1).size == n.out.size


def _wrap(value: int, bits: int) -> int:
    """``value`` as a register of ``bits`` bits holds it, two's complement."""
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def _multipliers(n: NodeView, limit: float, together: bool, most: int) -> tuple[int, int, int]:
    """Both operands' steps over the output's, float32 ``s_i * (1 / s_y)``, at 2**-exponent: the largest exponent
    (``most`` at the most) that keeps the larger one, or both ``together``, below ``limit``."""
    inverse = f32(np.float32(1) / n.q(-1).scale)
    ratios = [float(f32(n.q(i).scale * inverse)) for i in (0, 1)]
    reach, exponent = sum(ratios) if together else max(ratios), most
    while reach * 2.0**exponent >= limit:
        exponent -= 1
    left, right = (int(np.rint(ratio * 2.0**exponent)) for ratio in ratios)
    return left, -right if n.node.op == "sub" else right, exponent


def _derive_sum8(n: NodeView) -> Constants:
    """A constant of one element makes the node a table. Else the multipliers of an addition lie below
    2**14 * 4095 / 4096 together, and what the zero points add is a multiple of 256 in 16 bits: it wraps, or, where an
    operand is repeated, saturates before the half step is added."""
    table = _scalar_table(n)
    if table is not None:
        return table
    left, right, exponent = _multipliers(n, 16380, n.node.op == "add", 15)
    taken = (left * n.zero(0) + right * n.zero(1) + 128) >> 8
    offset = int(np.floor((2 * n.q(-1).zero + 1) * 2.0 ** (exponent - 9))) - taken
    half = int(2.0 ** (exponent - 9))
    offset = min(max(offset - half, -32768), 32767) + half if _broadcasts(n) else _wrap(offset, 16)
    return with_range(n, mult=np.array([left, right]), shift=exponent, offset=256 * offset)


def _derive_sum16(n: NodeView) -> Constants:
    """Multipliers in int16; what the zero points add is a multiple of 2, and its half wraps at 32 bits. A subtraction
    that repeats an operand adds the complement of b instead."""
    left, right, exponent = _multipliers(n, 32767.5, False, 16)
    complement = -65535 * right if n.node.op == "sub" and _broadcasts(n) else 0
    taken = (left * n.zero(0) + right * n.zero(1) + complement) >> 1
    offset = int(np.floor((2 * n.q(-1).zero + 1) * 2.0 ** (exponent - 2))) - taken
    return with_range(n, mult=np.array([left, right]), shift=exponent, offset=2 * _wrap(offset, 32) + complement)


def _scalar_table(n: NodeView) -> Constants | None:
    """With a constant of one element: the output code of each code of the other operand, rounded from the exact sum."""
    index = next((i for i in (0, 1) if n.type(i).size == 1 and n.data(i) is not None), None)
    if index is None:
        return None
    low, high = RANGE[n.type(1 - index).dtype]
    codes = [np.arange(low, high + 1), np.arange(low, high + 1)]
    codes[index] = n.data(index).reshape(-1).astype(np.int64)
    a, b = ((codes[i] - n.zero(i)) * np.float64(n.q(i).scale) for i in (0, 1))
    real = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[n.node.op](a, b)
    code = np.rint(real / np.float64(n.q(-1).scale)) + n.q(-1).zero
    return {"table": np.clip(code, *clamp_codes(n)).astype(NUMPY[n.out.dtype]), "operand": 1 - index}


def _derive_product8(n: NodeView) -> Constants:
    """A constant of one element makes the node a table. Else ratio float32 ``(s_a / s_y) * s_b``, a first rounding at
    2**-step of an output step (step 7 at most); the offset wraps at 16 bits."""
    table = _scalar_table(n)
    if table is not None:
        return table
    ratio = float(f32(f32(n.q(0).scale / n.q(-1).scale) * n.q(1).scale))
    step = min(7, -int(np.frexp(ratio)[1]))
    constants = _product_constants(n, int(np.rint(ratio * 2.0 ** (15 + step))), 15, step, 8)
    return {**constants, "offset": _wrap(constants["offset"], 16)}


def _derive_product16(n: NodeView) -> Constants:
    """Ratio float32 ``(s_a * s_b) / s_y`` at 2**-34, a first rounding at 1/8 of an output step."""
    ratio = float(f32(f32(n.q(0).scale * n.q(1).scale) / n.q(-1).scale))
    return _product_constants(n, int(np.rint(min(ratio * 2.0**34, 2.0**44))), 31, 3, 0)


def _product_constants(n: NodeView, mult: int, shift: int, step: int, unit: int) -> Constants:
    """``taken``: 2ab + a + b of the zero points a, b around mid-range, a multiple of 2**unit, is taken from the product
    before the multiplication and added, multiplied by itself, after it."""
    middle = (RANGE[n.type(0).dtype][1] + 1) // 2
    a, b = n.zero(0) - middle, n.zero(1) - middle
    taken = (2 * a * b + a + b + ((1 << unit) >> 1 if unit else 0)) >> unit << unit
    offset = ((mult * taken + (1 << shift - 1)) >> shift) + int(n.q(-1).zero * 2.0**step)
    return with_range(n, mult=mult, shift=shift, step=step, taken=taken, offset=offset)


def _apply_product(n: NodeView, a: Array, b: Array) -> Array:
    """``(((product - taken) * mult + half) >> shift) + offset``, rounded half up at 2**step; or a table."""
    if "table" in n.fixed:
        return _look_up(n, a, b)
    mult, shift, step = (n.fixed[key] for key in ("mult", "shift", "step"))
    product = (a.astype(np.int64) - n.zero(0)) * (b.astype(np.int64) - n.zero(1)) - n.fixed["taken"]
    # In two parts: a 16-bit product times its multiplier takes up to 66 bits.
    low = ((product & 0xFFFF) * mult + (1 << shift - 1)) >> 15
    fine = (((product >> 16) * mult << 1) + low) >> (shift - 15)
    half = (1 << step) >> 1 if step > 0 else 0
    return saturate(n, shift_right(fine + n.fixed["offset"] + half, step) - n.q(-1).zero)


def _look_up(n: NodeView, a: Array, b: Array) -> Array:
    return np.broadcast_to(n.fixed["table"][(a, b)[n.fixed["operand"]]], np.broadcast_shapes(a.shape, b.shape))


def _apply_sum(n: NodeView, a: Array, b: Array) -> Array:
    """``(left * a + right * b + offset) >> shift``, or a table."""
    if "table" in n.fixed:
        return _look_up(n, a, b)
    left, right = n.fixed["mult"]
    total = left * a.astype(np.int64) + right * b.astype(np.int64) + n.fixed["offset"]
    return saturate(n, shift_right(total, n.fixed["shift"]) - n.q(-1).zero)


RULES = (
    Rule("htp_sum", _derive_sum8, _apply_sum, "exact"),
    Rule("htp_sum16", _derive_sum16, _apply_sum, "exact"),
    Rule("htp_product", _derive_product8, _apply_product, "exact"),
    Rule("htp_product16", _derive_product16, _apply_product, "exact", "exact where s_a * s_b / s_y < 1/8"),
)
PROFILES: dict[str, Profile] = {}
