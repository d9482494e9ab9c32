"""mul: y = requant((a - za) * (b - zb)); broadcasts."""

from edgeforge.ops._broadcast import binary

binary("mul", lambda T, n, a, b: a * b, "Mul", __doc__)
