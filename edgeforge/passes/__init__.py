"""Rewrites of float graphs: functions Graph -> Graph, run in the order of `OPTIMIZE`."""

from __future__ import annotations

from edgeforge.ir.graph import Graph
from edgeforge.ir.verify import verify
from edgeforge.passes.dead import remove_dead
from edgeforge.passes.fold import fold_constants
from edgeforge.passes.fuse import fuse_batch_norm, fuse_clamp, fuse_silu
from edgeforge.passes.gelu import fuse_gelu
from edgeforge.passes.moves import bound_masks, hoist_scale, merge_moves
from edgeforge.passes.norm import fuse_norm
from edgeforge.passes.pool import keep_pooled_axes

OPTIMIZE = (
    fold_constants,
    keep_pooled_axes,
    merge_moves,
    hoist_scale,
    fuse_norm,
    fuse_batch_norm,
    fuse_silu,
    fuse_gelu,
    fuse_clamp,
    bound_masks,
    remove_dead,
)


def optimize(graph: Graph) -> Graph:
    """Fold constants, fuse, and drop what nothing reads; the float result is unchanged up to rounding."""
    for step in OPTIMIZE:
        graph = verify(step(graph))
    return graph
