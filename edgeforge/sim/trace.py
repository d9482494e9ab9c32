"""Traces: every value of one run in a folder, and the first node at which two runs part.

    trace.json          schema version, hash of the graph, rounding profile, and the values in the order of the run
    codes.safetensors   the integers of every input and node, by value name
    float.safetensors   their float32 shadow, by value name

The shadow is what the same graph computes in real numbers: torch float32 on the dequantized inputs, weights and
biases, with nothing rounded in between. Its distance from the dequantized codes is what rounding activations has cost
so far. (The bundle does not hold the original float model.)"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph
from edgeforge.ir.types import TensorType, Value
from edgeforge.sim.evaluate import dequantize_outputs, run_float
from edgeforge.sim.parity import Runner, parity, trace

SCHEMA = 1
INDEX, CODES, FLOATS = "trace.json", "codes.safetensors", "float.safetensors"


@dataclass(frozen=True)
class Entry:
    """A value of a run. op is "input" for what the graph was given; scale and zero_point are None for ids."""

    name: str
    op: str
    source: str
    scale: float | None
    zero_point: int | None


@dataclass(frozen=True)
class Trace:
    """``graph``: hash of the graph that ran (before it was given the rounding rules of ``profile``)."""

    graph: str
    profile: str
    entries: tuple[Entry, ...]
    codes: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Departure:
    """A value that differs between two runs. why: "codes" or "encoding"; identical: share of equal codes, 0..1;
    index: the first position that differs, with both codes there (None where encodings differ)."""

    name: str
    op: str
    source: str
    why: str
    identical: float | None = None
    max_lsb: int | None = None
    index: tuple[int, ...] | None = None
    a: int | None = None
    b: int | None = None


@dataclass(frozen=True)
class Comparison:
    """``departures`` in the order of the first run; ``only``: values that one run alone holds."""

    compared: int
    departures: tuple[Departure, ...]
    only: tuple[str, ...]


def record(graph: Graph, feeds: Mapping[str, np.ndarray], graph_hash: str, profile: str) -> Trace:
    """Simulate an integer graph on codes and keep every value."""
    return Trace(graph_hash, profile, _entries(graph), trace(graph, feeds))


def record_artifact(
    backend: Runner, graph: Graph, target: Any, feeds: Mapping[str, np.ndarray], graph_hash: str, profile: str
) -> Trace:
    """What a backend computes for every node: ``graph`` with all its values as outputs, built and run anew.

    Raises BackendFailed when the backend refuses that graph."""
    exposed = graph.rebuild(outputs=tuple(node.output for node in graph.nodes))
    with tempfile.TemporaryDirectory(prefix="edgeforge-") as folder:
        backend.compile(exposed, target, Path(folder))
        outputs = backend.run(Path(folder), exposed, target, feeds)
    return Trace(graph_hash, profile, _entries(graph), {**feeds, **outputs})


def _entries(graph: Graph) -> tuple[Entry, ...]:
    nodes = [(name, "input", "") for name in graph.inputs] + [(n.output, n.op, n.source) for n in graph.nodes]
    found = []
    for name, op, source in nodes:
        q = graph.type(name).q
        scale, zero = (None, None) if q is None else (float(q.scale), q.zero)
        found.append(Entry(name, op, source, scale, zero))
    return tuple(found)


def shadow(graph: Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every value of an integer graph computed in real numbers from codes ``feeds``, float32, by value name."""
    values = {name: Value(name, _real(value.type), _real_data(value)) for name, value in graph.values.items()}
    nodes = [replace(node, rule="", fixed={}) for node in graph.nodes]
    found = dequantize_outputs(graph, feeds)
    run_float(
        graph.rebuild(nodes, values, level="float"),
        dict(found),
        lambda node, tensor: found.update({node.output: tensor.numpy()}),
    )
    return found


def _real(kind: TensorType) -> TensorType:
    return kind if kind.q is None else TensorType(kind.shape)


def _real_data(value: Value) -> np.ndarray | None:
    if value.data is None or value.type.q is None:
        return value.data
    return value.type.q.dequantize(value.data)


def write_trace(folder: Path, made: Trace, floats: Mapping[str, np.ndarray]) -> None:
    """Write ``made`` and its shadow. An earlier trace is replaced, any other non-empty folder is refused."""
    from safetensors.numpy import save_file

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / INDEX).is_file():
        raise InvalidInput(f"{folder} exists and is not a trace -> choose another --trace or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for name, arrays in ((CODES, made.codes), (FLOATS, floats)):
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / name)
    index = {
        "schema_version": SCHEMA,
        "graph": made.graph,
        "profile": made.profile,
        "values": [vars(entry) for entry in made.entries],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def read_trace(folder: Path) -> Trace:
    """Raises InvalidInput when ``folder`` holds no trace, a damaged one, or one of another schema version."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / INDEX).is_file():
        raise InvalidInput(f"{folder} is not a trace: no {INDEX} -> the folder that simulate --trace named")
    try:
        index = json.loads((folder / INDEX).read_text())
        version = index["schema_version"]
        if version != SCHEMA:
            raise InvalidInput(f"trace {folder}: schema version {version!r}, this EdgeForge reads {SCHEMA}")
        entries = tuple(Entry(**entry) for entry in index["values"])
        codes = load_file(folder / CODES)
        missing = [entry.name for entry in entries if entry.name not in codes]
        if missing:
            raise InvalidInput(f"trace {folder}: {CODES} lacks {missing[0]} -> simulate again")
        return Trace(index["graph"], index["profile"], entries, codes)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InvalidInput(f"trace {folder} is damaged ({error}) -> simulate again") from None


def compare(a: Trace, b: Trace) -> Comparison:
    """Every value that both runs hold, compared in the order of ``a``.

    Raises InvalidInput when they have no value in common, or one in different shapes."""
    other = {entry.name: entry for entry in b.entries}
    common = [entry for entry in a.entries if entry.name in other]
    if not common:
        raise InvalidInput("the traces have no value in common -> traces of the same model")
    departures = []
    for entry in common:
        found = _departure(entry, other[entry.name], a.codes[entry.name], b.codes[entry.name])
        if found is not None:
            departures.append(found)
    names = {entry.name for entry in common}
    only = tuple(entry.name for entry in (*a.entries, *b.entries) if entry.name not in names)
    return Comparison(len(common), tuple(departures), only)


def _departure(entry: Entry, other: Entry, a: np.ndarray, b: np.ndarray) -> Departure | None:
    if a.shape != b.shape:
        raise InvalidInput(f"{entry.name} is {a.shape} in one trace, {b.shape} in the other -> runs on the same inputs")
    if (entry.scale, entry.zero_point, a.dtype) != (other.scale, other.zero_point, b.dtype):
        return Departure(entry.name, entry.op, entry.source, "encoding")
    if np.array_equal(a, b):
        return None
    identical, worst = parity(a, b)
    index = tuple(int(i) for i in np.argwhere(a != b)[0])
    return Departure(entry.name, entry.op, entry.source, "codes", identical, worst, index, int(a[index]), int(b[index]))
