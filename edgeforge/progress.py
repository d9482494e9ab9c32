"""Progress of long work, on stderr, when a person is watching."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """``items``, with a progress bar of ``total`` steps while stderr is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    yield from bar(items, f"  {text}", total, console=Console(stderr=True), transient=True)
