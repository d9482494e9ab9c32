"""remove_dead: nodes that no output needs go."""

from __future__ import annotations

from edgeforge.ir.graph import Graph


def remove_dead(graph: Graph) -> Graph:
    """y = f(x); z = g(x); out y   =>   y = f(x); out y"""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed |= set(node.inputs)
            kept.append(node)
    return graph.rebuild(reversed(kept))
