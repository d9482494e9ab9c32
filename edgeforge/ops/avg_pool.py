"""avg_pool: mean over ``kernel`` windows, padding (real 0) counted; requantized."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import Op, Port, move_cost, register


def infer(n: NodeView) -> tuple[int, ...]:
    batch, channels, height, width = n.shape(0)
    (kh, kw), (sh, sw), (top, left, bottom, right) = n["kernel"], n["stride"], n["pads"]
    y, x = (height + top + bottom - kh) // sh + 1, (width + left + right - kw) // sw + 1
    n.require(y > 0 and x > 0, f"kernel {kh}x{kw} exceeds the padded input {n.shape(0)}")
    return (batch, channels, y, x)


def integer(k: Any, n: NodeView, x: np.ndarray) -> np.ndarray:
    top, left, bottom, right = n["pads"]
    x = k.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), n.zero(0))
    centered = k.windows(x, n["kernel"], n["stride"]).astype(np.int64) - n.zero(0)
    return k.apply(n, centered.sum((-2, -1)))


def onnx(g: Any, n: NodeView, x: str) -> str:
    attributes = {"kernel_shape": n["kernel"], "strides": n["stride"], "pads": n["pads"]}
    return g("AveragePool", x, count_include_pad=1, **attributes)


def torch(T: Any, n: NodeView, x: Any) -> Any:
    top, left, bottom, right = n["pads"]
    x = T.nn.functional.pad(x, (left, right, top, bottom)) if any(n["pads"]) else x
    return T.nn.functional.avg_pool2d(x, n["kernel"], n["stride"])


def tosa(g: Any, n: NodeView, x: str) -> str:
    """AVG_POOL2D to a code of the input's encoding, RESCALE. Padding comes first: AVG_POOL2D does not count its own."""
    top, left, bottom, right = n["pads"]
    x = g.nhwc(x)
    if any(n["pads"]):
        x = g.pad(x, [0, 0, top, bottom, left, right, 0, 0], n.type(0))
    x, _ = g.fitted(x, n["kernel"], n["stride"], (0, 0, 0, 0))
    zeros = [g.zero_point(n.type(0)), g.zero_point(n.type(0))]
    batch, channels, height, width = n.out.shape
    windows = {"kernel": n["kernel"], "stride": n["stride"], "pad": (0, 0, 0, 0), "acc_type": "INT32"}
    mean = g("AVG_POOL2D", [x, *zeros], (batch, height, width, channels), **windows)
    return g.nchw(g.function(n, mean))


register(Op("avg_pool", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, numerics="mean", doc=__doc__))
