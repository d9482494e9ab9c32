"""add: y = sa * (a - za) + sb * (b - zb), requantized; broadcasts."""

from edgeforge.ops._broadcast import binary

binary("add", lambda T, n, a, b: a + b, "Add", __doc__)
