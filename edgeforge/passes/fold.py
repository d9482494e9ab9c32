"""fold_constants: what depends on constants alone is computed now."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.graph import Graph
from edgeforge.ir.op import OPS
from edgeforge.ir.types import TensorType, Value


def fold_constants(graph: Graph) -> Graph:
    """const a, b; y = add(a, b); z = mul(x, y)   =>   const y; z = mul(x, y)"""
    import torch

    values = dict(graph.values)
    kept = []
    for node in graph.nodes:
        if not all(values[name].const for name in node.inputs):
            kept.append(node)
            continue
        arrays = [torch.from_numpy(np.ascontiguousarray(values[name].data)) for name in node.inputs]
        result = OPS[node.op].torch(torch, graph.view(node), *arrays).contiguous().numpy()
        dtype = graph.type(node.output).dtype
        values[node.output] = Value(node.output, TensorType(result.shape, dtype), result)
    return graph.rebuild(kept, values)
