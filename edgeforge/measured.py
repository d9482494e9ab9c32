"""Functions asked from the runtime itself: a node that maps one code to another is known once it has run on all codes,
whatever rule the runtime follows.

    y = gelu(x)   =>   y = gelu(x) by rule htp_measured {"table": uint16[65536], ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgeforge import backends
from edgeforge.errors import BackendFailed
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import OPS
from edgeforge.ir.rules import RULES
from edgeforge.ir.rules.htp_unary import measured_node
from edgeforge.ir.types import NUMPY, RANGE, Value
from edgeforge.target import Target

#: The backend whose emulator runs a target's own compiler. It gets each node in the form that its artifacts have.
ORACLE = "ort_qnn"


def measure(graph: Graph, target: Target) -> tuple[Graph, tuple[str, ...]]:
    """``graph`` with a table in every element-wise function that has no exact rule, and notes that name the nodes and
    the emulator, or say why nothing was measured. One run of the emulator answers for all nodes."""
    if ORACLE not in target.backends or target.soc is None:
        return graph, ()
    asked = {node.output: question(graph, node) for node in graph.nodes if _open(node)}
    if not asked:
        return graph, ()
    why, tables = backends.backend(ORACLE).cannot_run(), {}
    if not why:
        try:
            tables = answers(asked, target)
        except BackendFailed as error:
            why = str(error)
    count, names = f"{len(asked)} function(s)", ", ".join(asked)
    if why:
        return graph, (f"{count} follow a modelled rule, no measured table ({why}): {names}",)
    nodes = [
        measured_node(node, tables[node.output], target.numerics) if node.output in tables else node
        for node in graph.nodes
    ]
    how = f"measured from the HTP emulator ({ORACLE}, soc_model {target.soc.model})"
    return graph.rebuild(nodes), (f"{count} hold tables {how}: {names}",)


def _open(node: Node) -> bool:
    """Whether a node is a function of one code whose rule is not exact. HTP computes some requantizes together with
    what is before them."""
    return OPS[node.op].numerics == "table" and node.op != "requantize" and RULES[node.rule].status != "exact"


def question(graph: Graph, node: Node) -> Graph:
    """``node`` by itself, ``x`` -> ``y``, on a tensor that holds every input code once."""
    x, y = graph.type(node.inputs[0]), graph.type(node.output)
    shape = (1, 4, 8, (RANGE[x.dtype][1] + 1) // 32)
    values = {"x": Value("x", replace(x, shape=shape)), "y": Value("y", replace(y, shape=shape))}
    return Graph("question", "integer", ("x",), (Node(node.op, ("x",), "y", node.attrs),), ("y",), values)


def answers(asked: Mapping[str, Graph], target: Target) -> dict[str, np.ndarray]:
    """The table of every `question`, [codes of x]; equal questions run once."""
    keys = {name: q.hash() for name, q in asked.items()}
    distinct = {keys[name]: q for name, q in asked.items()}
    graph = together(list(distinct.values()))
    feeds = {}
    for name in graph.inputs:
        kind = graph.type(name)
        feeds[name] = np.arange(kind.size).astype(NUMPY[kind.dtype]).reshape(kind.shape)
    found = backends.backend(ORACLE).evaluate(graph, target, feeds)
    tables = {key: found[f"{i}.y"].reshape(-1) for i, key in enumerate(distinct)}
    return {name: tables[key] for name, key in keys.items()}


def together(graphs: Sequence[Graph]) -> Graph:
    """Graphs side by side in one; the names of graph ``i`` begin with ``i.``."""
    values: dict[str, Value] = {}
    inputs, nodes, outputs = [], [], []
    for i, graph in enumerate(graphs):
        for value in graph.values.values():
            values[f"{i}.{value.name}"] = replace(value, name=f"{i}.{value.name}")
        for node in graph.nodes:
            names = tuple(f"{i}.{name}" for name in node.inputs)
            nodes.append(replace(node, inputs=names, output=f"{i}.{node.output}"))
        inputs += [f"{i}.{name}" for name in graph.inputs]
        outputs += [f"{i}.{name}" for name in graph.outputs]
    return Graph("questions", "integer", tuple(inputs), tuple(nodes), tuple(outputs), values)
