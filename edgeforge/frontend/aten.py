"""aten name -> what it means in the op table. A function gets the builder and the op's arguments in schema order, with
defaults filled in; tensors are Act or Const (never all Const: those nodes are evaluated by torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgeforge.frontend import layers
from edgeforge.frontend.builder import Act, Builder, Const, Refused, Tensor

Handler = Callable[..., Any]
TABLE: dict[str, Handler] = {}


def aten(*names: str) -> Callable[[Handler], Handler]:
    """Register a function for aten ops (``add`` for every overload, ``mean.dim`` for one)."""

    def keep(handler: Handler) -> Handler:
        TABLE.update(dict.fromkeys(names, handler))
        return handler

    return keep


def pair(value: int | Sequence[int]) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * 2) if len(values) == 1 else tuple(values)


def active(x: Any, what: str = "input") -> Act:
    if not isinstance(x, Act):
        raise Refused(f"{what} is a constant", "compute it from the model's input")
    return x


def fixed(x: Any, what: str) -> np.ndarray:
    if isinstance(x, Act):
        raise Refused(f"{what} depends on the input", f"make the {what} a constant")
    return x.data if isinstance(x, Const) else np.asarray(x)


# ------------------------------------------------------------------------------------------------------- element-wise


def _identity(g: Builder, x: Act, *rest: Any) -> Act:
    return x


for _name in ("clone", "alias", "detach", "contiguous", "dropout", "feature_dropout", "lift_fresh_copy", "lift_fresh"):
    TABLE[_name] = _identity


def _one(op: str) -> Handler:
    return lambda g, x, *rest: g.emit(op, x)


for _name in ("relu", "sigmoid", "tanh", "exp", "neg", "sqrt", "rsqrt", "reciprocal", "erf", "silu"):
    TABLE[_name] = TABLE[f"{_name}_"] = _one(_name)
for _name in ("hardswish", "hardsigmoid"):
    TABLE[_name] = TABLE[f"{_name}_"] = _one(_name)


@aten("_to_copy", "to", "type_as", "_assert_tensor_metadata")
def cast(g: Builder, x: Act, *rest: Any) -> Act:
    """Activations are float32 whatever their width was; a cast to integers is none of ours."""
    kinds = [str(r) for r in rest if str(r).startswith("torch.")]
    if any(k.startswith(("torch.int", "torch.uint", "torch.bool", "torch.long")) for k in kinds):
        if g.values[x.name].type.dtype == "i64":
            return x
        raise Refused(f"casts an activation to {kinds[0]}", "compute indices and masks outside the model")
    return x


@aten("add", "add_")
def add(g: Builder, a: Any, b: Any, alpha: Any = 1) -> Act:
    b = b if alpha == 1 else g.mul(b, float(alpha)) if isinstance(b, Act) else np.asarray(fixed(b, "addend") * alpha)
    a, b = (g.bounded(part) if isinstance(part, Const) else part for part in (a, b))
    return g.add(a, b)


@aten("sub", "sub_")
def sub(g: Builder, a: Any, b: Any, alpha: Any = 1) -> Act:
    b = b if alpha == 1 else g.mul(b, float(alpha)) if isinstance(b, Act) else np.asarray(fixed(b, "operand") * alpha)
    return g.binary("sub", a, b)


@aten("rsub")
def rsub(g: Builder, a: Any, b: Any, alpha: Any = 1) -> Act:
    return sub(g, b, a, alpha)


@aten("mul", "mul_")
def mul(g: Builder, a: Any, b: Any) -> Act:
    return g.mul(a, b) if isinstance(a, Act) else g.mul(b, a)


@aten("div.Tensor", "div.Scalar", "div_.Tensor", "true_divide")
def div(g: Builder, a: Any, b: Any) -> Act:
    return g.div(a, b)


@aten("pow.Tensor_Scalar", "pow.Tensor_Tensor")
def power(g: Builder, x: Any, exponent: Any) -> Act:
    exponents = np.unique(fixed(exponent, "exponent"))
    if exponents.size != 1:
        raise Refused("powers differ by element", "use one exponent")
    return g.power(active(x), float(exponents[0]))


@aten("square")
def square(g: Builder, x: Act) -> Act:
    return g.emit("mul", x, x)


@aten("clamp", "hardtanh", "hardtanh_", "clamp_min", "clamp_max")
def clamp(g: Builder, x: Act, low: Any = None, high: Any = None) -> Act:
    low, high = (None if b is None else float(fixed(b, "bound").reshape(-1)[0]) for b in (low, high))
    return g.clip(x, low, high)


TABLE["clamp_max"] = lambda g, x, high: clamp(g, x, None, high)


@aten("relu6")
def relu6(g: Builder, x: Act) -> Act:
    return g.clip(x, 0.0, 6.0)


@aten("gelu")
def gelu(g: Builder, x: Act, approximate: str) -> Act:
    return g.emit("gelu", x, approximate=approximate)


@aten("where")
def where(g: Builder, mask: Any, a: Any, b: Any) -> Act:
    chosen = fixed(mask, "condition").astype(bool)
    if isinstance(a, Act) and isinstance(b, Act):
        kept = g.mul(a, Const(chosen.astype(np.float32)))
        return g.add(kept, g.mul(b, Const((~chosen).astype(np.float32))))
    x, other, hidden = (a, b, ~chosen) if isinstance(a, Act) else (b, a, chosen)
    values = np.unique(fixed(other, "value"))
    if values.size != 1:
        raise Refused("fills with more than one value", "use one value")
    return g.masked(active(x), hidden, float(values[0]))


@aten("masked_fill")
def masked_fill(g: Builder, x: Act, mask: Any, value: Any) -> Act:
    return where(g, Const(~fixed(mask, "mask").astype(bool)), x, value)


# ---------------------------------------------------------------------------------------------------- moving elements


@aten("view", "reshape", "_unsafe_view")
def view(g: Builder, x: Act, shape: Sequence[int]) -> Act:
    return g.reshape(x, shape)


@aten("flatten")
def flatten(g: Builder, x: Act, start: int, end: int) -> Act:
    start, end = start % x.rank, end % x.rank
    return g.reshape(x, (*x.shape[:start], -1, *x.shape[end + 1 :]))


@aten("unflatten")
def unflatten(g: Builder, x: Act, axis: int, sizes: Sequence[int]) -> Act:
    axis = axis % x.rank
    return g.reshape(x, (*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))


@aten("squeeze")
def squeeze(g: Builder, x: Act, axes: Any = None) -> Act:
    chosen = range(x.rank) if axes is None else [a % x.rank for a in np.atleast_1d(axes)]
    return g.reshape(x, [size for i, size in enumerate(x.shape) if not (size == 1 and i in chosen)])


@aten("unsqueeze")
def unsqueeze(g: Builder, x: Act, axis: int) -> Act:
    return g.unsqueeze(x, axis)


@aten("transpose", "swapaxes")
def transpose(g: Builder, x: Act, a: int, b: int) -> Act:
    return g.swap(x, a, b)


@aten("t", "numpy_T", "mT")
def t(g: Builder, x: Act) -> Act:
    return g.swap(x, -1, -2) if x.rank > 1 else x


@aten("permute")
def permute(g: Builder, x: Act, perm: Sequence[int]) -> Act:
    return g.transpose(x, perm)


@aten("expand")
def expand(g: Builder, x: Act, shape: Sequence[int], *rest: Any) -> Act:
    return g.expand(x, shape)


@aten("repeat")
def repeat(g: Builder, x: Act, times: Sequence[int]) -> Act:
    x = g.reshape(x, (*[1] * (len(times) - x.rank), *x.shape))
    for axis, count in enumerate(times):
        x = g.concat([x] * count, axis) if count > 1 else x
    return x


@aten("repeat_interleave.self_int")
def repeat_interleave(g: Builder, x: Act, count: int, axis: int, *rest: Any) -> Act:
    return g.repeat_each(x, count, axis)


@aten("slice")
def slice_(g: Builder, x: Act, axis: int, start: int | None, end: int | None, step: int) -> Act:
    return g.slice(x, axis, start, end, step)


@aten("narrow")
def narrow(g: Builder, x: Act, axis: int, start: int, length: int) -> Act:
    return g.slice(x, axis, start, start + length)


@aten("select")
def select(g: Builder, x: Act, axis: int, index: int) -> Act:
    return g.select(x, axis, index)


@aten("split.Tensor")
def split(g: Builder, x: Act, size: int, axis: int) -> list[Act]:
    total = x.shape[axis]
    return g.split(x, [min(size, total - start) for start in range(0, total, size)], axis)


@aten("split_with_sizes", "split.sizes")
def split_with_sizes(g: Builder, x: Act, sizes: Sequence[int], axis: int) -> list[Act]:
    return g.split(x, sizes, axis)


@aten("chunk")
def chunk(g: Builder, x: Act, count: int, axis: int) -> list[Act]:
    return split(g, x, -(-x.shape[axis] // count), axis)


@aten("unbind")
def unbind(g: Builder, x: Act, axis: int) -> list[Act]:
    return [g.select(x, axis, i) for i in range(x.shape[axis])]


@aten("index")
def index(g: Builder, x: Act, indices: Sequence[Any]) -> Act:
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if isinstance(x, Const) or len(given) != 1:
        raise Refused("indexes by several tensors or a constant by an input", "index one axis with constants")
    axis, chosen = given[0]
    data = fixed(chosen, "index")
    return g.take(x, axis, np.flatnonzero(data) if data.dtype == bool else data)


@aten("index_select")
def index_select(g: Builder, x: Act, axis: int, chosen: Any) -> Act:
    return g.take(active(x), axis, fixed(chosen, "index"))


@aten("cat", "concat")
def cat(g: Builder, parts: Sequence[Tensor], axis: int) -> Act:
    return g.concat(parts, axis)


@aten("stack")
def stack(g: Builder, parts: Sequence[Tensor], axis: int) -> Act:
    axis = axis % (parts[0].rank + 1)
    wide = [g.unsqueeze(p, axis) if isinstance(p, Act) else Const(np.expand_dims(p.data, axis)) for p in parts]
    return g.concat(wide, axis)


@aten("pad", "constant_pad_nd")
def pad(g: Builder, x: Act, pads: Sequence[int], *rest: Any) -> Act:
    """pad(x, pads, mode, value) or constant_pad_nd(x, pads, value); torch lists the last axis first."""
    mode, value = rest if len(rest) == 2 else ("constant", rest[0])
    if mode != "constant":
        raise Refused(f"padding mode {mode}", "pad with zeros")
    pairs = [pads[i : i + 2] for i in range(0, len(pads), 2)]
    pairs += [[0, 0]] * (x.rank - len(pairs))
    return layers.pad(g, x, [p for pair in reversed(pairs) for p in pair], float(value or 0))


@aten("embedding")
def embedding(g: Builder, table: Any, ids: Any, *rest: Any) -> Act:
    if isinstance(table, Act):
        raise Refused("the embedding table is computed from an input", "make the table constant")
    return g.emit("gather", table, ids)
