"""Consecutive parts of a graph that each fit a context of the NPU."""

from __future__ import annotations

from collections.abc import Sequence

from edgeforge.errors import Reason
from edgeforge.ir.graph import Graph, Node
from edgeforge.target import Target

NOT_SHARED = "no context that prefill and decode share: none can hold both"


def split(graph: Graph, most: int | None) -> dict[str, Graph]:
    """``graph`` alone, by the name "", where its constants take at most ``most`` bytes; else parts to run one after
    another, by the names context1, context2, ...: a part's inputs are inputs of the graph and outputs of parts before
    it. A part is filled at least to the half, and ends there where fewest bytes of activations are alive (between the
    layers of a transformer that is the residual stream). A node with larger constants is a part by itself."""
    if most is None or constant_bytes(graph) <= most:
        return {"": graph}
    alive, parts, start = _alive(graph), [], 0
    while start < len(graph.nodes):
        filled = _filled(graph, start, most)
        ends = [start + 1 + i for i, size in enumerate(filled) if 2 * size >= filled[-1]]
        end = min(ends, key=lambda at: (alive[at], -at)) if ends[-1] < len(graph.nodes) else ends[-1]
        parts.append(_part(graph, start, end, f"{graph.name}-context{len(parts) + 1}"))
        start = end
    return {f"context{i}": part for i, part in enumerate(parts, 1)}


def too_large(graph: Graph, target: Target) -> list[Reason]:
    """Why one context cannot hold the graph."""
    size, most = constant_bytes(graph), target.context_bytes
    if most is None or size <= most:
        return []
    why = f"holds {size / 1e9:.2f} GB of constants, one context of the NPU holds {most / 1e9:.2f} GB"
    return [Reason(graph.name, "graph", why, "narrower weights (w4a16-b32), or ort_qnn, which makes several contexts")]


def constant_bytes(graph: Graph) -> int:
    return sum(value.type.nbytes for value in graph.constants())


def _filled(graph: Graph, start: int, most: int) -> list[int]:
    """Bytes of the constants of the nodes from ``start`` to each that still fits, and of the first in any case."""
    names: set[str] = set()
    sizes: list[int] = []
    for node in graph.nodes[start:]:
        names |= {name for name in node.inputs if graph.values[name].const}
        size = sum(graph.type(name).nbytes for name in names)
        if sizes and size > most:
            break
        sizes.append(size)
    return sizes


def _last_uses(graph: Graph) -> dict[str, int]:
    """Value -> index of the last node that reads it, or the count of nodes where it is an output of the graph."""
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    return last | dict.fromkeys(graph.outputs, len(graph.nodes))


def _alive(graph: Graph) -> list[int]:
    """Bytes that nodes before index i made and nodes from i on read."""
    last, alive = _last_uses(graph), [0] * (len(graph.nodes) + 1)
    for i, node in enumerate(graph.nodes):
        if node.output not in graph.outputs:
            for at in range(i + 1, last.get(node.output, i) + 1):
                alive[at] += graph.type(node.output).nbytes
    return alive


def _part(graph: Graph, start: int, end: int, name: str) -> Graph:
    nodes: Sequence[Node] = graph.nodes[start:end]
    made, last = {node.output for node in nodes}, _last_uses(graph)
    read = dict.fromkeys(name for node in nodes for name in node.inputs)
    inputs = tuple(name for name in read if name not in made and not graph.values[name].const)
    outputs = tuple(node.output for node in nodes if last.get(node.output, 0) >= end)
    return graph.rebuild(nodes, name=name, inputs=inputs, outputs=outputs)
