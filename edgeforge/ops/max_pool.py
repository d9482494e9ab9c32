"""max_pool: maximum over ``kernel`` windows; padding never wins."""

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
    x = k.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), 0)
    return np.ascontiguousarray(k.windows(x, n["kernel"], n["stride"]).max((-2, -1)))


def onnx(g: Any, n: NodeView, x: str) -> str:
    return g("MaxPool", x, kernel_shape=n["kernel"], strides=n["stride"], pads=n["pads"])


def torch(T: Any, n: NodeView, x: Any) -> Any:
    top, left, bottom, right = n["pads"]
    padding = (top, left)
    if padding != (bottom, right):
        x, padding = T.nn.functional.pad(x, (left, right, top, bottom), value=float("-inf")), (0, 0)
    return T.nn.functional.max_pool2d(x, n["kernel"], n["stride"], padding)


def tosa(g: Any, n: NodeView, x: str) -> str:
    x, pads = g.fitted(g.nhwc(x), n["kernel"], n["stride"], n["pads"])
    batch, channels, height, width = n.out.shape
    windows = {"kernel": n["kernel"], "stride": n["stride"], "pad": pads, "nan_mode": "PROPAGATE"}
    return g.nchw(g.move("MAX_POOL2D", x, [], (batch, height, width, channels), **windows))


register(Op("max_pool", (Port("x"),), infer, integer, move_cost, onnx, torch, tosa, shared=True, doc=__doc__))
