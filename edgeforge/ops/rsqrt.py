"""rsqrt: y = 1 / sqrt(x), element-wise (codes of numbers below the smallest float give the highest code)."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "rsqrt",
    real=lambda n, x: 1.0 / np.sqrt(np.maximum(x, np.finfo(np.float32).tiny)),
    torch=lambda T, n, x: T.rsqrt(x),
    onnx=lambda g, n, x: g("Reciprocal", g("Sqrt", x)),
    doc=__doc__,
)
