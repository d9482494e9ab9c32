"""conv_transpose2d: y = requant(sum((x - zx) * w) + b), each input element spread over a window, NCHW.

Weights [O, I/groups, KH, KW] per output channel, as a convolution's (ONNX and torch: [I, O/groups, KH, KW]).
``groups``: 1, or the number of channels (depthwise). ``output_padding``: more rows and columns at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import ACT, BIAS, WEIGHT, Cost, Op, Port, register
from edgeforge.ir.types import NUMPY


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


@dataclass(frozen=True)
class Phase:
    """The output's elements ``y[:, :, rows, columns]`` of shape [N, O, *size]: the convolution of stride 1 with
    ``weights`` [O, I/groups, M, N] whose first window lies ``corner`` above and left of the input."""

    rows: slice
    columns: slice
    size: tuple[int, int]
    weights: np.ndarray
    corner: tuple[int, int]


def phases(n: NodeView, w: np.ndarray) -> Iterator[Phase]:
    """One per place within a stride. Runtimes compute them apart: none sees the zeros between the elements."""
    kernel = [step * (side - 1) + 1 for step, side in zip(n["dilation"], w.shape[2:], strict=True)]
    wide = np.zeros((*w.shape[:2], *kernel), w.dtype)
    wide[:, :, :: n["dilation"][0], :: n["dilation"][1]] = w
    for at in np.ndindex(*n["stride"]):
        size = [-((p - side) // step) for p, side, step in zip(at, n.out.shape[2:], n["stride"], strict=True)]
        places = [divmod(p + pad, step) for p, pad, step in zip(at, n["pads"], n["stride"], strict=False)]
        (_, top), (_, left) = places
        part = wide[:, :, top :: n["stride"][0], left :: n["stride"][1]]
        if min(size) < 1:
            continue
        if part.size == 0:  # the bias alone
            part = np.zeros((*w.shape[:2], *(max(side, 1) for side in part.shape[2:])), w.dtype)
        corner = [side - 1 - first for side, (first, _) in zip(part.shape[2:], places, strict=True)]
        rows, columns = (slice(p, None, step) for p, step in zip(at, n["stride"], strict=True))
        yield Phase(rows, columns, (size[0], size[1]), part[:, :, ::-1, ::-1], (corner[0], corner[1]))


def integer(k: Any, n: NodeView, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    y = np.empty((len(x), *n.out.shape[1:]), NUMPY[n.out.dtype])
    for phase in phases(n, w):
        weights, seen = phase.weights, _seen(n, x, phase)
        weight_sum = weights.reshape(len(w), -1).sum(1, dtype=np.int64)
        product = partial(k.conv2d, w=weights, stride=(1, 1), dilation=(1, 1), groups=n["groups"])
        y[:, :, phase.rows, phase.columns] = k.dot(n, seen, weights, weight_sum, b, product)
    return y


def _seen(n: NodeView, x: np.ndarray, phase: Phase) -> np.ndarray:
    """x as far as the windows of a phase reach, real zeros around it."""
    size = [count + side - 1 for count, side in zip(phase.size, phase.weights.shape[2:], strict=True)]
    seen = np.full((*x.shape[:2], *size), n.zero(0), x.dtype)
    places = [np.arange(length) - first for length, first in zip(size, phase.corner, strict=True)]
    rows, columns = (np.flatnonzero((at >= 0) & (at < x.shape[i + 2])) for i, at in enumerate(places))
    seen[:, :, rows[:, None], columns] = x[:, :, places[0][rows, None], places[1][columns]]
    return seen


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
