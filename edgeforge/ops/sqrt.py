"""sqrt: y = sqrt(max(x, 0)), element-wise (codes of negative numbers give 0)."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "sqrt",
    real=lambda n, x: np.sqrt(np.maximum(x, 0.0)),
    torch=lambda T, n, x: T.sqrt(x),
    onnx=lambda g, n, x: g("Sqrt", x),
    doc=__doc__,
)
