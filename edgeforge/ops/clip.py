"""clip: y = min(max(x, low), high), element-wise."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "clip",
    real=lambda n, x: np.clip(x, n["low_real"], n["high_real"]),
    torch=lambda T, n, x: x.clamp(n["low_real"], n["high_real"]),
    onnx=lambda g, n, x: g("Clip", x, g.scalar(n["low_real"]), g.scalar(n["high_real"])),
    doc=__doc__,
)
