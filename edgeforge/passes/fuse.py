"""Fusions that leave the real function unchanged and give the quantizer fewer tensors to round."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import CONVOLUTIONS, LAYERS
from edgeforge.ir.types import TensorType, Value

CLAMPABLE = (*LAYERS, "add")


def fuse_batch_norm(graph: Graph) -> Graph:
    """y = mul(conv2d(x, w, b), s); z = add(y, t)   =>   z = conv2d(x, w * s, b * s + t)      (also linear)

    Batch normalization arrives from the frontends as this affine pair with constants of one number per channel."""
    values, users, producers = dict(graph.values), graph.users(), graph.producers()
    replaced: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op not in ("mul", "add"):
            continue
        data, other = _constant_operand(graph, node)
        dot = replaced.get(other, producers.get(other)) if data is not None else None
        if dot is None or dot.op not in LAYERS or "clamp" in dot.attrs:
            continue
        if len(users[other]) != 1 or other in graph.outputs:
            continue
        channels = values[dot.inputs[1]].type.shape[0]
        per_channel = _per_channel(data, dot.op, channels, len(graph.type(node.output).shape))
        if per_channel is None or graph.type(node.output).shape != graph.type(other).shape:
            continue
        replaced[node.output] = _absorb(values, dot, node, per_channel)
        replaced[other] = replaced[node.output]
    nodes = [replaced.get(node.output, node) for node in graph.nodes]
    kept = (node for node, old in zip(nodes, graph.nodes, strict=True) if node.output == old.output)
    return graph.rebuild(kept, values)


def _constant_operand(graph: Graph, node: Node) -> tuple[np.ndarray | None, str]:
    a, b = node.inputs
    if graph.values[b].const:
        return graph.values[b].data, a
    return graph.values[a].data, b


def _per_channel(data: np.ndarray, op: str, channels: int, rank: int) -> np.ndarray | None:
    axis = 1 if op in CONVOLUTIONS else rank - 1
    full = data.reshape((1,) * (rank - data.ndim) + data.shape) if data.ndim <= rank else None
    if full is None or any(size != 1 for d, size in enumerate(full.shape) if d != axis):
        return None
    return np.broadcast_to(full.reshape(-1), channels).astype(np.float32)


def _absorb(values: dict[str, Value], dot: Node, node: Node, factor: np.ndarray) -> Node:
    weight = values[dot.inputs[1]].data
    assert weight is not None
    bias = values[dot.inputs[2]].data if len(dot.inputs) == 3 else np.zeros(len(weight), np.float32)
    if node.op == "mul":
        weight, bias = weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), bias * factor
    else:
        bias = bias + factor
    names = (f"{node.output}.weight", f"{node.output}.bias")
    for name, array in zip(names, (weight, bias), strict=True):
        values[name] = Value(name, TensorType(array.shape), np.ascontiguousarray(array, np.float32))
    return Node(dot.op, (dot.inputs[0], *names), node.output, dot.attrs, dot.source)


GATES = {"sigmoid": "silu", "hardsigmoid": "hardswish"}


def fuse_silu(graph: Graph) -> Graph:
    """s = sigmoid(x); y = mul(x, s)   =>   y = silu(x)     (also hardsigmoid and hardswish)"""
    producers, users = graph.producers(), graph.users()
    nodes = []
    for node in graph.nodes:
        if node.op == "mul":
            for gate, x in (node.inputs, node.inputs[::-1]):
                made = producers.get(gate)
                if made is not None and made.op in GATES and made.inputs == (x,) and len(users[gate]) == 1:
                    node = Node(GATES[made.op], (x,), node.output, {}, node.source)
                    break
        nodes.append(node)
    from edgeforge.passes.dead import remove_dead

    return remove_dead(graph.rebuild(nodes))


def fuse_clamp(graph: Graph) -> Graph:
    """y = conv2d(x, w, b); z = clip(y) low=0 high=6   =>   z = conv2d(x, w, b) clamp=(0, 6)     (relu; linear, add)"""
    producers, users = graph.producers(), graph.users()
    fused: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op not in ("relu", "clip"):
            continue
        made = producers.get(node.inputs[0])
        alone = made is not None and len(users[made.output]) == 1 and made.output not in graph.outputs
        if alone and made.op in CLAMPABLE and "clamp" not in made.attrs:
            clamp = (0.0, float("inf")) if node.op == "relu" else (node.attrs["low_real"], node.attrs["high_real"])
            fused[node.output] = Node(
                made.op, made.inputs, node.output, {**made.attrs, "clamp": clamp}, made.source or node.source
            )
            fused[made.output] = fused[node.output]
    nodes = [fused.get(node.output, node) for node in graph.nodes]
    return graph.rebuild(node for node, old in zip(nodes, graph.nodes, strict=True) if node.output == old.output)
