"""What a step of a language model is fed besides its tokens: positions, attention masks, and the cache so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Added to the scores of what a token does not see. The mask's encoding need not reach so far: it saturates.
BLOCKED = np.float32(-100)


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
