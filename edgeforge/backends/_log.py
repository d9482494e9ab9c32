"""Vendors' libraries print from native code: their chatter goes to a log file, our stdout stays clean."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeforge.errors import BackendFailed

#: Words that mark the lines of a native log worth showing.
TELLING = ("error", "fail", "unsupported", "not supported", "invalid", "exception", "abort", "fallback")


@contextmanager
def new_log(name: str) -> Iterator[Path]:
    """An empty log file in the system's temporary folder, removed at the end of the block unless that ends with an
    error that names it."""
    handle, path = tempfile.mkstemp(prefix=f"edgeforge-{name}-", suffix=".log")
    os.close(handle)
    named = False
    try:
        yield Path(path)
    except BackendFailed as error:
        named = path in str(error)
        raise
    finally:
        if not named:
            Path(path).unlink()


@contextmanager
def redirected(log: Path) -> Iterator[None]:
    """Append everything written to file descriptors 1 and 2, by Python or by native code, to ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(target)


def telling_lines(log: Path, most: int = 6) -> str:
    """The last lines of a log that speak of an error, or its last lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line.lower() for word in TELLING)]
    return "\n".join(f"    {line[:300]}" for line in (telling or lines)[-most:])
