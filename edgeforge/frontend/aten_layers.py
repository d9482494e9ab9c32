"""aten layers -> the op table: convolution, pooling, normalization, products, attention, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeforge.frontend import layers
from edgeforge.frontend.aten import active, aten, pair
from edgeforge.frontend.builder import Act, Builder, Const, Refused


@aten("conv2d", "conv1d")
def conv(g: Builder, x: Act, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Act:
    rank = x.rank - 2
    stride, dilation = (pair(v)[:rank] for v in (stride, dilation))
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, w.shape[2:], strict=True)]
        pads = (*(p // 2 for p in total), *(p - p // 2 for p in total))
    else:
        pads = (*pair(padding)[:rank], *pair(padding)[:rank])
    return layers.conv(g, active(x), w, b, stride, pads, dilation, groups)


@aten("convolution")
def convolution(
    g: Builder, x: Act, w: Any, b: Any, s: Any, p: Any, d: Any, transposed: bool, more: Any, groups: int
) -> Act:
    if transposed:
        return conv_transpose(g, x, w, b, s, p, more, groups, d)
    return conv(g, x, w, b, s, p, d, groups)


@aten("conv_transpose2d")
def conv_transpose(g: Builder, x: Act, w: Any, b: Any, s: Any, p: Any, more: Any, groups: int, d: Any) -> Act:
    return layers.conv_transpose(g, active(x), w, b, pair(s), pair(p) * 2, pair(more), pair(d), groups)


@aten("upsample_nearest2d.vec")
def nearest(g: Builder, x: Act, size: Any, factors: Any) -> Act:
    return layers.resize_nearest(g, x, layers.resized(x, size, factors), "asymmetric", "floor")


@aten("_upsample_nearest_exact2d.vec")
def nearest_exact(g: Builder, x: Act, size: Any, factors: Any) -> Act:
    return layers.resize_nearest(g, x, layers.resized(x, size, factors), "half_pixel", "round_prefer_ceil")


@aten("upsample_bilinear2d.vec")
def bilinear(g: Builder, x: Act, size: Any, aligned: bool, factors: Any) -> Act:
    coordinates = "align_corners" if aligned else "half_pixel"
    return layers.resize_bilinear(g, x, layers.resized(x, size, factors), coordinates)


@aten("upsample_nearest2d.default")
def nearest_sized(g: Builder, x: Act, size: Any, *factors: Any) -> Act:
    return nearest(g, x, _agreed(x, size, factors), None)


@aten("_upsample_nearest_exact2d.default")
def nearest_exact_sized(g: Builder, x: Act, size: Any, *factors: Any) -> Act:
    return nearest_exact(g, x, _agreed(x, size, factors), None)


@aten("upsample_bilinear2d.default")
def bilinear_sized(g: Builder, x: Act, size: Any, aligned: bool, *factors: Any) -> Act:
    return bilinear(g, x, _agreed(x, size, factors), aligned, None)


def _agreed(x: Act, size: Sequence[int], factors: Sequence[float | None]) -> Sequence[int]:
    """``size``, which the factors (None: not given) must lead to: they give the coordinates."""
    given = [new / old if f is None else f for f, new, old in zip(factors, size, x.shape[2:], strict=True)]
    layers.resized(x, None, given)
    return size


@aten("batch_norm")
def batch_norm(
    g: Builder, x: Act, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: Any, eps: float, _: Any
) -> Act:
    if training or mean is None:
        raise Refused("normalizes with the statistics of the batch", "put the model in eval mode before exporting")
    return layers.batch_norm(g, x, w, b, mean, var, eps)


@aten("_native_batch_norm_legit_no_training")
def batch_norm_eval(g: Builder, x: Act, w: Any, b: Any, mean: Any, var: Any, momentum: Any, eps: float) -> list[Act]:
    return [layers.batch_norm(g, x, w, b, mean, var, eps)]


@aten("layer_norm")
def layer_norm(g: Builder, x: Act, shape: Sequence[int], w: Any, b: Any, eps: float, *rest: Any) -> Act:
    return layers.layer_norm(g, x, len(shape), w, b, eps)


@aten("native_layer_norm")
def native_layer_norm(g: Builder, x: Act, shape: Sequence[int], w: Any, b: Any, eps: float) -> list[Act]:
    return [layers.layer_norm(g, x, len(shape), w, b, eps)]


@aten("rms_norm")
def rms_norm(g: Builder, x: Act, shape: Sequence[int], w: Any, eps: float | None) -> Act:
    return layers.rms_norm(g, x, len(shape), w, float(np.finfo(np.float32).eps) if eps is None else eps)


@aten("max_pool2d")
def max_pool2d(g: Builder, x: Act, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Act:
    if pair(dilation) != (1, 1) or x.rank != 4:
        raise Refused(f"max pooling of {x.shape} with dilation {pair(dilation)}", "pool NCHW without dilation")
    return layers.max_pool(g, x, pair(kernel), pair(stride or kernel), pair(padding) * 2, ceil)


@aten("max_pool2d_with_indices")
def max_pool2d_with_indices(g: Builder, *args: Any) -> list[Act]:
    return [max_pool2d(g, *args)]


@aten("avg_pool2d")
def avg_pool2d(
    g: Builder, x: Act, kernel: Any, stride: Any, padding: Any, ceil: bool, count_pads: bool, divisor: Any
) -> Act:
    if divisor is not None or x.rank != 4:
        raise Refused(f"average pooling of {x.shape} with divisor {divisor}", "pool NCHW, divisor_override=None")
    return layers.avg_pool(g, x, pair(kernel), pair(stride or kernel), pair(padding) * 2, ceil, count_pads)


@aten("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def adaptive_avg_pool2d(g: Builder, x: Act, size: Sequence[int]) -> Act:
    size = [own if s is None else s for own, s in zip(x.shape[-2:], pair(size), strict=True)]
    if size == [1, 1]:
        return layers.mean(g, x, (-2, -1), True)
    if x.rank != 4 or any(own % s for own, s in zip(x.shape[2:], size, strict=True)):
        raise Refused(f"adaptive pooling of {x.shape} to {tuple(size)}", "pool to a size that divides the input's")
    kernel = tuple(own // s for own, s in zip(x.shape[2:], size, strict=True))
    return layers.avg_pool(g, x, kernel, kernel, (0, 0, 0, 0), False, True)


@aten("linear")
def linear(g: Builder, x: Act, w: Any, b: Any = None) -> Act:
    return layers.linear(g, active(x), w, b)


@aten("matmul", "mm", "bmm")
def matmul(g: Builder, a: Any, b: Any) -> Act:
    return layers.matmul(g, a, b)


@aten("addmm", "baddbmm")
def addmm(g: Builder, bias: Any, a: Any, b: Any, beta: Any, alpha: Any) -> Act:
    if (beta, alpha) != (1, 1):
        raise Refused(f"addmm with beta {beta}, alpha {alpha}", "use 1")
    if isinstance(a, Act) and isinstance(b, Const) and b.rank == 2:
        return layers.linear(g, a, layers.transposed(g, b), bias)
    return g.add(layers.matmul(g, a, b), bias)


@aten("scaled_dot_product_attention")
def attention(
    g: Builder, q: Act, k: Act, v: Act, mask: Any, dropout: float, causal: bool, scale: Any, grouped: bool
) -> Act:
    return layers.attention(g, active(q), active(k), active(v), mask, causal, scale, grouped)


@aten("softmax", "_softmax", "_safe_softmax")
def softmax(g: Builder, x: Act, axis: int, *rest: Any) -> Act:
    return layers.softmax(g, x, axis)


@aten("mean.dim")
def mean(g: Builder, x: Act, axes: Any, keepdims: bool, dtype: Any) -> Act:
    return layers.mean(g, x, axes, keepdims)


@aten("mean.default")
def mean_all(g: Builder, x: Act, dtype: Any) -> Act:
    return layers.mean(g, x, None, False)


@aten("sum.dim_IntList")
def sum_(g: Builder, x: Act, axes: Any, keepdims: bool, dtype: Any) -> Act:
    y = layers.mean(g, x, axes, keepdims)
    return g.mul(y, float(np.prod(x.shape) / max(np.prod(y.shape), 1)))


@aten("var.correction")
def var(g: Builder, x: Act, axes: Any, correction: Any, keepdims: bool) -> Act:
    return layers.variance(g, x, axes, 1.0 if correction is None else float(correction), keepdims)


@aten("var.dim")
def var_dim(g: Builder, x: Act, axes: Any, unbiased: bool, keepdims: bool) -> Act:
    return layers.variance(g, x, axes, float(unbiased), keepdims)
