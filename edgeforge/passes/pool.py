"""keep_pooled_axes: global pooling in the one form that every runtime rounds alike."""

from __future__ import annotations

from dataclasses import replace

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import TensorType, Value


def keep_pooled_axes(graph: Graph) -> Graph:
    """y = reduce_mean(x) axes=(2, 3) keepdims=False   =>   p = reduce_mean(x) keepdims=True; y = reshape(p)

    HTP rounds GlobalAveragePool by a known rule and ReduceMean by another; XNNPACK takes only the form that keeps the
    axes."""
    values, nodes = dict(graph.values), []
    for node in graph.nodes:
        if node.op == "reduce_mean" and node.attrs["axes"] == (2, 3) and not node.attrs["keepdims"]:
            pooled = f"{node.output}.pooled"
            shape = graph.type(node.output).shape
            values[pooled] = Value(pooled, TensorType((*shape, 1, 1)))
            nodes.append(replace(node, output=pooled, attrs={**node.attrs, "keepdims": True}))
            node = Node("reshape", (pooled,), node.output, {"shape": shape}, node.source)
        nodes.append(node)
    return graph.rebuild(nodes, values)
