"""sub: y = sa * (a - za) - sb * (b - zb), requantized; broadcasts."""

from edgeforge.ops._broadcast import binary

binary("sub", lambda T, n, a, b: a - b, "Sub", __doc__)
