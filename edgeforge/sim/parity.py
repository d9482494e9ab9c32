"""parity: how far two runs of one graph agree, over all outputs and node by node with the reference's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.rules import RULES
from edgeforge.ir.types import Value
from edgeforge.sim.evaluate import simulate

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class NodeParity:
    """Agreement of one node's output codes when both runs read the reference's codes. identical: share, 0..1;
    max_lsb: largest difference in output codes; bias_lsb: mean signed difference (run - reference). rule, status: the
    rounding rule of the reference ("move": no rounding), and whether it is exact, bounded or unverified."""

    node: str
    op: str
    rule: str
    status: str
    source: str
    identical: float
    max_lsb: int
    bias_lsb: float


class Runner(Protocol):
    """The part of a backend that parity needs."""

    def compile(self, graph: Graph, target: Any, folder: Path) -> Any: ...

    def run(self, folder: Path, graph: Graph, target: Any, feeds: Arrays) -> dict[str, np.ndarray]: ...


def parity(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """(share of identical integers 0..1, largest difference). Raises ValueError when the shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"codes of shapes {a.shape} and {b.shape} cannot be compared")
    difference = np.abs(a.astype(np.int64) - b.astype(np.int64))
    return float((difference == 0).mean()), int(difference.max(initial=0))


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float | None:
    """10 log10(signal power / error power) in dB; None where that is undefined or infinite."""
    signal = np.square(reference.astype(np.float64)).sum()
    error = np.square(reference.astype(np.float64) - other.astype(np.float64)).sum()
    if not np.isfinite(signal) or not np.isfinite(error) or signal <= 0 or error <= 0:
        return None
    return float(10 * np.log10(signal / error))


def cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cosine similarity of the flattened arrays; None where it is undefined."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    length = np.linalg.norm(x) * np.linalg.norm(y)
    if not np.isfinite(length) or length == 0:
        return None
    return float(np.clip(x @ y / length, -1, 1))


def trace(graph: Graph, feeds: Arrays) -> dict[str, np.ndarray]:
    """The reference's codes of every input and every node's output, by value name."""
    codes = dict(feeds)
    simulate(graph, feeds, observe=lambda node, result: codes.update({node.output: np.asarray(result)}))
    return codes


def explode(graph: Graph) -> Graph:
    """Cut every edge: each node reads fresh graph inputs ``<node>:<index>``, each node's output is a graph output.

        x -> conv a -> relu b => y        =>        a:0 -> conv a => a,   b:0 -> relu b => b

    One run of the result on a backend gives teacher-forced parity of every node."""
    values, inputs, nodes = dict(graph.values), [], []
    for node in graph.nodes:
        names = list(node.inputs)
        for i, name in enumerate(node.inputs):
            value = graph.values[name]
            if not value.const:
                names[i] = f"{node.output}:{i}"
                values[names[i]] = Value(names[i], value.type)
                inputs.append(names[i])
        nodes.append(replace(node, inputs=tuple(names)))
    outputs = tuple(node.output for node in graph.nodes)
    return graph.rebuild(nodes, values, name=f"{graph.name}-nodes", inputs=tuple(inputs), outputs=outputs)


def exploded_feeds(graph: Graph, codes: Arrays) -> dict[str, np.ndarray]:
    """What `explode` of ``graph`` reads, from the codes of a `trace`."""
    return {
        f"{node.output}:{i}": codes[name]
        for node in graph.nodes
        for i, name in enumerate(node.inputs)
        if not graph.values[name].const
    }


def per_node(backend: Runner, folder: Path, cut: Graph, target: Any, feeds: Arrays) -> list[NodeParity]:
    """Teacher-forced parity of every node of an integer graph on a backend, in the graph's order.

    cut: what `explode` made of it, under the rounding rules to compare with (those of each node alone: a neighbor can
    change a rule). feeds: `exploded_feeds`. folder: empty; receives the artifact.
    Raises BackendFailed when the backend refuses the exploded graph."""
    backend.compile(cut, target, folder)
    outputs, expected = backend.run(folder, cut, target, feeds), simulate(cut, feeds)
    return [_compare(node, outputs[node.output], expected[node.output]) for node in cut.nodes]


def _compare(node: Node, found: np.ndarray, expected: np.ndarray) -> NodeParity:
    identical, worst = parity(found, expected)
    bias = float((found.astype(np.int64) - expected.astype(np.int64)).mean())
    status = RULES[node.rule].status if node.rule else "exact"
    return NodeParity(node.output, node.op, node.rule or "move", status, node.source, identical, worst, bias)
