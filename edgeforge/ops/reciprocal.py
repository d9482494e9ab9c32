"""reciprocal: y = 1 / x, element-wise (the code of 0 gives the highest code)."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "reciprocal",
    real=lambda n, x: 1.0 / np.where(x == 0, np.finfo(np.float32).tiny, x),
    torch=lambda T, n, x: T.reciprocal(x),
    onnx=lambda g, n, x: g("Reciprocal", x),
    doc=__doc__,
)
