"""sigmoid: y = 1 / (1 + exp(-x)), element-wise."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "sigmoid",
    real=lambda n, x: 1.0 / (1.0 + np.exp(-x)),
    torch=lambda T, n, x: T.sigmoid(x),
    onnx=lambda g, n, x: g("Sigmoid", x),
    doc=__doc__,
)
