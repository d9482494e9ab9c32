"""silu: y = x * sigmoid(x), element-wise."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "silu",
    real=lambda n, x: x / (1.0 + np.exp(-x)),
    torch=lambda T, n, x: T.nn.functional.silu(x),
    onnx=lambda g, n, x: g("Mul", x, g("Sigmoid", x)),
    doc=__doc__,
)
