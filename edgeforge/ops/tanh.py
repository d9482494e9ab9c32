"""tanh: y = tanh(x), element-wise."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "tanh",
    real=lambda n, x: np.tanh(x),
    torch=lambda T, n, x: T.tanh(x),
    onnx=lambda g, n, x: g("Tanh", x),
    doc=__doc__,
)
