"""Rewrites of float graphs: functions Graph -> Graph, run in the order of `OPTIMIZE`."""

from __future__ import annotations

from edgeforge.ir.graph import Graph
from edgeforge.ir.verify import verify
from edgeforge.passes.dead import remove_dead
from edgeforge.passes.fold import fold_constants
from edgeforge.passes.fuse import fuse_batch_norm, fuse_clamp, fuse_silu

OPTIMIZE = (fold_constants, fuse_batch_norm, fuse_silu, fuse_clamp, remove_dead)


def optimize(graph: Graph) -> Graph:
    """Fold constants, fuse, and drop what nothing reads; the float result is unchanged up to rounding."""
    for step in OPTIMIZE:
        graph = verify(step(graph))
    return graph
