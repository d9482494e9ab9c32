"""Nodes that only move elements: fewer of them, and scales and masks where they cost nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import LAYERS
from edgeforge.ir.types import TensorType, Value
from edgeforge.passes.dead import remove_dead

#: What a blocked attention score becomes: exp(-100) is 0 in float32, and 16-bit codes still resolve the scores.
MASKED = -100.0


def merge_moves(graph: Graph) -> Graph:
    """y = transpose(transpose(x, p), q)   =>   y = transpose(x, p[q]);   reshape(reshape(x)) => reshape(x)

    A pair that moves nothing vanishes, unless the graph's output needs its name."""
    producers: dict[str, Node] = {}
    same: dict[str, str] = {}
    for node in graph.nodes:
        node = Node(node.op, tuple(same.get(n, n) for n in node.inputs), node.output, node.attrs, node.source)
        before = producers.get(node.inputs[0]) if node.op in ("transpose", "reshape") else None
        if before is not None and before.op == node.op:
            attrs = dict(node.attrs)
            if node.op == "transpose":
                attrs["perm"] = tuple(before.attrs["perm"][axis] for axis in node.attrs["perm"])
            node = Node(node.op, before.inputs, node.output, attrs, node.source)
        if _moves_nothing(graph, node) and node.output not in graph.outputs:
            same[node.output] = node.inputs[0]
        else:
            producers[node.output] = node
    return remove_dead(graph.rebuild(producers.values()))


def _moves_nothing(graph: Graph, node: Node) -> bool:
    if node.op == "transpose":
        return tuple(node.attrs["perm"]) == tuple(range(len(node.attrs["perm"])))
    return node.op == "reshape" and graph.type(node.inputs[0]).shape == graph.type(node.output).shape


def hoist_scale(graph: Graph) -> Graph:
    """y = reshape(linear(x, w)); z = mul(y, s)   =>   z = reshape(mul(linear(x, w), s))     s: one number

    Through reshape, transpose and the first operand of matmul, to the linear that `fuse_batch_norm` folds it into. A
    rotary embedding takes it into its tables: mul(add(mul(a, cos), mul(b, sin)), s)   =>   add(mul(a, cos * s), ...)"""
    for node in graph.nodes:
        if node.op == "mul":
            graph = _hoist(graph, node)
    return graph


def _hoist(graph: Graph, node: Node) -> Graph:
    scale, name = node.inputs if graph.values[node.inputs[0]].const else node.inputs[::-1]
    data = graph.values[scale].data
    if data is None or data.size != 1 or graph.type(node.output).shape != graph.type(name).shape:
        return graph
    producers, users = graph.producers(), graph.users()
    chain: list[Node] = []
    while name in producers and len(users[name]) == 1 and name not in graph.outputs:
        made = producers[name]
        if made.op in LAYERS and "clamp" not in made.attrs and chain:
            return _scaled_by(graph, node, chain, Node("mul", (name, scale), f"{name}.scaled", {}, node.source))
        if terms := _rotary(graph, made, producers, users):
            return _scaled_tables(graph, node, terms, float(data.reshape(())))
        if made.op not in ("reshape", "transpose", "matmul"):
            break
        chain.append(made)
        name = made.inputs[0]
    return graph


def _scaled_by(graph: Graph, node: Node, chain: list[Node], scaled: Node) -> Graph:
    """``scaled`` goes before the chain of moves, whose last then gives what ``node`` gave."""
    values = {**graph.values, scaled.output: Value(scaled.output, graph.type(scaled.inputs[0]))}
    nodes = []
    for step in graph.nodes:
        if step is chain[-1]:
            nodes.append(scaled)
            step = replace(step, inputs=(scaled.output, *step.inputs[1:]))
        nodes.append(step)
    return _without(graph.rebuild(nodes, values), node)


def _without(graph: Graph, node: Node) -> Graph:
    """``node`` (a product with a number that has moved elsewhere) vanishes; its input's producer takes its name."""
    before = next(n for n in node.inputs if not graph.values[n].const)
    nodes = [
        replace(n, output=node.output) if n.output == before else n for n in graph.nodes if n.output != node.output
    ]
    return graph.rebuild(nodes)


def _rotary(graph: Graph, total: Node, producers: dict[str, Node], users: dict[str, list[Node]]) -> list[Node]:
    """The two products of add(mul(a, cos), mul(b, sin)) with constant tables, if ``total`` is such a sum."""
    if total.op != "add" or "clamp" in total.attrs or len(set(total.inputs)) != 2:
        return []
    terms = [producers[n] for n in total.inputs if n in producers and len(users[n]) == 1 and n not in graph.outputs]
    tables = [t for t in terms if t.op == "mul" and any(graph.values[n].const for n in t.inputs)]
    return tables if len(tables) == 2 else []


def _scaled_tables(graph: Graph, node: Node, terms: list[Node], scale: float) -> Graph:
    values, changed = dict(graph.values), {}
    for term in terms:
        table = next(n for n in term.inputs if values[n].const)
        data = values[table].data
        assert data is not None
        made = f"{term.output}.table"
        values[made] = Value(made, TensorType(data.shape), data * np.float32(scale))
        changed[term.output] = replace(term, inputs=tuple(made if n == table else n for n in term.inputs))
    return _without(graph.rebuild([changed.get(n.output, n) for n in graph.nodes], values), node)


def bound_masks(graph: Graph) -> Graph:
    """s = add(scores, mask); p = softmax(s)   =>   the same with mask = max(mask, -100)

    exp of both is 0, but a range down to -1e4 or float32's lowest leaves no codes for the scores."""
    values, users, nodes = dict(graph.values), graph.users(), []
    for node in graph.nodes:
        readers = users[node.output]
        if node.op == "add" and readers and all(user.op == "softmax" for user in readers):
            node = Node(node.op, tuple(_bounded(values, n) for n in node.inputs), node.output, node.attrs, node.source)
        nodes.append(node)
    return graph.rebuild(nodes, values)


def _bounded(values: dict[str, Value], name: str) -> str:
    data = values[name].data
    if data is None or data.min() >= MASKED:
        return name
    made = f"{name}.bounded"
    values[made] = Value(made, TensorType(data.shape), np.maximum(data, np.float32(MASKED)))
    return made
