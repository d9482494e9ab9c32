"""with_constants: other numbers at some inputs of some nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgeforge.ir.graph import Graph
from edgeforge.ir.op import OPS
from edgeforge.ir.types import TensorType, Value


def with_constants(graph: Graph, changed: Mapping[tuple[str, int], np.ndarray]) -> Graph:
    """``graph`` with other constants at (node output, input index); the other readers of a constant keep theirs."""
    values, nodes = dict(graph.values), graph.producers()
    reads = Counter(name for node in graph.nodes for name in node.inputs)
    for (output, i), data in changed.items():
        node = nodes[output]
        name = node.inputs[i]
        if reads[name] > 1:
            name = f"{output}/{OPS[node.op].port(i).name}"
            nodes[output] = replace(node, inputs=(*node.inputs[:i], name, *node.inputs[i + 1 :]))
        values[name] = Value(name, TensorType(data.shape), data.astype(np.float32, copy=False))
    return graph.rebuild(nodes.values(), values)
