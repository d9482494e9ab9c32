"""relu: y = max(x, 0), element-wise."""

from typing import Any

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.types import RANGE
from edgeforge.ops._unary import unary


def onnx(g: Any, n: NodeView, x: str) -> str:
    """Nothing where no code lies below zero."""
    return x if n.q(0) == n.q(-1) and n.zero(0) == 0 else g.limit(n, "Max", x, n.zero(-1))


def tosa(g: Any, n: NodeView, x: str) -> str:
    """CLAMP within one encoding."""
    same = n.q(0) == n.q(-1) and n.type(0).dtype == n.out.dtype
    return g.clamp(x, (n.zero(0), RANGE[n.out.dtype][1]), n.out.dtype) if same else g.function(n, x)


unary(
    "relu",
    real=lambda n, x: np.maximum(x, 0.0),
    torch=lambda T, n, x: T.relu(x),
    onnx=onnx,
    tosa=tosa,
    doc=__doc__,
)
