"""ONNX op type -> what it means in the op table. A function gets the builder, the node (attributes, opset) and its
inputs as Act, Const or None (never all Const: those nodes are evaluated by onnx.reference)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeforge.frontend import layers
from edgeforge.frontend.builder import Act, Builder, Const, Refused


@dataclass(frozen=True)
class OnnxNode:
    """What a handler may read of a NodeProto."""

    op: str
    attrs: Mapping[str, Any]
    outputs: int
    opset: int

    def get(self, name: str, default: Any) -> Any:
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else value


Handler = Callable[..., Any]
TABLE: dict[str, Handler] = {}


def onnx(*names: str) -> Callable[[Handler], Handler]:
    """Register a function for ONNX op types."""

    def keep(handler: Handler) -> Handler:
        TABLE.update(dict.fromkeys(names, handler))
        return handler

    return keep


def fixed(x: Any, what: str) -> np.ndarray:
    if isinstance(x, Act):
        raise Refused(f"{what} depends on the input", f"make the {what} a constant")
    return x.data


def ints(n: OnnxNode, attr: str, given: Any, default: Any = None) -> Any:
    """Integers that older opsets keep in an attribute and newer ones in an input."""
    if given is not None:
        return [int(i) for i in fixed(given, attr).reshape(-1)]
    return n.get(attr, default)


# ------------------------------------------------------------------------------------------------------- element-wise

for _type, _op in {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Exp": "exp", "Neg": "neg", "Sqrt": "sqrt",
    "Reciprocal": "reciprocal", "Erf": "erf", "HardSwish": "hardswish",
}.items():  # fmt: skip
    TABLE[_type] = lambda g, n, x, op=_op: g.emit(op, x)


@onnx("Identity", "Dropout")
def identity(g: Builder, n: OnnxNode, x: Act, *rest: Any) -> Act:
    return x


@onnx("Cast", "CastLike")
def cast(g: Builder, n: OnnxNode, x: Act, *rest: Any) -> Act:
    """Activations are float32 whatever their width was (FLOAT 1, FLOAT16 10, DOUBLE 11, BFLOAT16 16)."""
    integers = g.values[x.name].type.dtype == "i64"
    if n.op == "Cast" and (n.attrs["to"] in (1, 10, 11, 16)) == integers:
        raise Refused("casts between floats and integers", "compute indices and masks outside the model")
    return x


@onnx("Add")
def add(g: Builder, n: OnnxNode, a: Any, b: Any) -> Act:
    a, b = (g.bounded(part) if isinstance(part, Const) else part for part in (a, b))
    return g.add(a, b)


@onnx("Sum")
def sum_(g: Builder, n: OnnxNode, *terms: Any) -> Act:
    total = terms[0]
    for term in terms[1:]:
        total = add(g, n, total, term)
    return total


@onnx("Sub")
def sub(g: Builder, n: OnnxNode, a: Any, b: Any) -> Act:
    return g.binary("sub", a, b)


@onnx("Mul")
def mul(g: Builder, n: OnnxNode, a: Any, b: Any) -> Act:
    return g.mul(a, b) if isinstance(a, Act) else g.mul(b, a)


@onnx("Div")
def div(g: Builder, n: OnnxNode, a: Any, b: Any) -> Act:
    return g.div(a, b)


@onnx("Pow")
def power(g: Builder, n: OnnxNode, x: Act, exponent: Any) -> Act:
    exponents = np.unique(fixed(exponent, "exponent"))
    if exponents.size != 1:
        raise Refused("powers differ by element", "use one exponent")
    return g.power(x, float(exponents[0]))


@onnx("Clip", "Min", "Max")
def clip(g: Builder, n: OnnxNode, x: Act, *bounds: Any) -> Act:
    if n.op != "Clip":
        x, bounds = (x, bounds) if isinstance(x, Act) else (bounds[0], (x,))
        bounds = (None, *bounds) if n.op == "Min" else bounds
    numbers = [None if b is None else fixed(b, "bound") for b in bounds]
    if any(b is not None and b.size != 1 for b in numbers) or len(numbers) > 2:
        raise Refused("bounds differ by element", "clip to one range")
    low, high = ([None if b is None else float(b.reshape(())) for b in numbers] + [None, None])[:2]
    return g.clip(x, n.get("min", low), n.get("max", high))


@onnx("HardSigmoid")
def hardsigmoid(g: Builder, n: OnnxNode, x: Act) -> Act:
    alpha, beta = n.get("alpha", 0.2), n.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return g.emit("hardsigmoid", x)
    return g.clip(g.add(g.mul(x, float(alpha)), float(beta)), 0.0, 1.0)


@onnx("Gelu")
def gelu(g: Builder, n: OnnxNode, x: Act) -> Act:
    return g.emit("gelu", x, approximate=n.get("approximate", "none"))


@onnx("Swish", "QuickGelu")
def swish(g: Builder, n: OnnxNode, x: Act) -> Act:
    alpha = n.get("alpha", 1.0 if n.op == "Swish" else 1.702)
    return g.emit("silu", x) if alpha == 1 else g.emit("mul", x, g.emit("sigmoid", g.mul(x, float(alpha))))


@onnx("Where")
def where(g: Builder, n: OnnxNode, mask: Any, a: Any, b: Any) -> Act:
    chosen = fixed(mask, "condition").astype(bool)
    if isinstance(a, Act) and isinstance(b, Act):
        return g.add(g.mul(a, Const(chosen.astype(np.float32))), g.mul(b, Const((~chosen).astype(np.float32))))
    x, other, hidden = (a, b, ~chosen) if isinstance(a, Act) else (b, a, chosen)
    values = np.unique(fixed(other, "value"))
    if values.size != 1:
        raise Refused("fills with more than one value", "use one value")
    return g.masked(x, hidden, float(values[0]))


# ---------------------------------------------------------------------------------------------------- moving elements


@onnx("Reshape")
def reshape(g: Builder, n: OnnxNode, x: Act, shape: Any) -> Act:
    sizes = [int(size) for size in fixed(shape, "shape").reshape(-1)]
    if not n.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return g.reshape(x, sizes)


@onnx("Flatten")
def flatten(g: Builder, n: OnnxNode, x: Act) -> Act:
    axis = n.get("axis", 1)
    return g.reshape(x, (math.prod(x.shape[: axis if axis >= 0 else axis + x.rank]), -1))


@onnx("Squeeze")
def squeeze(g: Builder, n: OnnxNode, x: Act, axes: Any = None) -> Act:
    chosen = ints(n, "axes", axes, [i for i, size in enumerate(x.shape) if size == 1])
    chosen = [axis % x.rank for axis in chosen]
    return g.reshape(x, [size for i, size in enumerate(x.shape) if i not in chosen])


@onnx("Unsqueeze")
def unsqueeze(g: Builder, n: OnnxNode, x: Act, axes: Any = None) -> Act:
    chosen = ints(n, "axes", axes)
    rank = x.rank + len(chosen)
    sizes = iter(x.shape)
    chosen = [axis % rank for axis in chosen]
    return g.reshape(x, [1 if i in chosen else next(sizes) for i in range(rank)])


@onnx("Transpose")
def transpose(g: Builder, n: OnnxNode, x: Act) -> Act:
    return g.transpose(x, n.get("perm", range(x.rank)[::-1]))


@onnx("Concat")
def concat(g: Builder, n: OnnxNode, *parts: Any) -> Act:
    return g.concat(parts, n.attrs["axis"])


@onnx("Slice")
def slice_(
    g: Builder, n: OnnxNode, x: Act, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> Act:
    starts, ends = ints(n, "starts", starts), ints(n, "ends", ends)
    axes = ints(n, "axes", axes, range(len(starts)))
    steps = ints(n, "steps", steps, [1] * len(starts))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = g.slice(x, axis, start, end, step)
    return x


@onnx("Split")
def split(g: Builder, n: OnnxNode, x: Act, sizes: Any = None) -> list[Act]:
    axis = n.get("axis", 0)
    each = -(-x.shape[axis] // n.outputs)
    equal = [min(each, x.shape[axis] - i * each) for i in range(n.outputs)]
    return g.split(x, ints(n, "split", sizes, equal), axis)


@onnx("Gather")
def gather(g: Builder, n: OnnxNode, x: Any, ids: Any) -> Act:
    if isinstance(x, Act):
        return g.take(x, n.get("axis", 0), fixed(ids, "index"))
    if n.get("axis", 0) != 0 or x.rank != 2:
        raise Refused(f"looks up axis {n.get('axis', 0)} of a table {x.shape}", "use a table [rows, features]")
    return g.emit("gather", x, ids)


@onnx("Expand")
def expand(g: Builder, n: OnnxNode, x: Act, shape: Any) -> Act:
    return g.expand(x, np.broadcast_shapes(x.shape, tuple(int(s) for s in fixed(shape, "shape"))))


@onnx("Tile")
def tile(g: Builder, n: OnnxNode, x: Act, times: Any) -> Act:
    for axis, count in enumerate(fixed(times, "repeats")):
        if count > 64:
            raise Refused(f"repeats {count} times", "use Expand")
        x = g.concat([x] * int(count), axis) if count > 1 else x
    return x


@onnx("Pad")
def pad(g: Builder, n: OnnxNode, x: Act, pads: Any = None, value: Any = None, axes: Any = None) -> Act:
    if n.get("mode", "constant") != "constant":
        raise Refused(f"padding mode {n.get('mode', '')}", "pad with zeros")
    amounts = ints(n, "pads", pads)
    chosen = [axis % x.rank for axis in ints(n, "axes", axes, range(x.rank))]
    widths = [[0, 0] for _ in range(x.rank)]
    for i, axis in enumerate(chosen):
        widths[axis] = [amounts[i], amounts[i + len(chosen)]]
    fill = n.get("value", 0.0) if value is None else float(fixed(value, "padding value").reshape(-1)[0])
    return layers.pad(g, x, [p for pair in widths for p in pair], fill)
