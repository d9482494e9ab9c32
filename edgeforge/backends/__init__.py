"""Backends: one file each, found by name. A backend turns an integer graph into an artifact and runs it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeforge.errors import InvalidInput, Reason
from edgeforge.ir.graph import Graph
from edgeforge.target import Target

Codes = Mapping[str, np.ndarray]
#: One run of an artifact: codes in, codes out, for the batch that the graph declares.
Step = Callable[[Codes], Mapping[str, np.ndarray]]


#: `Backend.source` of runtimes that compute here as they do on a phone's CPU, and of those that stand in for an NPU.
HOST, HTP_EMULATOR = "this host's CPU", "emulated (HTP on x86-64)"


@dataclass(frozen=True)
class Edit:
    """One deviation of an artifact from the graph: a dropped, forced or re-encoded detail, and why."""

    where: str
    what: str
    why: str


@dataclass(frozen=True)
class Artifact:
    """What `compile` wrote. files: names inside its folder; options: what the runtime must be given; islands: nodes
    that run in float there; deterministic: built twice, the bytes are equal."""

    files: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    islands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    deterministic: bool = True


class Backend(Protocol):
    """``numerics``: the profile of its runtime (fixed.PROFILES), or "" for the target's own. ``source``: what
    runs here, as every figure says it; ``timed``: whether its time is worth knowing (an emulator's is not)."""

    name: str
    numerics: str
    source: str
    timed: bool
    summary: str

    def missing(self) -> str:
        """Why it cannot compile in this environment and what to install, or ""."""
        ...

    def cannot_run(self) -> str:
        """Why its artifacts cannot run in this environment and what to install, or ""."""
        ...

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        """Everything in the graph that this backend cannot take."""
        ...

    def compile(self, graph: Graph, target: Target, folder: Path) -> Artifact:
        """Write the artifact for ``graph`` into ``folder``. Raises BackendFailed naming its log."""
        ...

    def run(self, folder: Path, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        """Output codes of the artifact for input codes ``feeds`` (any batch), by value name of ``graph``."""
        ...

    def opened(
        self, folder: Path, graph: Graph, target: Target, threads: int | None = None
    ) -> AbstractContextManager[Step]:
        """The artifact, loaded once for many runs. threads: None is the runtime's own choice; emulators take no notice
        of it."""
        ...


def names() -> list[str]:
    """Every backend, by file name."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def backend(name: str) -> Backend:
    """The backend of that name; imports its runtime only when it compiles or runs."""
    if name not in names():
        raise InvalidInput(f"unknown backend {name!r} -> one of {', '.join(names())}")
    found = import_module(f"{__name__}.{name}").BACKEND
    assert found.name == name, f"backends/{name}.py calls itself {found.name}"
    return found
