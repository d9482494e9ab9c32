"""convert: a float graph and its plan become the integer graph, with codes and rounding constants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeforge.ir.fixed import channel_scale
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import ACT, BIAS, INDEX, OPS, WEIGHT
from edgeforge.ir.rules import rule_of
from edgeforge.ir.types import QParams, TensorType, Value
from edgeforge.ir.verify import verify
from edgeforge.quantize.assign import Plan, _data_range, affine
from edgeforge.quantize.weights import least_scale, quantize_weight
from edgeforge.quantize.widths import equal_widths
from edgeforge.target import Target


class _Converter:
    def __init__(self, graph: Graph, plan: Plan, weight_method: str, made: Graph | None):
        self.graph, self.plan, self.weight_method, self.made = graph, plan, weight_method, made
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []

    def run(self) -> Graph:
        for name in self.graph.inputs:
            self.define(name)
        for node in self.graph.nodes:
            self.define(node.output)
            inputs: list[str] = []
            for i in range(len(node.inputs)):
                inputs.append(self.read(node, i, inputs))
            self.nodes.append(replace(node, inputs=tuple(inputs)))
        return self.graph.rebuild(self.nodes, self.values, level="integer")

    def define(self, name: str) -> None:
        self.values[name] = Value(name, self.plan.types.get(name, self.graph.type(name)))

    def read(self, node: Node, i: int, before: list[str]) -> str:
        """The name of the quantized value that input ``i`` reads, made if need be."""
        name, role = node.inputs[i], OPS[node.op].port(i).role
        value = self.graph.values[name]
        if role == INDEX:
            self.values[name] = value
            return name
        if role == ACT and not value.const:
            wanted = self.plan.reads.get((node.output, i))
            return name if wanted is None else self.requantized(name, wanted, node.source)
        kept = self.plan.constants.get(name)
        dtype = self.plan.precision[node.output].weights if kept is None else kept.dtype
        same = self.same(name, dtype) if role == WEIGHT else None
        if same is not None and kept in (None, same.type):
            made = same
        elif kept is not None:
            assert kept.q is not None
            made = Value(name, kept, kept.q.quantize(self.data(name), kept.dtype))
        elif role == WEIGHT:
            precision = self.plan.precision[node.output]
            block = precision.block if node.op == "linear" else None
            least = self.least_scale(node, before[0])
            made = quantize_weight(name, self.data(name), precision.weights, block, self.weight_method, least)
        elif role == BIAS:
            made = self.bias(name, before)
        else:
            made = self.constant(node, name)
        return self.add(made)

    def same(self, name: str, dtype: str) -> Value | None:
        """The weights ``name`` as the other graph has them."""
        values = {} if self.made is None else self.made.values
        found = (values.get(key) for key in (name, f"{name}.{dtype}"))
        value = next((v for v in found if v is not None and v.type.dtype == dtype), None)
        return value if value is None or value.name == name else replace(value, name=name)

    def data(self, name: str) -> np.ndarray:
        data = self.graph.values[name].data
        assert data is not None, name
        return data

    def add(self, made: Value) -> str:
        """Keep a constant; one name is given to each encoding of it."""
        known = self.values.get(made.name)
        if known is not None and known.type != made.type:
            named = f"{made.name}.{made.type.dtype}"
            taken = named in self.values and self.values[named].type != made.type
            made = replace(made, name=f"{named}.{len(self.values)}" if taken else named)
        self.values[made.name] = made
        return made.name

    def least_scale(self, node: Node, x: str) -> np.ndarray | float:
        return least_scale(self.data(node.inputs[2]), self.values[x].type) if len(node.inputs) == 3 else 0.0

    def bias(self, name: str, before: list[str]) -> Value:
        x, w = (self.values[b].type.q for b in before[:2])
        assert x is not None and w is not None
        scale = np.broadcast_to(x.scale * channel_scale(w).astype(np.float32), self.data(name).shape)
        q = QParams(scale.copy(), 0, axis=0)
        return Value(name, TensorType(self.data(name).shape, "i32", q), q.quantize(self.data(name), "i32"))

    def constant(self, node: Node, name: str) -> Value:
        """A constant operand of an activation op: the encoding of its group, else its own range at the width of the
        node's output."""
        kind = self.plan.types.get(name)
        if kind is None or not OPS[node.op].shared:
            dtype = self.values[node.output].type.dtype
            kind = TensorType(self.data(name).shape, dtype, affine(_data_range(self.data(name)), dtype))
        assert kind.q is not None
        other = None if self.made is None else self.made.values.get(name)
        if other is not None and other.type == kind:
            return other
        return Value(name, kind, kind.q.quantize(self.data(name), kind.dtype))

    def requantized(self, name: str, wanted: TensorType, source: str) -> str:
        assert wanted.q is not None
        made = f"{name}.{wanted.dtype}z{wanted.q.zero}"
        if made not in self.values:
            self.values[made] = Value(made, wanted)
            self.nodes.append(Node("requantize", (name,), made, {}, source))
        return made


def convert(
    graph: Graph, plan: Plan, target: Target, weight_method: str = "minmax", made: Graph | None = None
) -> Graph:
    """The integer graph under the rounding rules of ``target``. made: an integer graph with the same encodings,
    whose weights are taken."""
    return as_computed(_Converter(graph, plan, weight_method, made).run(), target)


def as_computed(graph: Graph, target: Target) -> Graph:
    """An integer graph in the form that ``target`` computes, with its rounding constants."""
    return with_profile(equal_widths(graph) if target.equal_widths else graph, target.numerics)


def with_profile(graph: Graph, profile: str) -> Graph:
    """The same codes and encodings, rounded as another runtime does. A table that was measured from it stays, and so
    does a float graph (dynamic linears)."""
    if graph.level == "float":
        return graph
    nodes = []
    for node in graph.nodes:
        family = OPS[node.op].numerics
        if family != "move" and node.fixed.get("profile") != profile:
            view = graph.view(node)
            rule = rule_of(profile, family, view)
            node = replace(node, rule=rule.name, fixed=rule.derive(view))
        nodes.append(node)
    return verify(graph.rebuild(nodes))
