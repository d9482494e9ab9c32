"""hardswish: y = x * clip(x + 3, 0, 6) / 6, element-wise."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "hardswish",
    real=lambda n, x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    torch=lambda T, n, x: T.nn.functional.hardswish(x),
    onnx=lambda g, n, x: g("HardSwish", x),
    doc=__doc__,
)
