"""ONNX layers -> the op table: convolution, pooling, normalization, products, attention, reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeforge.frontend import layers
from edgeforge.frontend.builder import Act, Builder, Const, Refused
from edgeforge.frontend.onnx_ops import OnnxNode, fixed, ints, onnx


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


@onnx("ConvTranspose")
def conv_transpose(g: Builder, n: OnnxNode, x: Act, w: Any, b: Any = None) -> Act:
    rank = x.rank - 2
    stride, dilation = n.get("strides", [1] * rank), n.get("dilations", [1] * rank)
    if n.get("auto_pad", "NOTSET") not in ("NOTSET", "", "VALID") or n.get("output_shape", None):
        raise Refused("pads itself to an output shape", "give the pads")
    more, pads = n.get("output_padding", [0] * rank), n.get("pads", [0] * 2 * rank)
    return layers.conv_transpose(g, x, w, b, stride, pads, more, dilation, n.get("group", 1))


@onnx("Resize", "Upsample")
def resize(g: Builder, n: OnnxNode, x: Act, *rest: Any) -> Act:
    """Resize(x, roi, scales, sizes); before opset 11, and as Upsample: (x, scales), asymmetric and floor."""
    old = n.op == "Upsample" or n.opset < 11
    scales, sizes = ((*rest, None)[0], None) if old else (*rest[1:], None, None)[:2]
    factors = n.get("scales", []) if scales is None else fixed(scales, "scale").reshape(-1).tolist()
    size = ints(n, "sizes", sizes)
    mode, rounding = n.get("mode", "nearest"), n.get("nearest_mode", "round_prefer_floor")
    coordinates = "asymmetric" if old else n.get("coordinate_transformation_mode", "half_pixel")
    axes = [axis % x.rank for axis in n.get("axes", range(x.rank))]
    if len(size or factors) != len(axes):
        raise Refused(f"resizes {len(axes)} axes to {size or factors}", "give a size or a factor for each")
    wanted = dict(zip(axes, size or factors, strict=True))
    kept = all(wanted.get(axis, 1) in ((x.shape[axis],) if size else (1,)) for axis in axes if axis not in (2, 3))
    policy = n.get("keep_aspect_ratio_policy", "stretch")
    if mode not in ("nearest", "linear") or n.get("antialias", 0) or policy != "stretch" or not kept or x.rank != 4:
        raise Refused(
            f"resizes {x.shape} by {mode}", "nearest or linear, height and width of NCHW, without antialiasing"
        )
    last = [wanted.get(axis, x.shape[axis] if size else 1) for axis in (2, 3)]
    made = layers.resized(x, last if size else None, last)
    if coordinates in ("half_pixel_symmetric", "pytorch_half_pixel") and min(made) > 1:
        coordinates = "half_pixel"  # at whole sizes
    if coordinates not in ("half_pixel", "asymmetric", "align_corners"):
        raise Refused(f"resizes with {coordinates} coordinates", "half_pixel, asymmetric or align_corners")
    if mode == "linear":
        return layers.resize_bilinear(g, x, made, coordinates)
    return layers.resize_nearest(g, x, made, coordinates, "floor" if old else rounding)


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


@onnx("Attention")
def attention(g: Builder, n: OnnxNode, q: Any, k: Any, v: Any, mask: Any = None, *past: Any) -> Act:
    """[batch, heads, tokens, features], or [batch, tokens, heads * features] with head counts as attributes."""
    if any(p is not None for p in past) or n.get("softcap", 0.0) or n.outputs > 1:
        raise Refused("attends to a cache or caps its scores", "export without past keys and values")
    packed = q.rank == 3
    if packed:
        counts = (n.attrs["q_num_heads"], n.attrs["kv_num_heads"], n.attrs["kv_num_heads"])
        q, k, v = (
            g.swap(g.reshape(x, (*x.shape[:2], heads, -1)), 1, 2) for x, heads in zip((q, k, v), counts, strict=True)
        )
    y = layers.attention(g, q, k, v, mask, bool(n.get("is_causal", 0)), n.get("scale", None), grouped=True)
    return g.reshape(g.swap(y, 1, 2), (y.shape[0], y.shape[2], -1)) if packed else y


@onnx("IsNaN")
def is_nan(g: Builder, n: OnnxNode, x: Act) -> Const:
    """Never, in a graph that holds integers."""
    return Const(np.zeros(x.shape, bool))


@onnx("Softmax")
def softmax(g: Builder, n: OnnxNode, x: Act) -> Act:
    axis = n.get("axis", -1 if n.opset >= 13 else 1) % x.rank
    if n.opset < 13 and axis != x.rank - 1:
        raise Refused(f"opset {n.opset} normalizes all axes from {axis} on", "export with opset 13 or later")
    return layers.softmax(g, x, axis)


@onnx("ReduceMean", "ReduceSum")
def reduce(g: Builder, n: OnnxNode, x: Act, axes: Any = None) -> Act:
    chosen = ints(n, "axes", axes)
    if not chosen and n.get("noop_with_empty_axes", 0):
        return x
    y = layers.mean(g, x, chosen, bool(n.get("keepdims", 1)))
    return y if n.op == "ReduceMean" else g.mul(y, float(math.prod(x.shape) / max(math.prod(y.shape), 1)))
