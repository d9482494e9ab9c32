"""dynamic: linears that round their input as it comes, one range per token, for runtimes that compute so (XNNPACK).

    y = linear(x, w, b)   =>   y = linear(x, w4, b) {dynamic}     int4 codes with a scale per group of inputs

The graph stays a float graph: no other value has an encoding, and nothing is calibrated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph
from edgeforge.ir.types import RANGE, QParams, TensorType, Value
from edgeforge.ir.verify import verify
from edgeforge.quantize.assign import precisions
from edgeforge.quantize.weights import channel_scales, quantize_weight
from edgeforge.recipe import Precision, Recipe


def dynamic_linears(graph: Graph, recipe: Recipe, made: Graph | None = None) -> Graph:
    """``graph`` with dynamic linears: 4-bit weights in groups, or, where an override gives a layer 8-bit weights, those
    per output channel. made: another graph of the same weights, whose codes are taken.

    Raises InvalidInput where the groups do not divide a layer's inputs."""
    precision, _ = precisions(graph, recipe)
    group = Precision(recipe.precision).block
    assert group is not None
    known = {} if made is None else made.values
    values, nodes = dict(graph.values), []
    for node in graph.nodes:
        if node.op != "linear":
            nodes.append(node)
            continue
        name, dtype = node.inputs[1], precision[node.output].weights
        codes, data = f"{name}.{dtype}", graph.values[name].data
        assert data is not None
        if codes not in values:
            values[codes] = known.get(codes) or _coded(codes, data, dtype, group, recipe.weights)
        inputs = (node.inputs[0], codes, *node.inputs[2:])
        nodes.append(replace(node, inputs=inputs, attrs={**node.attrs, "dynamic": True}))
    return verify(graph.rebuild(nodes, values))


def _coded(name: str, data: np.ndarray, dtype: str, group: int, method: str) -> Value:
    if dtype == "i8":
        return quantize_weight(name, data, dtype, None, method)
    if data.shape[1] % group:
        raise InvalidInput(f"{name}: groups of {group} do not divide {data.shape[1]} inputs -> 8da4w-b32, or w4a8")
    scales = channel_scales(data.reshape(-1, group), RANGE[dtype][1], method)
    q = QParams(_bfloat16(scales).reshape(len(data), -1), 0, axis=0, block=group)
    return Value(name, TensorType(data.shape, dtype, q), q.quantize(data, dtype))


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """The next bfloat16 above: XNNPACK keeps the scales of groups so, and no weight must leave the range of codes."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0xFFFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)
