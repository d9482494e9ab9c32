"""Blocks of one node's work, spread over as many threads as torch uses.

Everything that runs here leaves Python's lock: compiled kernels, NumPy's loops, torch's matrix products (each of which
then uses one thread). One pool for all of them keeps two thread pools from fighting over the cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "edgeforge", torch.set_num_threads, (1,))


os.register_at_fork(after_in_child=_pool.cache_clear)


def spread(work: Callable[[Any], None], blocks: Iterable[Any]) -> None:
    """Call ``work`` on every block, in any order; returns when all are done, raises what one raised.

    A single block runs in the calling thread, where torch's own threads are at its disposal."""
    blocks = list(blocks)
    threads = min(torch.get_num_threads(), len(blocks))
    if threads < 2:
        for block in blocks:
            work(block)
        return
    shared = iter(blocks)
    for done in [_pool(torch.get_num_threads()).submit(_drain, work, shared) for _ in range(threads)]:
        done.result()


def _drain(work: Callable[[Any], None], blocks: Iterator[Any]) -> None:
    for block in blocks:
        work(block)


def ranges(count: int, step: int) -> list[slice]:
    """0..count in pieces of at most ``step``, as equal as that allows."""
    pieces = max(-(-count // step), 1)
    edges = [count * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


class Scratch(threading.local):
    """Buffers of the current thread, one per use, that are taken again and again."""

    def __init__(self) -> None:
        self.buffers: dict[str, np.ndarray] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Uninitialized array, valid until the same thread takes ``use`` again."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if use not in self.buffers or self.buffers[use].nbytes < size:
            self.buffers[use] = np.empty(size, np.uint8)
        return self.buffers[use][:size].view(dtype).reshape(shape)
