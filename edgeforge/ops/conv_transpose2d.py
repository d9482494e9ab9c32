"""conv_transpose2d: y = requant(sum((x - zx) * w) + b), each input element spread over a window, NCHW.

Weights [O, I/groups, KH, KW] per output channel, as a convolution's (ONNX and torch have [I, O/groups, KH, KW]).
``groups`` is 1, or the number of channels of a depthwise layer. ``output_padding``: rows and columns more at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import ACT, BIAS, WEIGHT, Cost, Op, Port, register


def infer(n: NodeView) -> tuple[int, ...]:
    (batch, channels, *size), (out, depth, *kernel), groups = n.shape(0), n.shape(1), n["groups"]
    n.require(channels == depth * groups, f"{channels} input channels, weights take {depth} x {groups} groups")
    n.require(groups == 1 or groups == out == channels, f"{groups} groups of {channels} to {out} channels")
    made = []
    for i in (0, 1):
        more, longest = n["output_padding"][i], max(n["stride"][i], n["dilation"][i])
        n.require(0 <= more < longest, f"output padding {more} is not below the stride or the dilation, {longest}")
        reach = (size[i] - 1) * n["stride"][i] + n["dilation"][i] * (kernel[i] - 1) + 1
        made.append(reach + more - n["pads"][i] - n["pads"][i + 2])
    n.require(min(made) > 0, f"pads {n['pads']} leave nothing of {n.shape(0)}")
    return (batch, out, *made)


def integer(k: Any, n: NodeView, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """A convolution of the spread input with kernels turned by half a turn."""
    weight_sum, turned = w.reshape(len(w), -1).sum(1, dtype=np.int64), w[:, :, ::-1, ::-1]
    return k.dot(
        n, spread_out(n, x), w, weight_sum, b, lambda part: k.conv2d(part, turned, (1, 1), n["dilation"], n["groups"])
    )


def spread_out(n: NodeView, x: np.ndarray) -> np.ndarray:
    """x [N, C, H, W] with real zeros between its elements (``stride``) and around them, so that the convolution with
    stride 1 and without padding has the output's size."""
    reach = [step * (side - 1) for step, side in zip(n["dilation"], n.shape(1)[2:], strict=True)]
    size = [n.out.shape[i + 2] + reach[i] for i in (0, 1)]
    wide = np.full((*x.shape[:2], *size), n.zero(0), x.dtype)
    places = [reach[i] - n["pads"][i] + n["stride"][i] * np.arange(x.shape[i + 2]) for i in (0, 1)]
    rows, columns = (np.flatnonzero((at >= 0) & (at < size[i])) for i, at in enumerate(places))
    wide[:, :, places[0][rows, None], places[1][columns]] = x[:, :, rows[:, None], columns]
    return wide


def cost(n: NodeView) -> Cost:
    batch, _, height, width = n.shape(0)
    weights = sum(n.type(i).nbytes for i in range(1, n.arity))
    return Cost(batch * height * width * n.type(1).size, weights, n.type(0).nbytes, n.out.nbytes)


def onnx(g: Any, n: NodeView, x: str, w: str, *bias: str) -> str:
    attributes = {"strides": n["stride"], "pads": n["pads"], "dilations": n["dilation"], "group": n["groups"]}
    w = w if n["groups"] > 1 else g.permuted(n, w, (1, 0, 2, 3))
    return g.clamp(n, g("ConvTranspose", x, w, *bias, output_padding=n["output_padding"], **attributes))


def torch(T: Any, n: NodeView, x: Any, w: Any, b: Any = None) -> Any:
    top, left, bottom, right = n["pads"]
    even = (top, left) == (bottom, right)
    w = w if n["groups"] > 1 else w.transpose(0, 1)
    sizes = (n["stride"], (top, left) if even else (0, 0), n["output_padding"], n["groups"], n["dilation"])
    y = T.nn.functional.conv_transpose2d(x, w, b, *sizes)
    if not even:
        height, width = infer(n)[2:]
        y = y[:, :, top : top + height, left : left + width]
    return y.clamp(*n["clamp"]) if "clamp" in n.attrs else y


def tosa(g: Any, n: NodeView, x: str, *names: str) -> str:
    """TRANSPOSE_CONV2D; it has no groups and no dilation."""
    if n["groups"] > 1 or max(n["dilation"]) > 1:
        g.refuse("TOSA's transposed convolution has no groups and no dilation", "one group, dilation 1")
    weights = n.data(1)
    assert weights is not None
    top, left, bottom, right = n["pads"]
    more = [more - end for more, end in zip(n["output_padding"], (bottom, right), strict=True)]
    windows = {"out_pad": [-top, more[0], -left, more[1]], "stride": n["stride"], "local_bound": False}
    batch, channels, height, width = n.out.shape
    operands = g.operands(n, g.nhwc(x), weights.transpose(0, 2, 3, 1), g.bias(n), n.type(1).dtype.replace("i", "INT"))
    shape = (batch, height, width, channels)
    return g.nchw(g.finish(n, g("TRANSPOSE_CONV2D", operands, shape, "INT32", acc_type="INT32", **windows)))


PORTS = (Port("x", ACT), Port("w", WEIGHT, const=True), Port("b", BIAS, const=True, optional=True))
register(Op("conv_transpose2d", PORTS, infer, integer, cost, onnx, torch, tosa, numerics="dot", doc=__doc__))
