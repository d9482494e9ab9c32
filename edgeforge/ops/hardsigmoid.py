"""hardsigmoid: y = clip(x / 6 + 1 / 2, 0, 1), element-wise."""

import numpy as np

from edgeforge.ops._unary import unary

unary(
    "hardsigmoid",
    real=lambda n, x: np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    torch=lambda T, n, x: T.nn.functional.hardsigmoid(x),
    onnx=lambda g, n, x: g("HardSigmoid", x, alpha=1 / 6, beta=0.5),
    doc=__doc__,
)
