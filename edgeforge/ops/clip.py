"""clip: y = min(max(x, low), high), element-wise."""

from typing import Any

import numpy as np

from edgeforge.ir.fixed import limit_codes
from edgeforge.ir.graph import NodeView
from edgeforge.ops._unary import unary


def onnx(g: Any, n: NodeView, x: str) -> str:
    low, high = limit_codes(n, (n["low_real"], n["high_real"]))
    return g.limit(n, "Min", g.recoded(n, g.limit(n, "Max", x, low)), high)


unary(
    "clip",
    real=lambda n, x: np.clip(x, n["low_real"], n["high_real"]),
    torch=lambda T, n, x: x.clamp(n["low_real"], n["high_real"]),
    onnx=onnx,
    doc=__doc__,
)
