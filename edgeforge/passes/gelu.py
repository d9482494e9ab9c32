"""GELU written out with erf, as ONNX exporters do, becomes one node again."""

from __future__ import annotations

import math

from edgeforge.ir.graph import Graph, Node
from edgeforge.passes.dead import remove_dead


def fuse_gelu(graph: Graph) -> Graph:
    """e = erf(x * sqrt(1/2)) + 1; y = x * e * 1/2 (in any order)   =>   y = gelu(x)"""
    producers = graph.producers()
    gates = {node.output: x for node in graph.nodes if (x := _gated(graph, producers, node))}
    nodes = []
    for node in graph.nodes:
        for gate, x in gates.items() if node.op == "mul" else ():
            if _is_half_product(graph, producers, node, x, gate):
                node = Node("gelu", (x,), node.output, {"approximate": "none"}, node.source)
                break
        nodes.append(node)
    return remove_dead(graph.rebuild(nodes))


def _gated(graph: Graph, producers: dict[str, Node], node: Node) -> str:
    """x, if ``node`` is erf(x / sqrt 2) + 1; else ""."""
    inner, one = _scalar(graph, node, "add")
    curve = producers.get(inner)
    if curve is None or curve.op != "erf" or one != 1.0:
        return ""
    scaled = producers.get(curve.inputs[0])
    x, factor = _scalar(graph, scaled, "mul") if scaled is not None else ("", 0.0)
    return x if math.isclose(factor, math.sqrt(0.5), rel_tol=1e-5) else ""


def _scalar(graph: Graph, node: Node, op: str) -> tuple[str, float]:
    """(activation, number) of an ``op`` node with a scalar constant operand, or ("", 0)."""
    for const, other in (node.inputs, node.inputs[::-1]) if node.op == op else ():
        data = graph.values[const].data
        if data is not None and data.size == 1 and not graph.values[other].const:
            return other, float(data.reshape(()))
    return "", 0.0


def _is_half_product(graph: Graph, producers: dict[str, Node], node: Node, x: str, gate: str) -> bool:
    names, number, waiting = [], 1.0, list(node.inputs)
    while waiting:
        name = waiting.pop()
        made, data = producers.get(name), graph.values[name].data
        if data is not None and data.size == 1:
            number *= float(data.reshape(()))
        elif name not in (x, gate) and made is not None and made.op == "mul":
            waiting += made.inputs
        else:
            names.append(name)
    return sorted(names) == sorted((x, gate)) and math.isclose(number, 0.5, rel_tol=1e-5)
