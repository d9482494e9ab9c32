"""Bias correction: each linear and convolution gets back the mean that rounding took from its output.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv:1906.04721), section 4.2,
in its empirical form: the shift is measured on calibration data, layer after layer, behind layers already corrected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import CONVOLUTIONS, LAYERS, OPS
from edgeforge.ir.types import RANGE, TensorType, Value


def correct_biases(graph: Graph, quantized: Graph, feeds: Mapping[str, np.ndarray]) -> Graph:
    """``graph`` (float) with new biases, such that per output channel the mean over ``feeds`` of each linear and
    convolution, before its fused activation, is that of the float model when the encodings of ``quantized``
    are in force.

    feeds: real inputs [N, ...]; all N are in memory at once, in both versions."""
    exact = {name: torch.from_numpy(np.array(feeds[name])) for name in graph.inputs}
    rounded = {name: _round(x, quantized.type(name)) for name, x in exact.items()}
    for source, known in ((graph, exact), (quantized, rounded)):
        known.update({value.name: _real(value) for value in source.constants()})
    originals = graph.producers()
    last, rounded_last = _last_reads(graph), _last_reads(quantized)
    biases: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for node in quantized.nodes:
            original = originals.get(node.output)
            if original is None:  # a requantize between two nodes of the float graph, or what one narrows
                got = _run(quantized, _plain(node), rounded)
            else:
                wanted, got = _run(graph, _plain(original), exact), _run(quantized, _plain(node), rounded)
                if original.op in LAYERS and (node.op == original.op or "clamp" not in original.attrs):
                    axis = 1 if original.op in CONVOLUTIONS else wanted.ndim - 1
                    shift = (wanted - got).mean([i for i in range(wanted.ndim) if i != axis])
                    old = graph.values[original.inputs[2]].data if len(original.inputs) == 3 else np.float32(0)
                    biases[node.output] = old + shift.numpy()
                    got = got + shift.reshape([-1 if i == axis else 1 for i in range(wanted.ndim)])
                exact[node.output] = _clamp(original, wanted)
                _forget(original, exact, last)
            rounded[node.output] = _round(_clamp(node, got), quantized.type(node.output))
            _forget(node, rounded, rounded_last)
    return _with_biases(graph, biases)


def _real(value: Value) -> torch.Tensor:
    assert value.data is not None
    data = value.data if value.type.q is None else value.type.q.dequantize(value.data)
    return torch.from_numpy(np.array(data))


def _round(x: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """The nearest values that the encoding of ``kind`` has."""
    if kind.q is None:
        return x
    low, high = RANGE[kind.dtype]
    scale, zero = float(kind.q.scale), kind.q.zero
    return ((x / scale).round() + zero).clamp(low, high).sub(zero).mul(scale)


def _plain(node: Node) -> Node:
    return replace(node, attrs={key: value for key, value in node.attrs.items() if key != "clamp"})


def _run(graph: Graph, node: Node, known: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return OPS[node.op].torch(torch, graph.view(node), *(known[name] for name in node.inputs))


def _clamp(node: Node, y: torch.Tensor) -> torch.Tensor:
    return y.clamp(*node.attrs["clamp"]) if "clamp" in node.attrs else y


def _last_reads(graph: Graph) -> dict[str, str]:
    """Value name -> the output of the node that reads it last."""
    return {name: users[-1].output for name, users in graph.users().items() if users}


def _forget(node: Node, known: dict[str, Any], last: Mapping[str, str]) -> None:
    """Drop what ``node`` read for the last time."""
    for name in set(node.inputs):
        if last[name] == node.output:
            del known[name]


def _with_biases(graph: Graph, biases: Mapping[str, np.ndarray]) -> Graph:
    values, nodes = dict(graph.values), []
    for node in graph.nodes:
        if node.output in biases:
            name = f"{node.output}/bias"
            data = biases[node.output].astype(np.float32)
            values[name] = Value(name, TensorType(data.shape, "f32"), data)
            node = replace(node, inputs=(*node.inputs[:2], name))
        nodes.append(node)
    return graph.rebuild(nodes, values)
