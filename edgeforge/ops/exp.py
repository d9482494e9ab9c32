"""exp: y = exp(x), element-wise."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "exp",
    real=lambda n, x: np.exp(x),
    torch=lambda T, n, x: T.exp(x),
    onnx=lambda g, n, x: g("Exp", x),
    doc=__doc__,
)
