"""What a step of a language model is fed besides its tokens: positions, attention masks, and the cache so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgeforge.ir.graph import Graph
from edgeforge.ir.op import OPS
from edgeforge.quantize.calibrate import Range

#: Added to the scores of what a token does not see. The mask's encoding need not reach so far: it saturates.
BLOCKED = np.float32(-100)

#: exp of it is nothing at 16 bits: how far blocked scores lie below all others.
MARGIN = 16.0


def positions_and_masks(
    starts: Sequence[int], chunk: int, count: int, past: int, windows: Sequence[int | None]
) -> tuple[np.ndarray, ...]:
    """int64 positions [B, chunk], then per window a float32 mask [B, 1, chunk, past + chunk], for sequences of which
    ``starts`` tokens are in the cache (in its first rows) and whose next ``count`` end the chunk; before is padding."""
    place = np.arange(chunk) - (chunk - count)
    start = np.asarray(starts)[:, None]
    rows = np.arange(past)[None]
    cached = np.where(rows < start, rows, np.inf)
    own = np.where(place >= 0, start + place, np.inf)
    column = np.concatenate([cached, own], 1)[:, None]
    positions = np.maximum(start + place, 0)
    row = positions[:, :, None]
    itself = np.concatenate([np.zeros((chunk, past), bool), np.eye(chunk, dtype=bool)], 1) & (place < 0)[:, None]
    masks = []
    for window in windows:
        seen = (column <= row) & (column > row - (np.inf if window is None else window)) | itself
        masks.append(np.where(seen, np.float32(0), BLOCKED)[:, None])
    return (positions.astype(np.int64), *masks)


def pieces(count: int, start: int, chunk: int, context: int) -> list[int]:
    """How ``count`` tokens behind ``start`` cached ones are fed: sizes of the steps; 1 stands for a decode step.

    The first prefill step is the partial one, so that the last token is always the last of its chunk. A prefill step
    begins where its cache reaches: decode steps do the rest."""
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        size = left % chunk or chunk
        fits = start + sum(sizes) <= context - chunk
        sizes.append(size if size > 1 and fits else 1)
    return sizes


def within_masks(graph: Graph, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges in which masks waste nothing: blocked scores get the lowest code, MARGIN below all others.

    The mask reaches far enough for that from the highest score: whatever is blocked has the same code, in prefill and
    in decode alike."""
    changed, reach = dict(ranges), {}
    for node in graph.nodes:
        masks = [name for name in node.inputs if name.startswith("mask.")]
        if node.op == "add" and masks:
            (scores,) = (name for name in node.inputs if name not in masks)
            low, high = ranges[scores]
            changed[node.output] = (low - MARGIN, high)
            reach[masks[0]] = min(reach.get(masks[0], 0.0), low - high - MARGIN)
    return changed | {mask: (low, 0.0) for mask, low in reach.items()}


def where_it_matters(graph: Graph, ranges: Mapping[str, Range], bits: Mapping[str, int]) -> dict[str, Range]:
    """Ranges without what silu and gelu take to nothing: 8-bit gates far below 0, whose result is less than half a step
    of its encoding. Squared error alone would keep them, at the price of the step."""
    import torch

    changed, readers = dict(ranges), graph.users()
    for node in graph.nodes:
        name = node.inputs[0]
        if node.op in ("silu", "gelu") and bits.get(name) == 8 and len(readers[name]) == 1:
            low, high = ranges[name]
            x = torch.linspace(min(low, 0.0), 0.0, 512)
            result = OPS[node.op].torch(torch, graph.view(node), x).abs()
            felt = x[result > (ranges[node.output][1] - ranges[node.output][0]) / 510]
            changed[name] = (max(low, float(felt.min()) if len(felt) else 0.0), high)
    return changed
