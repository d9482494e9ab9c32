"""What an estimate reads: the layers of a model with their shapes and work, apart from values, names and encodings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeforge.ir.graph import Graph
from edgeforge.ir.op import CONVOLUTIONS, OPS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One operation. ``inputs``: activations only. ``weights``: elements of its constants. ``macs``: multiply-
    accumulates. ``attrs`` of convolutions: kernel, stride, dilation, groups, fan_in (input channels per group).
    ``weight_bits`` and ``bits`` (of the activations): of an integer graph, where the precision is part of it."""

    op: str
    inputs: tuple[str, ...]
    output: str
    weights: int = 0
    macs: int = 0
    attrs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    weight_bits: int | None = None
    bits: int | None = None


@dataclass(frozen=True)
class Program:
    """Layers in order; ``shapes``: of every activation."""

    name: str
    inputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape]

    def size(self, name: str) -> int:
        return math.prod(self.shapes[name])

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)


#: Ops that the latency model knows under another name.
KIND = {"conv_transpose2d": "conv_transpose", "resize_nearest": "resize", "resize_bilinear": "resize"}
BITS = {"f32": None, "i64": None, "i32": 32, "u16": 16, "u8": 8, "i8": 8, "i4": 4}


def from_graph(graph: Graph) -> Program:
    """The layers of a float or an integer graph, with the work of `Op.cost`."""
    seen: set[str] = set()
    layers = []
    for node in graph.nodes:
        n = graph.view(node)
        active = tuple(name for name in node.inputs if not graph.values[name].const)
        constants = [name for name in node.inputs if graph.values[name].const]
        fresh = [name for name in constants if name not in seen]
        seen.update(fresh)
        attrs = dict(node.attrs)
        if node.op in CONVOLUTIONS:
            attrs |= {"kernel": n.shape(1)[2:], "fan_in": n.shape(1)[1]}
        elif node.op == "linear":
            attrs |= {"fan_in": n.shape(1)[1]}
        elif node.op == "matmul":
            attrs |= {"fan_in": n.shape(0)[-1]}
        weight_bits = next((BITS[graph.type(name).dtype] for name in constants), None)
        layers.append(
            Layer(
                KIND.get(node.op, node.op),
                active,
                node.output,
                sum(graph.type(name).size for name in fresh),
                OPS[node.op].cost(n).macs,
                attrs,
                node.source,
                weight_bits,
                BITS[n.out.dtype],
            )
        )
    shapes = {name: value.type.shape for name, value in graph.values.items() if not value.const}
    return Program(graph.name, graph.inputs, tuple(layers), graph.outputs, shapes)
