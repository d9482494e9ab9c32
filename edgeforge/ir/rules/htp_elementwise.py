"""Hexagon's rules for sums, products and changes of encoding, all generations alike (docs/numerics.md has the
evidence)."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.fixed import Array, Constants, Rule, ceil_log2, clamp_codes, f32, saturate, shift_right, with_range
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import Profile, apply_table
from edgeforge.ir.types import RANGE


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
    """With a constant of one element, HTP looks the output code of the other operand up: rounded from the exact value,
    but a product with a positive constant is a change of encoding, and a sum with 0 keeps the codes as they are."""
    index = next((i for i in (0, 1) if n.type(i).size == 1 and n.data(i) is not None), None)
    if index is None:
        return None
    scales, out = [np.float64(n.q(i).scale) for i in (0, 1)], n.q(-1)
    codes = [np.arange(256), np.arange(256)]
    codes[index] = np.asarray(n.data(index)).reshape(-1).astype(np.int64)
    a, b = ((codes[i] - n.zero(i)) * scales[i] for i in (0, 1))
    factor = f32((a, b)[index].item())
    if n.node.op == "add" and factor == 0:
        code = np.arange(256) - out.zero
    elif n.node.op == "mul" and factor > 0:
        scale = f32(n.q(1 - index).scale * factor)
        code = _requantize8(codes[1 - index] - n.zero(1 - index), float(f32(scale * f32(np.float32(1) / out.scale))))
    else:
        real = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[n.node.op](a, b)
        code = np.rint(real / np.float64(out.scale))
    return {"table": np.clip(code + out.zero, *clamp_codes(n)).astype(np.uint8), "operand": 1 - index}


def _requantize8(x: Array, ratio: float) -> Array:
    """15-bit multiplier, a first rounding at 2**-k of an output step, a second at the step; from 16 on, one rounding
    and a multiplier at 1/256."""
    if ratio >= 16:
        return (x * int(np.rint(ratio * 256)) + 128) >> 8
    fraction, exponent = np.frexp(ratio)
    mult, k = int(np.rint(fraction * 2**15)), 6 if exponent <= 1 else 7 - int(exponent)
    fine = 15 - int(exponent) - k
    return (shift_right(x * mult + (1 << fine - 1), fine) + (1 << k - 1)) >> k


def _derive_requantize(n: NodeView) -> Constants:
    """A table of 8-bit codes."""
    inverse = f32(np.float32(1) / n.q(-1).scale)
    code = _requantize8(np.arange(256) - n.zero(0), float(f32(n.q(0).scale * inverse)))
    return {"table": np.clip(code + n.q(-1).zero, *clamp_codes(n)).astype(np.uint8)}


def _derive_widen(n: NodeView) -> Constants:
    """A table of 16-bit codes: 16-bit multiplier, one rounding."""
    ratio = float(f32(n.q(0).scale / n.q(-1).scale))
    shift = 16 - int(np.frexp(ratio)[1])
    product = (np.arange(256) - n.zero(0)) * int(np.rint(np.ldexp(ratio, shift)))
    code = shift_right(product + ((1 << shift) >> 1 if shift > 0 else 0), shift) + n.q(-1).zero
    return {"table": np.clip(code, *clamp_codes(n)).astype(np.uint16)}


def _derive_narrow(n: NodeView) -> Constants:
    """16 to 8 bits: a 14-bit multiplier (at 2**-15 above 1/16), a first rounding at 2**-step of an output step (7 at
    most); what the zero points add saturates at 16 bits. Codes count from the middle, 32767."""
    ratio = float(f32(n.q(0).scale / n.q(-1).scale))
    bits = 14 - int(ceil_log2(np.float64(ratio))) if ratio <= 1 / 16 else 15
    mult, shift = int(np.rint(np.ldexp(ratio, bits))), max(15, bits - 7)
    step = bits - shift
    taken = ((n.zero(0) - 32767) * mult + (1 << shift - 1)) >> shift
    offset = min(max((n.q(-1).zero << step) - taken, -32768), 32767)
    return with_range(n, mult=mult, shift=shift, step=step, offset=offset + ((1 << step) >> 1))


def _apply_narrow(n: NodeView, x: Array) -> Array:
    """``((((x - 32767) * mult + half) >> shift) + offset) >> step``"""
    mult, shift = n.fixed["mult"], n.fixed["shift"]
    fine = ((x.astype(np.int64) - 32767) * mult + (1 << shift - 1)) >> shift
    return saturate(n, ((fine + n.fixed["offset"]) >> n.fixed["step"]) - n.q(-1).zero)


def _derive_same_width(n: NodeView) -> Constants:
    """16 to 16 bits: multiplier at 2**-18; the offset is a float32 difference, rounded at 1/8 of an output step."""
    mult = int(np.rint(float(f32(n.q(0).scale / n.q(-1).scale)) * 2.0**18))
    taken = f32(f32(np.ldexp(mult, -18)) * f32(n.zero(0)))
    return with_range(n, mult=mult, offset=mult + int(np.rint(8 * np.float64(f32(f32(n.q(-1).zero) - taken)))))


def _apply_same_width(n: NodeView, x: Array) -> Array:
    """``((((x - 32768) * mult + half) >> 15) + offset + 4) >> 3``, where only every other element of a tensor gets the
    half: the hardware's even lanes round, its odd lanes truncate."""
    even = (np.arange(x.size) % n.type(0).size % 2 == 0).reshape(x.shape)
    fine = ((x.astype(np.int64) - 32768) * n.fixed["mult"] + (even << 14)) >> 15
    return saturate(n, ((fine + n.fixed["offset"] + 4) >> 3) - n.q(-1).zero)


def _derive_product8(n: NodeView) -> Constants:
    """A constant of one element makes the node a table. Else ratio float32 ``(s_a / s_y) * s_b``, a first rounding at
    2**-step of an output step (step 7 at most). What is taken from the product is a multiple of 256; what is added
    later wraps at 16 bits."""
    table = _scalar_table(n)
    if table is not None:
        return table
    ratio = float(f32(f32(n.q(0).scale / n.q(-1).scale) * n.q(1).scale))
    step = min(7, -int(np.frexp(ratio)[1]))
    mult, taken = int(np.rint(ratio * 2.0 ** (15 + step))), (_zero_product(n) + 128) >> 8 << 8
    offset = ((mult * taken + (1 << 14)) >> 15) + int(n.q(-1).zero * 2.0**step)
    return with_range(n, mult=mult, shift=15, step=step, taken=taken, offset=_wrap(offset, 16))


def _derive_product16(n: NodeView) -> Constants:
    """Ratio float32 ``(s_a * s_b) / s_y`` at 2**-34, a first rounding at 1/8 of an output step. From 1/8 on the
    multiplier would pass 31 bits: the result is a multiple of 2**coarse output steps instead."""
    ratio = np.float64(f32(f32(n.q(0).scale * n.q(1).scale) / n.q(-1).scale))
    coarse = max(0, int(ceil_log2(ratio)) + 3)
    mult = min(int(np.rint(np.ldexp(ratio, 34 - coarse))), (1 << 31) - (1 << 19))
    taken = _zero_product(n)
    offset = -(((1 << 30) - mult * taken) >> 31)
    return with_range(n, mult=mult, shift=31, step=3, coarse=coarse, taken=taken, offset=offset)


def _zero_product(n: NodeView) -> int:
    """2ab + a + b of the zero points a, b around mid-range: taken from the product before the multiplication, and
    added, multiplied by itself, after it."""
    middle = (RANGE[n.type(0).dtype][1] + 1) // 2
    a, b = n.zero(0) - middle, n.zero(1) - middle
    return 2 * a * b + a + b


def _fine(n: NodeView, a: Array, b: Array) -> Array:
    """``(((product - taken) * mult + half) >> shift) + offset``"""
    mult, shift = n.fixed["mult"], n.fixed["shift"]
    product = (a.astype(np.int64) - n.zero(0)) * (b.astype(np.int64) - n.zero(1)) - n.fixed["taken"]
    # In two parts: a 16-bit product times its multiplier takes up to 66 bits.
    low = ((product & 0xFFFF) * mult + (1 << shift - 1)) >> 15
    return (((product >> 16) * mult << 1) + low >> (shift - 15)) + n.fixed["offset"]


def _apply_product8(n: NodeView, a: Array, b: Array) -> Array:
    """A table, or rounded half up at 2**step."""
    if "table" in n.fixed:
        return _look_up(n, a, b)
    step = n.fixed["step"]
    half = (1 << step) >> 1 if step > 0 else 0
    return saturate(n, shift_right(_fine(n, a, b) + half, step) - n.q(-1).zero)


def _apply_product16(n: NodeView, a: Array, b: Array) -> Array:
    """``(fine + half >> step) << coarse``"""
    step = n.fixed["step"]
    return saturate(n, (_fine(n, a, b) + (1 << step - 1) >> step) << n.fixed["coarse"])


def _look_up(n: NodeView, a: Array, b: Array) -> Array:
    return np.broadcast_to(n.fixed["table"][(a, b)[n.fixed["operand"]]], np.broadcast_shapes(a.shape, b.shape))


def _weighted(n: NodeView, a: Array, b: Array) -> Array:
    left, right = n.fixed["mult"]
    return left * a.astype(np.int64) + right * b.astype(np.int64) + n.fixed["offset"]


def _apply_sum8(n: NodeView, a: Array, b: Array) -> Array:
    """``((left * a + right * b + offset) >> 8) >> (shift - 8)``, the last one to the left below 8; or a table."""
    if "table" in n.fixed:
        return _look_up(n, a, b)
    return saturate(n, shift_right(_weighted(n, a, b) >> 8, n.fixed["shift"] - 8) - n.q(-1).zero)


def _apply_sum16(n: NodeView, a: Array, b: Array) -> Array:
    """``(left * a + right * b + offset) >> shift``"""
    return saturate(n, shift_right(_weighted(n, a, b), n.fixed["shift"]) - n.q(-1).zero)


def _derive_requantize16(n: NodeView) -> Constants:
    """Changes of encoding with 16 bits on either side."""
    if n.type(0).dtype == "u8":
        return _derive_widen(n)
    return _derive_narrow(n) if n.out.dtype == "u8" else _derive_same_width(n)


def _apply_requantize16(n: NodeView, x: Array) -> Array:
    if n.type(0).dtype == "u8":
        return apply_table(n, x)
    return _apply_narrow(n, x) if n.out.dtype == "u8" else _apply_same_width(n, x)


REACH8 = "exact alone; behind an 8-bit function HTP rounds the exact value (0.4 % by 1 LSB), behind an add it is merged"
REACH16 = (
    "exact but for ties of dyadic ratios from 16 to 8 bits; u8 to u16 for s_x / s_y >= 1, u16 to u8 for "
    "1/512 <= s_x / s_y < 1; u16 to u16: lanes are counted in the order of memory "
    "(1 LSB on 3 to 7 % of the elements otherwise)"
)
RULES = (
    Rule("htp_sum", _derive_sum8, _apply_sum8, "exact"),
    Rule("htp_sum16", _derive_sum16, _apply_sum16, "exact"),
    Rule("htp_product", _derive_product8, _apply_product8, "exact"),
    Rule("htp_product16", _derive_product16, _apply_product16, "exact"),
    Rule("htp_requantize", _derive_requantize, apply_table, "bounded", REACH8),
    Rule("htp_requantize16", _derive_requantize16, _apply_requantize16, "bounded", REACH16),
)
PROFILES: dict[str, Profile] = {}
