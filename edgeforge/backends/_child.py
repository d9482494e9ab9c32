"""Work in a child process: a vendor library that aborts becomes an error, its memory returns, stdout stays clean."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgeforge.backends._log import new_log, telling_lines
from edgeforge.errors import BackendFailed

#: Longest a compilation or a run may take, in seconds.
TIMEOUT_S = 3600


def in_child(name: str, module: str, request: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
    """Run ``python -m module REQUEST.json``. Its output goes to a log file, removed on success.

    Raises BackendFailed with the telling lines and the log's path when the child fails, aborts or hangs."""
    temporary = tempfile.TemporaryDirectory(prefix="edgeforge-")
    with new_log(name) as log, temporary as folder, log.open("ab") as stream:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(dict(request)))
        command = [sys.executable, "-m", module, str(file)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise BackendFailed(f"{name}: no result after {TIMEOUT_S} s; log: {log}") from None
        if done.returncode:
            how = f"exit code {done.returncode}"
            if done.returncode < 0:
                how = f"stopped by {signal.Signals(-done.returncode).name}"
            raise BackendFailed(f"{name}: the vendor's library failed ({how}); log: {log}\n{telling_lines(log)}")


def run_in_child(
    name: str,
    module: str,
    request: Mapping[str, Any],
    feeds: Mapping[str, np.ndarray],
    environment: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """`in_child` with arrays: the request gains ``feeds`` and ``outputs``, paths of .npz files to read and to write."""
    with tempfile.TemporaryDirectory(prefix="edgeforge-") as folder:
        paths = {key: str(Path(folder) / f"{key}.npz") for key in ("feeds", "outputs")}
        save_arrays(paths["feeds"], feeds)
        in_child(name, module, {**request, **paths}, environment)
        return load_arrays(paths["outputs"])


@contextmanager
def served(
    name: str, module: str, request: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]]:
    """A child that answers one set of feeds after another (see `serve`) until the block ends.

    Raises BackendFailed when it fails or aborts, with the telling lines of its log and the log's path."""
    ours, theirs = socket.socketpair()
    temporary = tempfile.TemporaryDirectory(prefix="edgeforge-")
    with new_log(name) as log, temporary as folder, log.open("ab") as stream:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps({**request, "socket": theirs.fileno()}))
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(file)],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        line = Connection(ours.detach())

        def step(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            try:
                line.send_bytes(_packed(feeds))
                return load_arrays(io.BytesIO(line.recv_bytes()))
            except (EOFError, OSError):
                how = f"exit code {child.wait()}"
                raise BackendFailed(f"{name}: stopped with {how}; log: {log}\n{telling_lines(log)}") from None

        try:
            yield step
        finally:
            line.close()
            child.wait(TIMEOUT_S)


def serve(descriptor: int, step: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> None:
    """The child's side of `served`: answer until the parent hangs up."""
    line = Connection(descriptor)
    with suppress(EOFError):
        while True:
            line.send_bytes(_packed(step(load_arrays(io.BytesIO(line.recv_bytes())))))


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    save_arrays(stream, arrays)
    return stream.getvalue()


def save_arrays(path: str | IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays with any names (value names may hold what a zip member's must not)."""
    names = list(arrays)
    listed = {f"a{i}": arrays[name] for i, name in enumerate(names)}
    np.savez(path, **{"names": np.array(names)}, **listed)  # type: ignore[arg-type]


def load_arrays(path: str | IO[bytes]) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {str(name): file[f"a{i}"] for i, name in enumerate(file["names"])}


def in_batches(
    run: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]],
    sizes: Mapping[str, int],
    feeds: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Feed a fixed-batch session sample by sample. sizes: leading dimension that the session takes, by input; an input
    that holds one such piece is given to every sample. Raises ValueError when the counts of samples disagree."""
    counts = {name: len(array) // sizes[name] for name, array in feeds.items()}
    total = max(counts.values(), default=1)
    wrong = {name: count for name, count in counts.items() if count not in (1, total)}
    if wrong:
        raise ValueError(f"inputs hold {total} and {wrong} samples")
    pieces: list[Mapping[str, np.ndarray]] = []
    for i in range(total):
        at = {name: i if counts[name] > 1 else 0 for name in feeds}
        pieces.append(
            run({name: a[at[name] * sizes[name] : (at[name] + 1) * sizes[name]] for name, a in feeds.items()})
        )
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
