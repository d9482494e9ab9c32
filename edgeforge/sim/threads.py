"""Blocks of one node's work, spread over as many threads as torch uses."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch


class _Width(threading.local):
    threads = 1


_width = _Width()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "edgeforge", torch.set_num_threads, (1,))


os.register_at_fork(after_in_child=_pool.cache_clear)


@contextmanager
def own_threads() -> Iterator[None]:
    """While this lasts, `spread` has the threads that torch has been given, and torch itself has one: two pools would
    fight over the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _width.threads = threads
    try:
        yield
    finally:
        _width.threads = 1
        torch.set_num_threads(threads)


def spread(work: Callable[[Any], None], blocks: Iterable[Any]) -> None:
    """Call ``work`` on every block, in any order; returns when all are done, raises what one raised. Everything but
    ``work``'s own Python runs in parallel: compiled kernels, NumPy's loops and torch's products leave Python's lock."""
    blocks = list(blocks)
    helpers = min(_width.threads, len(blocks)) - 1
    shared = iter(blocks)
    pending = [_pool(_width.threads - 1).submit(_drain, work, shared) for _ in range(helpers)]
    try:
        _drain(work, shared)
    finally:
        wait(pending)
    for done in pending:
        done.result()


def _drain(work: Callable[[Any], None], blocks: Iterator[Any]) -> None:
    for block in blocks:
        work(block)


def ranges(count: int, step: int) -> list[slice]:
    """0..count in pieces of at most ``step``, as equal as that allows."""
    pieces = max(-(-count // step), 1)
    edges = [count * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


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
