"""Backends: one file each, found by name. A backend turns an integer graph into an artifact and runs it here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from edgeforge.errors import InvalidInput, Reason
from edgeforge.ir.graph import Graph
from edgeforge.target import Target

T = TypeVar("T")

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
    runs here, as every figure says it; ``timed``: whether its time is worth knowing (an emulator's is not);
    ``dynamic``: whether it takes linears that round their input as it comes."""

    name: str
    numerics: str
    source: str
    timed: bool
    dynamic: bool
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


def refusals(chosen: Backend, graphs: Iterable[Graph], target: Target) -> list[Reason]:
    """Everything in the graphs that the backend cannot take; what they have in common once."""
    found = []
    for graph in graphs:
        if not chosen.dynamic:
            why, remedy = f"{chosen.name} takes static encodings only", "export at w8a8 or w4a16-b32"
            dynamic = (node for node in graph.nodes if "dynamic" in node.attrs)
            found += [Reason(node.source or node.output, node.op, why, remedy) for node in dynamic]
        found += chosen.refusals(graph, target) if not found else []
    return list(dict.fromkeys(found))


@runtime_checkable
class Together(Protocol):
    """A backend that makes more of several graphs (prefill and decode) than one artifact of each."""

    def compile_together(self, graphs: Mapping[str, Graph], target: Target, folder: Path, shared: bool) -> Artifact:
        """Write what stands for ``graphs``, by part, into ``folder``. `run` and `opened` are given ``folder/<part>``,
        though. ``shared``: also what holds the weights once, even if it does not run here."""
        ...


def compile_parts(
    chosen: Backend, graphs: Mapping[str, Graph], target: Target, folder: Path, shared: bool = False
) -> Artifact:
    """One artifact of each graph in ``folder/<part>`` ("" is ``folder`` itself), or what the backend makes of all."""
    if len(graphs) > 1 and isinstance(chosen, Together):
        return chosen.compile_together(graphs, target, folder, shared)
    return apart(chosen, graphs, target, folder)


def apart(chosen: Backend, graphs: Mapping[str, Graph], target: Target, folder: Path) -> Artifact:
    """An artifact of each graph in ``folder/<part>``, described as one; what they have in common is said once."""
    made = {}
    for part, graph in graphs.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        made[part] = chosen.compile(graph, target, folder / part)
        if part and not any((folder / part).iterdir()):
            (folder / part).rmdir()
    found = list(made.values())
    return Artifact(
        files=tuple(f"{part}/{file}".lstrip("/") for part, artifact in made.items() for file in artifact.files),
        options={key: value for artifact in found for key, value in artifact.options.items()},
        edits=_once(artifact.edits for artifact in found),
        islands=_once(artifact.islands for artifact in found),
        notes=_once(artifact.notes for artifact in found),
        deterministic=all(artifact.deterministic for artifact in found),
    )


def _once(lists: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(item for found in lists for item in found))


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
