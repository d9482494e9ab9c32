"""sub: y = sa * (a - za) - sb * (b - zb), requantized; broadcasts."""

from edgeforge.ops._broadcast import binary, tosa_sum

binary("sub", lambda T, n, a, b: a - b, "Sub", tosa_sum("SUB"), __doc__)
