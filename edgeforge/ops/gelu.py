"""gelu: y = x * Phi(x), exact (erf) or its tanh approximation (attribute ``approximate``), element-wise."""

from math import erf, pi, sqrt

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ops._unary import unary


def real(n: NodeView, x: np.ndarray) -> np.ndarray:
    if n["approximate"] == "tanh":
        return 0.5 * x * (1.0 + np.tanh(sqrt(2.0 / pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + np.vectorize(erf, otypes=[np.float64])(x / sqrt(2.0)))


unary(
    "gelu",
    real=real,
    torch=lambda T, n, x: T.nn.functional.gelu(x, approximate=n["approximate"]),
    onnx=lambda g, n, x: g("Gelu", x, approximate=n["approximate"]),
    doc=__doc__,
)
