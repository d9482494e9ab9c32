"""erf: y = erf(x), the Gauss error function, element-wise."""

import math

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "erf",
    real=lambda n, x: np.vectorize(math.erf, otypes=[np.float64])(x),
    torch=lambda T, n, x: T.erf(x),
    onnx=lambda g, n, x: g("Erf", x),
    doc=__doc__,
)
