"""neg: y = -x, element-wise."""

from edgeforge.ops._unary import unary

unary(
    "neg",
    real=lambda n, x: -x,
    torch=lambda T, n, x: -x,
    onnx=lambda g, n, x: g("Neg", x),
    doc=__doc__,
)
