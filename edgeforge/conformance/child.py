"""A child process that compiles and runs graphs on one backend: its imports are paid once, its aborts cost a batch."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import edgeforge.ops  # noqa: F401  (the child starts with an empty op table)
from edgeforge.backends import backend
from edgeforge.backends._log import new_log, telling_lines
from edgeforge.errors import BackendFailed
from edgeforge.ir.graph import Graph
from edgeforge.target import Target

#: Longest one batch may take, in seconds.
TIMEOUT_S = 600
#: Most data that it may hold, in bytes: HTP's compiler never ends on a few small graphs and takes all memory there is.
MEMORY = 4 << 30
#: What compilers raise to refuse a graph; anything else ends the child with its traceback in the log.
REFUSALS = (BackendFailed, RuntimeError, ValueError, TypeError, AssertionError, LookupError)


class Child:
    """``with Child(name, target) as child: outputs, islands = child.run(graph, feeds)``"""

    def __init__(self, name: str, target: Target):
        self.name, self.target = name, target
        self.process: Any = None
        self._left = ExitStack()

    def run(self, graph: Graph, feeds: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """Output codes, and the nodes that ran in float. Raises BackendFailed when the runtime refuses or dies."""
        if self.process is None:
            self.start()
        try:
            self.pipe.send((graph, dict(feeds)))
            if not self.pipe.poll(TIMEOUT_S):
                self.stop()
                raise BackendFailed(f"{self.name}: no result after {TIMEOUT_S} s")
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.stop()
            raise BackendFailed(
                f"{self.name}: the runtime aborted its process:\n{telling_lines(self.log, 1)}"
            ) from None
        if isinstance(answer, str):
            raise BackendFailed(answer)
        return answer

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.name, self.target, self.log), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        """End the child: by closing its pipe, or by force where it is busy or stuck."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(5)
            self.process.kill()
            self.process.join()
            self.process = None

    def __enter__(self) -> Child:
        self.log = self._left.enter_context(new_log(f"conformance-{self.name}"))
        self._left.callback(self.stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.__exit__(kind, error, at)


def _serve(pipe: Connection, name: str, target: Target, log: Path) -> None:
    """Answer (graph, feeds) with (outputs, islands), or with the text of a refusal, until the pipe closes."""
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    chosen = backend(name)
    while True:
        try:
            graph, feeds = pipe.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory(prefix="edgeforge-") as folder:
            try:
                artifact = chosen.compile(graph, target, Path(folder))
                answer: Any = (chosen.run(Path(folder), graph, target, feeds), artifact.islands)
            except REFUSALS as error:
                answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)
