"""mul: y = requant((a - za) * (b - zb)); broadcasts."""

from typing import Any

from edgeforge.ir.graph import NodeView
from edgeforge.ops._broadcast import binary


def tosa(g: Any, n: NodeView, *names: str) -> str:
    """MUL of int32, without a shift of its own."""
    parts = [g.centered(g.of_rank(x, len(n.out.shape)), n.type(i)) for i, x in enumerate(names)]
    return g.finish(n, g("MUL", [*parts, g.constant([0], "INT8")], n.out.shape, "INT32"))


binary("mul", lambda T, n, a, b: a * b, "Mul", tosa, __doc__)
