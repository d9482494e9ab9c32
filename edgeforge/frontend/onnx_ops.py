"""ONNX op type -> what it means in the op table. A function gets the builder, the node (attributes, opset) and its
inputs as Act, Const or None (never all Const: those nodes are evaluated by onnx.reference)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


def _fixed(x: Any, what: str) -> np.ndarray:
    if isinstance(x, Act):
        raise Refused(f"{what} depends on the input", f"make the {what} a constant")
    return x.data


def _ints(n: OnnxNode, attr: str, given: Any, default: Any = None) -> Any:
    """Integers that older opsets keep in an attribute and newer ones in an input."""
    if given is not None:
        return [int(i) for i in _fixed(given, attr).reshape(-1)]
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
    exponents = np.unique(_fixed(exponent, "exponent"))
    if exponents.size != 1:
        raise Refused("powers differ by element", "use one exponent")
    return g.power(x, float(exponents[0]))


@onnx("Clip", "Min", "Max")
def clip(g: Builder, n: OnnxNode, x: Act, *bounds: Any) -> Act:
    if n.op != "Clip":
        x, bounds = (x, bounds) if isinstance(x, Act) else (bounds[0], (x,))
        bounds = (None, *bounds) if n.op == "Min" else bounds
    numbers = [None if b is None else _fixed(b, "bound") for b in bounds]
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
    chosen = _fixed(mask, "condition").astype(bool)
    if isinstance(a, Act) and isinstance(b, Act):
        return g.add(g.mul(a, Const(chosen.astype(np.float32))), g.mul(b, Const((~chosen).astype(np.float32))))
    x, other, hidden = (a, b, ~chosen) if isinstance(a, Act) else (b, a, chosen)
    values = np.unique(_fixed(other, "value"))
    if values.size != 1:
        raise Refused("fills with more than one value", "use one value")
    return g.masked(x, hidden, float(values[0]))


# ---------------------------------------------------------------------------------------------------- moving elements


@onnx("Reshape")
def reshape(g: Builder, n: OnnxNode, x: Act, shape: Any) -> Act:
    sizes = [int(size) for size in _fixed(shape, "shape").reshape(-1)]
    if not n.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return g.reshape(x, sizes)


@onnx("Flatten")
def flatten(g: Builder, n: OnnxNode, x: Act) -> Act:
    axis = n.get("axis", 1)
    return g.reshape(x, (math.prod(x.shape[: axis if axis >= 0 else axis + x.rank]), -1))


@onnx("Squeeze")
def squeeze(g: Builder, n: OnnxNode, x: Act, axes: Any = None) -> Act:
    chosen = _ints(n, "axes", axes, [i for i, size in enumerate(x.shape) if size == 1])
    chosen = [axis % x.rank for axis in chosen]
    return g.reshape(x, [size for i, size in enumerate(x.shape) if i not in chosen])


@onnx("Unsqueeze")
def unsqueeze(g: Builder, n: OnnxNode, x: Act, axes: Any = None) -> Act:
    chosen = _ints(n, "axes", axes)
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
    starts, ends = _ints(n, "starts", starts), _ints(n, "ends", ends)
    axes = _ints(n, "axes", axes, range(len(starts)))
    steps = _ints(n, "steps", steps, [1] * len(starts))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = g.slice(x, axis, start, end, step)
    return x


@onnx("Split")
def split(g: Builder, n: OnnxNode, x: Act, sizes: Any = None) -> list[Act]:
    axis = n.get("axis", 0)
    each = -(-x.shape[axis] // n.outputs)
    equal = [min(each, x.shape[axis] - i * each) for i in range(n.outputs)]
    return g.split(x, _ints(n, "split", sizes, equal), axis)


@onnx("Gather")
def gather(g: Builder, n: OnnxNode, x: Any, ids: Any) -> Act:
    if isinstance(x, Act):
        return g.take(x, n.get("axis", 0), _fixed(ids, "index"))
    if n.get("axis", 0) != 0 or x.rank != 2:
        raise Refused(f"looks up axis {n.get('axis', 0)} of a table {x.shape}", "use a table [rows, features]")
    return g.emit("gather", x, ids)


@onnx("Expand")
def expand(g: Builder, n: OnnxNode, x: Act, shape: Any) -> Act:
    return g.expand(x, np.broadcast_shapes(x.shape, tuple(int(s) for s in _fixed(shape, "shape"))))


@onnx("Tile")
def tile(g: Builder, n: OnnxNode, x: Act, times: Any) -> Act:
    for axis, count in enumerate(_fixed(times, "repeats")):
        if count > 64:
            raise Refused(f"repeats {count} times", "use Expand")
        x = g.concat([x] * int(count), axis) if count > 1 else x
    return x


@onnx("Pad")
def pad(g: Builder, n: OnnxNode, x: Act, pads: Any = None, value: Any = None, axes: Any = None) -> Act:
    if n.get("mode", "constant") != "constant":
        raise Refused(f"padding mode {n.get('mode', '')}", "pad with zeros")
    amounts = _ints(n, "pads", pads)
    chosen = [axis % x.rank for axis in _ints(n, "axes", axes, range(x.rank))]
    widths = [[0, 0] for _ in range(x.rank)]
    for i, axis in enumerate(chosen):
        widths[axis] = [amounts[i], amounts[i + len(chosen)]]
    fill = n.get("value", 0.0) if value is None else float(_fixed(value, "padding value").reshape(-1)[0])
    return layers.pad(g, x, [p for pair in widths for p in pair], fill)


# ------------------------------------------------------------------------------------------------------------- layers


def _pads(
    n: OnnxNode, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """All begins, then all ends."""
    auto = n.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        return list(n.get("pads", [0] * 2 * len(kernel)))
    if auto == "VALID":
        return [0] * 2 * len(kernel)
    totals = [
        max((-(-length // s) - 1) * s + d * (k - 1) + 1 - length, 0)
        for length, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return [*small, *large] if auto == "SAME_UPPER" else [*large, *small]


@onnx("Conv")
def conv(g: Builder, n: OnnxNode, x: Act, w: Any, b: Any = None) -> Act:
    rank = x.rank - 2
    stride, dilation = n.get("strides", [1] * rank), n.get("dilations", [1] * rank)
    pads = _pads(n, x.shape[2:], w.shape[2:], stride, dilation)
    return layers.conv(g, x, w, b, stride, pads, dilation, n.get("group", 1))


@onnx("MaxPool", "AveragePool")
def pool(g: Builder, n: OnnxNode, x: Act) -> Act:
    kernel = n.attrs["kernel_shape"]
    stride, dilation = n.get("strides", [1] * len(kernel)), n.get("dilations", [1] * len(kernel))
    if x.rank != 4 or set(dilation) != {1} or n.outputs > 1:
        raise Refused(f"pools {x.shape} with dilation {dilation}", "pool NCHW without dilation")
    pads, ceil = _pads(n, x.shape[2:], kernel, stride, dilation), bool(n.get("ceil_mode", 0))
    if n.op == "MaxPool":
        return layers.max_pool(g, x, kernel, stride, pads, ceil)
    return layers.avg_pool(g, x, kernel, stride, pads, ceil, bool(n.get("count_include_pad", 0)))


@onnx("GlobalAveragePool")
def global_pool(g: Builder, n: OnnxNode, x: Act) -> Act:
    return layers.mean(g, x, range(2, x.rank), True)


@onnx("BatchNormalization")
def batch_norm(g: Builder, n: OnnxNode, x: Act, w: Any, b: Any, mean: Any, var: Any) -> Act:
    if n.get("training_mode", 0):
        raise Refused("normalizes with the statistics of the batch", "export the model in eval mode")
    return layers.batch_norm(g, x, w, b, mean, var, n.get("epsilon", 1e-5))


@onnx("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def norm(g: Builder, n: OnnxNode, x: Act, w: Any, b: Any = None) -> Act:
    axes, eps = x.rank - n.get("axis", -1) % x.rank, n.get("epsilon", 1e-5)
    if n.op == "LayerNormalization":
        return layers.layer_norm(g, x, axes, w, b, eps)
    return layers.rms_norm(g, x, axes, w, eps)


@onnx("Gemm")
def gemm(g: Builder, n: OnnxNode, x: Act, w: Any, b: Any = None) -> Act:
    if n.get("transA", 0):
        x = g.swap(x, -1, -2)
    if isinstance(w, Act) or isinstance(x, Const):
        y = layers.matmul(g, x, g.swap(w, -1, -2) if n.get("transB", 0) else w)
        y, alpha = g.mul(y, float(n.get("alpha", 1.0))), 1.0
    else:
        alpha = n.get("alpha", 1.0)
        w = w if n.get("transB", 0) else layers.transposed(g, w)
        w = w if alpha == 1 else Const((w.data * alpha).astype(np.float32), w.name)
        y = None
    beta = n.get("beta", 1.0)
    if isinstance(b, Const) and beta != 1:
        b = Const((b.data * beta).astype(np.float32), b.name)
    if y is None:
        return layers.linear(g, x, w, b)
    return y if b is None else g.add(y, b)


@onnx("MatMul")
def matmul(g: Builder, n: OnnxNode, a: Any, b: Any) -> Act:
    return layers.matmul(g, a, b)


@onnx("Softmax")
def softmax(g: Builder, n: OnnxNode, x: Act) -> Act:
    axis = n.get("axis", -1 if n.opset >= 13 else 1) % x.rank
    if n.opset < 13 and axis != x.rank - 1:
        raise Refused(f"opset {n.opset} normalizes all axes from {axis} on", "export with opset 13 or later")
    return layers.softmax(g, x, axis)


@onnx("ReduceMean", "ReduceSum")
def reduce(g: Builder, n: OnnxNode, x: Act, axes: Any = None) -> Act:
    chosen = _ints(n, "axes", axes)
    if not chosen and n.get("noop_with_empty_axes", 0):
        return x
    y = layers.mean(g, x, chosen, bool(n.get("keepdims", 1)))
    return y if n.op == "ReduceMean" else g.mul(y, float(math.prod(x.shape) / max(math.prod(y.shape), 1)))
