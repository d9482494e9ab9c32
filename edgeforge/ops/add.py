"""add: y = sa * (a - za) + sb * (b - zb), requantized; broadcasts."""

from edgeforge.ops._broadcast import binary, tosa_sum

binary("add", lambda T, n, a, b: a + b, "Add", tosa_sum("ADD"), __doc__)
