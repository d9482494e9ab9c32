"""relu: y = max(x, 0), element-wise."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "relu",
    real=lambda n, x: np.maximum(x, 0.0),
    torch=lambda T, n, x: T.relu(x),
    onnx=lambda g, n, x: g("Relu", x),
    doc=__doc__,
)
