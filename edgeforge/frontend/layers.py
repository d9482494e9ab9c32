"""Layers of the frameworks in terms of the op table: convolution, pooling, normalization, products, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeforge.frontend.builder import Act, Builder, Const, Refused, Tensor
from edgeforge.ir.types import QParams, TensorType
from edgeforge.ops import _resize
from edgeforge.ops import resize_nearest as resize_nearest_op

# ---------------------------------------------------------------------------------------------------- convolutions


def pad(g: Builder, x: Act, pads: Sequence[int], value: float = 0.0) -> Act:
    """``pads``: (before, after) per axis, flattened, first axis first; zeros in the last two axes of NCHW."""
    pads = [int(p) for p in pads]
    if not any(pads):
        return x
    if value != 0 or x.rank != 4 or any(pads[:-4]) or min(pads) < 0:
        raise Refused(f"pads {tuple(pads)} of {x.shape} with {value}", "pad height and width of NCHW with zeros")
    top, bottom, left, right = pads[-4:]
    return g.emit("pad", x, pads=(top, left, bottom, right))


def unpadded(g: Builder, x: Act) -> tuple[Act, tuple[int, ...]]:
    """What was padded with zeros to make x, and (top, left, bottom, right) of that."""
    made = g.producer(x)
    if made is None or made.op != "pad":
        return x, (0, 0, 0, 0)
    return Act(made.inputs[0], g.values[made.inputs[0]].type.shape), made.attrs["pads"]


def conv(
    g: Builder,
    x: Act,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Act:
    """2-d convolution, or 1-d as 2-d of height 1; weights [O, I/groups, (KH,) KW]; zero padding before it merges.
    pads: (top, left, bottom, right), or (left, right) in 1-d."""
    if isinstance(weight, Act) or isinstance(bias, Act):
        raise Refused("weights are computed from an input", "make the weights constant")
    if x.rank == 3 and weight.rank == 3:
        narrow = Const(weight.data[:, :, None], weight.name, weight.kind)
        made = conv(g, g.unsqueeze(x, 2), narrow, bias, (1, *stride), (0, pads[0], 0, pads[1]), (1, *dilation), groups)
        return g.reshape(made, (made.shape[0], made.shape[1], made.shape[3]))
    if x.rank != 4 or weight.rank != 4:
        raise Refused(f"convolution of {x.shape} with weights {weight.shape}", "use conv1d or conv2d on a batch")
    x, more = unpadded(g, x)
    total = tuple(int(a) + int(b) for a, b in zip(pads, more, strict=True))
    if min(total) < 0:
        raise Refused(f"negative padding {total}", "crop the input instead")
    attrs = {
        "stride": tuple(map(int, stride)),
        "pads": total,
        "dilation": tuple(map(int, dilation)),
        "groups": int(groups),
    }
    return g.emit("conv2d", x, weight, *([] if bias is None else [bias]), **attrs)


def conv_transpose(
    g: Builder,
    x: Act,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    more: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Act:
    """2-d transposed convolution; weights [I, O/groups, KH, KW]. more: output padding."""
    if isinstance(weight, Act) or isinstance(bias, Act):
        raise Refused("weights are computed from an input", "make the weights constant")
    if x.rank != 4 or weight.rank != 4:
        raise Refused(f"transposed convolution of {x.shape} with weights {weight.shape}", "use ConvTranspose2d")
    if groups > 1 and weight.shape[1] > 1:
        raise Refused(f"{groups} groups of a transposed convolution", "one group, or as many as channels in and out")
    if min(pads) < 0:
        raise Refused(f"negative padding {tuple(pads)}", "pad the output instead")
    attrs = {
        "stride": tuple(map(int, stride)),
        "pads": tuple(map(int, pads)),
        "output_padding": tuple(map(int, more)),
        "dilation": tuple(map(int, dilation)),
        "groups": int(groups),
    }
    weight = weight if groups > 1 else transposed(g, weight)
    return g.emit("conv_transpose2d", x, weight, *([] if bias is None else [bias]), **attrs)


def resized(x: Act, size: Sequence[int] | None, factors: Sequence[float] | None) -> tuple[int, int]:
    """Height and width of what resizing x [N, C, H, W] makes: ``size``, or the whole numbers that ``factors`` give."""
    if x.rank != 4:
        raise Refused(f"resizes {x.shape}", "resize height and width of NCHW")
    if size is not None:
        return int(size[0]), int(size[1])
    assert factors is not None
    made = [old * factor for old, factor in zip(x.shape[2:], factors, strict=True)]
    if any(abs(new - round(new)) > 1e-6 * new for new in made):
        raise Refused(f"resizes {x.shape[2:]} by {tuple(factors)} to fractions of an element", "give the size instead")
    return round(made[0]), round(made[1])


def resize_bilinear(g: Builder, x: Act, size: tuple[int, int], coordinates: str) -> Act:
    return x if size == x.shape[2:] else g.emit("resize_bilinear", x, size=size, coordinates=coordinates)


def resize_nearest(g: Builder, x: Act, size: tuple[int, int], coordinates: str, rounding: str) -> Act:
    """In ONNX's words; taken where one of the two kinds that runtimes have picks the same elements."""
    sides = list(zip(x.shape[2:], size, strict=True))
    wanted = [_resize.floors(_rounded(_resize.place(coordinates, *side), rounding), *side) for side in sides]
    for kind in resize_nearest_op.ROUNDING:
        found = [_resize.floors(resize_nearest_op.place(kind, *side), *side) for side in sides]
        if all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True)):
            return x if size == x.shape[2:] else g.emit("resize_nearest", x, size=size, coordinates=kind)
    what = f"resizes {x.shape[2:]} to {size} with {coordinates} coordinates and {rounding}"
    raise Refused(what, "asymmetric with floor, or half_pixel with round_prefer_ceil")


def _rounded(place: _resize.Place, rounding: str) -> _resize.Place:
    """A place whose floor is ``rounding`` of ``place``."""
    step, start, unit = place
    added = {"floor": 0, "ceil": 2 * unit - 1, "round_prefer_floor": unit - 1, "round_prefer_ceil": unit}
    return 2 * step, 2 * start + added[rounding], 2 * unit


def max_pool(g: Builder, x: Act, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int], ceil: bool) -> Act:
    """Rounding up adds padding at the end, which never wins."""
    pads = list(pads)
    for i in (0, 1) if ceil else ():
        pads[2 + i] += _missing(x.shape[2 + i], kernel[i], stride[i], pads[i], pads[2 + i])
    return g.emit("max_pool", x, kernel=tuple(kernel), stride=tuple(stride), pads=tuple(pads))


def avg_pool(
    g: Builder, x: Act, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int], ceil: bool, count_pads: bool
) -> Act:
    """A window over everything is a mean; windows that do not count their padding are scaled up at the border."""
    kernel, stride, pads = tuple(kernel), tuple(stride), list(pads)
    whole = not any(pads) and all(k >= size for k, size in zip(kernel, x.shape[2:], strict=True))
    if whole and (ceil or kernel == x.shape[2:]):
        return mean(g, x, (2, 3), True)
    if not any(pads) and not ceil:
        return g.emit("avg_pool", x, kernel=kernel, stride=stride, pads=(0, 0, 0, 0))
    if any(p >= k for p, k in zip(pads, kernel * 2, strict=True)):
        raise Refused(f"padding {tuple(pads)} is not smaller than the kernel {kernel}", "pad less")
    inside = np.ones(x.shape[2:])
    counted = np.pad(inside, ((pads[0], pads[2]), (pads[1], pads[3])), constant_values=1.0 if count_pads else 0.0)
    extra = [_missing(x.shape[2 + i], kernel[i], stride[i], pads[i], pads[2 + i]) if ceil else 0 for i in (0, 1)]
    counted = np.pad(counted, ((0, extra[0]), (0, extra[1])))
    windows = np.lib.stride_tricks.sliding_window_view(counted, kernel)[:: stride[0], :: stride[1]]
    share = kernel[0] * kernel[1] / windows.sum((-2, -1))
    pads[2], pads[3] = pads[2] + extra[0], pads[3] + extra[1]
    y = g.emit("avg_pool", x, kernel=kernel, stride=stride, pads=tuple(pads))
    return g.mul(y, Const(share[None, None].astype(np.float32)))


def _missing(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Padding that makes the last, partial window whole; a window must begin inside the input or its left pad."""
    steps = -(-(size + before + after - kernel) // stride)
    steps -= steps * stride >= size + before
    return max(steps * stride + kernel - (size + before + after), 0)


def batch_norm(g: Builder, x: Act, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> Act:
    """y = x * s + t per channel (axis 1); `fuse_batch_norm` folds it into the convolution before."""
    if any(isinstance(part, Act) for part in (weight, bias, mean, var)):
        raise Refused("statistics are computed from an input", "put the model in eval mode")
    mean64, var64 = mean.data.astype(np.float64), var.data.astype(np.float64)
    scale = (1.0 if weight is None else weight.data.astype(np.float64)) / np.sqrt(var64 + eps)
    shift = (0.0 if bias is None else bias.data.astype(np.float64)) - mean64 * scale
    shape = (-1, *[1] * (x.rank - 2))
    y = g.emit("mul", x, Const(scale.reshape(shape).astype(np.float32), f"{g.where}.scale"))
    return g.emit("add", y, Const(shift.reshape(shape).astype(np.float32), f"{g.where}.shift"))


# -------------------------------------------------------------------------------------------- matrices, attention


def linear(g: Builder, x: Act, weight: Tensor, bias: Tensor | None = None) -> Act:
    """x [..., I] times constant weights [O, I]; a bias that is not [O] is added."""
    if isinstance(weight, Act):
        y = matmul(g, x, g.swap(weight, -1, -2))
        return y if bias is None else g.add(y, bias)
    whole = x if x.rank > 1 else g.reshape(x, (1, *x.shape))
    direct = isinstance(bias, Const) and bias.shape == weight.shape[:1]
    y = g.emit("linear", whole, weight, *([bias] if direct and bias is not None else []))
    y = g.reshape(y, (*x.shape[:-1], weight.shape[0]))
    return y if bias is None or direct else g.add(y, bias)


def matmul(g: Builder, a: Tensor, b: Tensor) -> Act:
    """Constant right operands [I, O] make it linear; constant left operands [O, I] too, transposed twice."""
    if isinstance(b, Const) and isinstance(a, Act):
        if b.rank < 2 or math.prod(b.shape[:-2]) != 1:
            raise Refused(f"product with constant {b.shape}", "use a matrix [I, O]")
        matrix = b if b.rank == 2 else Const(b.data.reshape(b.shape[-2:]), b.name)
        return linear(g, a, transposed(g, matrix))
    if isinstance(a, Const) and isinstance(b, Act):
        if a.rank != 2 or b.rank < 2:
            raise Refused(f"product of constant {a.shape} with {b.shape}", "use a matrix [O, I] on the left")
        return g.swap(linear(g, g.swap(b, -1, -2), a), -1, -2)
    return g.emit("matmul", a, b)


def transposed(g: Builder, weight: Const) -> Const:
    """Weights [I, O, ...] as [O, I, ...]; made once per constant."""
    known = g.transposed.get(weight)
    if known is None:
        name = f"{weight.name}.T" if weight.name else ""
        known = g.transposed[weight] = Const(
            np.ascontiguousarray(weight.data.swapaxes(0, 1)), name, _flipped(weight.kind)
        )
    return known


def _flipped(kind: TensorType | None) -> TensorType | None:
    """The type with its first two axes swapped."""
    if kind is None or kind.q is None:
        return kind
    axis = {0: 1, 1: 0}.get(kind.q.axis, kind.q.axis)
    return TensorType((*kind.shape[1::-1], *kind.shape[2:]), kind.dtype, QParams(kind.q.scale, kind.q.zero, axis))


def attention(
    g: Builder, q: Act, k: Act, v: Act, mask: Const | Act | None, causal: bool, scale: float | None, grouped: bool
) -> Act:
    """softmax(q * scale @ k.T + mask) @ v over [..., heads, tokens, features]; the scale goes to q, where
    `hoist_scale` can fold it into the projection."""
    if grouped:
        k = g.repeat_each(k, q.shape[-3] // k.shape[-3], -3)
        v = g.repeat_each(v, q.shape[-3] // v.shape[-3], -3)
    scaled = g.mul(q, float(1 / math.sqrt(q.shape[-1]) if scale is None else scale))
    scores = matmul(g, scaled, g.swap(k, -1, -2))
    if causal:
        blocked = np.triu(np.ones(scores.shape[-2:], bool), 1)
        scores = g.add_mask(scores, np.where(blocked, -np.inf, 0.0))
    if isinstance(mask, Const):
        additive = np.where(mask.data, 0.0, -np.inf) if mask.data.dtype == bool else mask.data
        scores = g.add_mask(scores, additive)
    elif mask is not None:
        scores = g.add(scores, mask)
    return matmul(g, softmax(g, scores, -1), v)


def softmax(g: Builder, x: Tensor, axis: int) -> Act:
    return g.emit("softmax", x, axis=axis % x.rank)


def mean(g: Builder, x: Act, axes: Sequence[int] | None, keepdims: bool) -> Act:
    axes = range(x.rank) if axes is None or len(axes) == 0 else axes
    return g.emit("reduce_mean", x, axes=tuple(sorted(int(a) % x.rank for a in axes)), keepdims=bool(keepdims))


def variance(g: Builder, x: Act, axes: Sequence[int] | None, correction: float, keepdims: bool) -> Act:
    """Mean of squared deviations, times n / (n - correction)."""
    centered = g.emit("sub", x, mean(g, x, axes, True))
    y = mean(g, g.emit("mul", centered, centered), axes, keepdims)
    count = math.prod(x.shape) // max(math.prod(y.shape), 1)
    return g.mul(y, float(count / (count - correction)))


def layer_norm(g: Builder, x: Act, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Act:
    """Over the last axis; absent gain and bias are 1 and 0."""
    gain, shift = _gain(g, x, axes, weight, 1.0), _gain(g, x, axes, bias, 0.0)
    return g.emit("layer_norm", x, gain, shift, eps=float(eps))


def rms_norm(g: Builder, x: Act, axes: int, weight: Tensor | None, eps: float) -> Act:
    return g.emit("rms_norm", x, _gain(g, x, axes, weight, 1.0), eps=float(eps))


def _gain(g: Builder, x: Act, axes: int, given: Tensor | None, otherwise: float) -> Const:
    if axes != 1:
        raise Refused(f"normalizes {axes} axes", "normalize the last axis only")
    if isinstance(given, Act):
        raise Refused("gain or bias is computed from an input", "make it constant")
    return Const(np.full(x.shape[-1:], otherwise, np.float32)) if given is None else given
