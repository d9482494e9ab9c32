"""Normalization written out in arithmetic becomes one node again: the quantizer then rounds once, not seven times."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import TensorType, Value
from edgeforge.passes.dead import remove_dead


class _Rewrite:
    """A graph whose nodes are replaced one at a time, in order."""

    def __init__(self, graph: Graph):
        self.graph, self.values, self.users = graph, dict(graph.values), graph.users()
        self.made: dict[str, Node] = {}

    def node(self, name: str, *ops: str) -> Node | None:
        """The producer of ``name`` if it is one of ``ops``."""
        found = self.made.get(name)
        return found if found is not None and found.op in ops else None

    def split(self, node: Node) -> tuple[np.ndarray, str] | None:
        """(constant, other operand) of a node with two inputs, one of them constant."""
        for const, other in (node.inputs, node.inputs[::-1]):
            data = self.values[const].data
            if data is not None and self.values[other].data is None:
                return data, other
        return None

    def alone(self, name: str) -> bool:
        return len(self.users[name]) == 1 and name not in self.graph.outputs

    def constant(self, name: str, data: np.ndarray) -> str:
        self.values[name] = Value(name, TensorType(data.shape), np.ascontiguousarray(data, np.float32))
        return name

    def finish(self) -> Graph:
        return remove_dead(self.graph.rebuild(self.made.values(), self.values))


def fuse_norm(graph: Graph) -> Graph:
    """m = reduce_mean(x * x) last axis; r = rsqrt(m + eps); y = x * r; z = y * w   =>   z = rms_norm(x, w)
    d = x - reduce_mean(x); y = rms_norm(d, w); z = y + b                           =>   z = layer_norm(x, w, b)"""
    g = _Rewrite(graph)
    for node in graph.nodes:
        g.made[node.output] = _whole(g, node) or _gain(g, node) or _shift(g, node) or node
    return g.finish()


def _whole(g: _Rewrite, node: Node) -> Node | None:
    if node.op != "mul":
        return None
    for x, inverse in (node.inputs, node.inputs[::-1]):
        eps = _inverse_rms(g, x, inverse)
        if eps is not None:
            features = g.values[x].type.shape[-1]
            gain = g.constant(f"{node.output}.gain", np.ones(features, np.float32))
            return _centered(g, Node("rms_norm", (x, gain), node.output, {"eps": eps}, node.source))
    return None


def _inverse_rms(g: _Rewrite, x: str, name: str) -> float | None:
    """eps if ``name`` is 1 / sqrt(mean(x^2) + eps) over the last axis."""
    root = g.node(name, "rsqrt")
    if root is None and (outer := g.node(name, "reciprocal")) is not None:
        root = g.node(outer.inputs[0], "sqrt")
    total = g.node(root.inputs[0], "add") if root is not None else None
    parts = g.split(total) if total is not None else None
    mean = g.node(parts[1], "reduce_mean") if parts is not None and parts[0].size == 1 else None
    square = g.node(mean.inputs[0], "mul") if mean is not None and _last(g, mean) else None
    if parts is None or square is None or square.inputs != (x, x):
        return None
    return float(parts[0].reshape(()))


def _last(g: _Rewrite, mean: Node) -> bool:
    rank = len(g.values[mean.inputs[0]].type.shape)
    return tuple(mean.attrs["axes"]) == (rank - 1,) and bool(mean.attrs["keepdims"])


def _centered(g: _Rewrite, norm: Node) -> Node:
    """rms_norm of deviations from the mean is layer_norm."""
    difference = g.node(norm.inputs[0], "sub")
    mean = g.node(difference.inputs[1], "reduce_mean") if difference is not None else None
    if difference is None or mean is None or not _last(g, mean) or mean.inputs[0] != difference.inputs[0]:
        return norm
    gain = norm.inputs[1]
    bias = g.constant(f"{norm.output}.bias", np.zeros(g.values[gain].type.shape, np.float32))
    return Node("layer_norm", (difference.inputs[0], gain, bias), norm.output, norm.attrs, norm.source)


def _per_feature(g: _Rewrite, node: Node) -> tuple[np.ndarray, Node] | None:
    """(one number per feature, the normalization it is applied to)."""
    parts = g.split(node)
    norm = g.node(parts[1], "rms_norm", "layer_norm") if parts is not None and g.alone(parts[1]) else None
    if parts is None or norm is None or g.values[node.output].type.shape != g.values[norm.output].type.shape:
        return None
    features = g.values[norm.inputs[1]].type.shape[0]
    data = parts[0]
    if data.size not in (1, features) or (data.size > 1 and data.shape[-1] != features):
        return None
    return np.broadcast_to(data.reshape(-1), (features,)), norm


def _gain(g: _Rewrite, node: Node) -> Node | None:
    found = _per_feature(g, node) if node.op == "mul" else None
    if found is None:
        return None
    factor, norm = found
    scaled = []
    for i, name in enumerate(norm.inputs[1:]):
        data = g.values[name].data
        assert data is not None
        scaled.append(g.constant(f"{node.output}.{'gain' if i == 0 else 'bias'}", data * factor))
    return Node(norm.op, (norm.inputs[0], *scaled), node.output, norm.attrs, norm.source or node.source)


def _shift(g: _Rewrite, node: Node) -> Node | None:
    found = _per_feature(g, node) if node.op == "add" else None
    if found is None or found[1].op != "layer_norm":
        return None
    shift, norm = found
    old = g.values[norm.inputs[2]].data
    assert old is not None
    bias = g.constant(f"{node.output}.bias", old + shift)
    return Node(norm.op, (*norm.inputs[:2], bias), node.output, norm.attrs, norm.source or node.source)
