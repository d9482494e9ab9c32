"""Nodes that only move elements: fewer of them, and scales and masks where they cost nothing."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.graph import Graph, Node
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

    Through reshape and transpose, as far as the scale meets the linear that `fuse_batch_norm` folds it into. A rotary
    embedding takes it into its tables: mul(add(mul(a, cos), mul(b, sin)), s)   =>   add(mul(a, cos * s), ...)"""
    nodes, values = list(graph.nodes), dict(graph.values)
    for node in graph.nodes:
        if node.op == "mul":
            _hoist(graph, nodes, values, node)
            _rotary(graph, nodes, values, node)
    return graph.rebuild(nodes, values)


def _hoist(graph: Graph, nodes: list[Node], values: dict[str, Value], node: Node) -> None:
    scale, name = node.inputs if values[node.inputs[0]].const else node.inputs[::-1]
    if not values[scale].const or values[scale].type.size != 1 or values[name].const:
        return
    producers, users = {n.output: n for n in nodes}, graph.users()
    chain: list[Node] = []
    while name in producers and len(users.get(name, ())) == 1 and name not in graph.outputs:
        made = producers[name]
        if made.op not in ("reshape", "transpose"):
            break
        chain.append(made)
        name = made.inputs[0]
    made = producers.get(name)
    ready = made is not None and made.op in ("linear", "conv2d") and "clamp" not in made.attrs
    if not chain or not ready or len(users.get(name, ())) != 1 or name in graph.outputs:
        return
    if len(values[scale].type.shape) > len(values[name].type.shape):
        return
    scaled = f"{name}.scaled"
    values[scaled] = Value(scaled, values[name].type)
    moved = [Node("mul", (name, scale), scaled, {}, node.source)]
    for step in reversed(chain):
        output = node.output if step is chain[0] else step.output
        source = scaled if step is chain[-1] else step.inputs[0]
        moved.append(Node(step.op, (source,), output, step.attrs, step.source))
    position = nodes.index(node)
    nodes[position : position + 1] = moved
    for step in chain:
        nodes.remove(step)


def _rotary(graph: Graph, nodes: list[Node], values: dict[str, Value], node: Node) -> None:
    scale, name = node.inputs if values[node.inputs[0]].const else node.inputs[::-1]
    if node not in nodes or not values[scale].const or values[scale].type.size != 1 or values[name].const:
        return
    producers, users = {n.output: n for n in nodes}, graph.users()
    total = producers.get(name)
    terms = [producers.get(n) for n in total.inputs] if total is not None and total.op == "add" else []
    if not terms or "clamp" in total.attrs or values[name].type.shape != values[node.output].type.shape:
        return
    names = [name, *total.inputs]
    if any(len(users.get(n, ())) != 1 or n in graph.outputs for n in names) or len(set(names)) != 3:
        return
    if not all(term is not None and term.op == "mul" and any(values[n].const for n in term.inputs) for term in terms):
        return
    for term in terms:
        table = next(n for n in term.inputs if values[n].const)
        data = values[table].data * values[scale].data.reshape(())
        made = f"{term.output}.table"
        values[made] = Value(made, TensorType(data.shape), data.astype(np.float32))
        inputs = tuple(made if n == table else n for n in term.inputs)
        nodes[nodes.index(term)] = Node("mul", inputs, term.output, term.attrs, term.source)
    nodes[nodes.index(node)] = Node("add", total.inputs, node.output, total.attrs, total.source)
    nodes.remove(total)


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
