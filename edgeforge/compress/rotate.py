"""rotate: residual streams, linear bottlenecks and values in other orthonormal bases, in which no channel sticks out.

    x = table[ids]; y = x + w_out f(rms_norm(x) w_in^T)    =>    the same with table Q, Q^T w_out, w_in Q
    x = u w_a^T;    y = x + w_out f(x w_in^T)              =>    the same with Q^T w_a, Q^T w_out, w_in Q
    o = p (x w_v^T) w_o^T                                  =>    the same with Q^T w_v, w_o Q       per head of values

rms_norm commutes with an orthogonal Q once its gain is folded into the layers that read it; what layers read with no
activation between (MobileNetV2's bottlenecks, channels of convolutions) may turn as it is. Rotations R1 and R2 of Liu
et al., "SpinQuant" (arXiv:2405.16406), and Ashkboos et al., "QuaRot" (arXiv:2404.00456), not trained: a Hadamard matrix
with random signs, times a random orthogonal matrix where the width is no power of two. They cost nothing at run time;
R3 and R4 need a Hadamard product in the graph, which no target offers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from edgeforge.compress.channels import find_channels
from edgeforge.data import Dataset
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import LAYERS
from edgeforge.passes.constants import with_constants
from edgeforge.recipe import Recipe, Rotate
from edgeforge.target import Target


def apply(graph: Graph, config: Rotate, recipe: Recipe, target: Target, data: Dataset) -> Graph:
    """``graph`` with every value or sum of values rotated that only embeddings and layers without a clamp write and
    only layers read, or rms_norms before linears; and attention's values wherever nothing lies between two linears but
    products with attention weights. ``data`` is not read."""
    graph = fold_gains(graph)
    rng = np.random.default_rng(config.seed)
    for stream in _streams(graph):
        graph = _turned(graph, stream, rng)
    return _turned_values(graph, rng)


def fold_gains(graph: Graph) -> Graph:
    """rms_norm(x, g) w^T   =>   rms_norm(x, 1) (w g)^T     where only linears with weights of their own read it"""
    changed: dict[tuple[str, int], np.ndarray] = {}
    for node in graph.nodes:
        readers = _readers(graph, node) if node.op == "rms_norm" else []
        if readers:
            gain = _data(graph, node, 1)
            changed[node.output, 1] = np.ones_like(gain)
            changed |= {(reader.output, 1): _data(graph, reader, 1) * gain for reader in readers}
    return with_constants(graph, changed)


@dataclass(frozen=True)
class _Stream:
    """Nodes that write a value or the parts of a sum, and the layers that read it, themselves or through a norm."""

    writers: tuple[Node, ...]
    readers: tuple[Node, ...]


def orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal [size, size] whose entries are of nearly equal magnitude where ``size`` is a power of two."""
    power = size & -size
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
    mixed, _ = np.linalg.qr(rng.normal(size=(size // power, size // power)))
    return np.kron(mixed, hadamard / np.sqrt(power)) * rng.choice([-1.0, 1.0], size)[:, None]


def _data(graph: Graph, node: Node, i: int) -> np.ndarray:
    data = graph.values[node.inputs[i]].data
    assert data is not None
    return data.astype(np.float64)


def _mixes_channels(graph: Graph, node: Node) -> bool:
    """Whether every output of ``node`` reads all channels, by a weight that no other layer has."""
    whole = node.op == "linear" or (node.op == "conv2d" and node.attrs["groups"] == 1)
    return whole and sum(n.op in LAYERS and n.inputs[1] == node.inputs[1] for n in graph.nodes) == 1


def _readers(graph: Graph, norm: Node) -> list[Node]:
    """The linears that read a norm, or none if anything else does."""
    users = [node for node in graph.nodes if norm.output in node.inputs]
    fit = all(node.op == "linear" and _mixes_channels(graph, node) for node in users)
    return users if fit and norm.output not in graph.outputs else []


def _streams(graph: Graph) -> list[_Stream]:
    """Activations, joined through add, as far as they may be rotated."""
    root = {name: name for name in graph.values}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    sums = {node.output for node in graph.nodes if _is_sum(graph, node)}
    for node in graph.nodes:
        if node.output in sums:
            for name in node.inputs:
                root[find(name)] = find(node.output)
    members: dict[str, list[str]] = {}
    for name in graph.values:
        members.setdefault(find(name), []).append(name)
    turning = {node.output for node in graph.nodes if _turns(graph, node)}
    groups = [set(names) for names in members.values() if turning.intersection(names)]
    return [stream for names in groups if (stream := _stream(graph, names, sums)) is not None]


def _is_sum(graph: Graph, node: Node) -> bool:
    shapes = {graph.type(name).shape for name in (*node.inputs, node.output)}
    return node.op == "add" and "clamp" not in node.attrs and len(shapes) == 1


def _stream(graph: Graph, names: set[str], sums: set[str]) -> _Stream | None:
    if names & {*graph.inputs, *graph.outputs} or any(graph.values[name].const for name in names):
        return None
    writers = [node for node in graph.nodes if node.output in names - sums]
    outside = [node for node in graph.nodes if names & set(node.inputs) and node.output not in sums]
    readers = [_behind(graph, node) for node in outside]
    if not readers or not all(readers) or not all(_turns(graph, node) for node in writers):
        return None
    both = [*writers, *itertools.chain(*readers)]
    if len({node.op == "conv2d" for node in both}) > 1:  # their channels lie in different axes
        return None
    return _Stream(tuple(writers), tuple(both[len(writers) :]))


def _behind(graph: Graph, node: Node) -> list[Node]:
    """The layers in which ``node``, one of the readers of a stream, undoes a rotation; none if it cannot."""
    if _is_even_norm(graph, node):
        return _readers(graph, node)
    return [node] if _mixes_channels(graph, node) else []


def _turns(graph: Graph, node: Node) -> bool:
    return node.op == "gather" or (_mixes_channels(graph, node) and "clamp" not in node.attrs)


def _is_even_norm(graph: Graph, node: Node) -> bool:
    return node.op == "rms_norm" and bool(np.ptp(_data(graph, node, 1)) == 0)


def _turned(graph: Graph, stream: _Stream, rng: np.random.Generator) -> Graph:
    q = orthogonal(graph.type(stream.readers[0].inputs[1]).shape[1], rng)
    changed = {(n.output, 1): np.moveaxis(np.tensordot(_data(graph, n, 1), q, (1, 0)), -1, 1) for n in stream.readers}
    for node in stream.writers:
        if node.op == "gather":
            changed[node.output, 0] = _data(graph, node, 0) @ q
        else:
            weight = changed.get((node.output, 1), _data(graph, node, 1))
            changed[node.output, 1] = np.tensordot(q.T, weight, 1)
        if len(node.inputs) == 3:
            changed[node.output, 2] = _data(graph, node, 2) @ q
    return with_constants(graph, changed)


#: What the way from values to the output projection may consist of: it moves channels and mixes tokens.
_MIXING = {"linear", "reshape", "transpose", "slice", "concat", "expand", "matmul"}


def _turned_values(graph: Graph, rng: np.random.Generator) -> Graph:
    """v = x w_v^T; o = (p v) w_o^T   =>   v = x (q^T w_v)^T; o = (p v) (w_o q)^T     per head of values"""
    channels, nodes, changed = find_channels(graph), graph.producers(), {}
    for group in channels.groups:
        way = [nodes[name] for name in group.values]
        products = [node for node in way if node.op == "matmul"]
        if group.down or len(group.readers) != 1 or len(products) != 1 or not all(map(_mixes, way)):
            continue
        numbers = channels.labels[products[0].inputs[1]]
        for head in np.unique(numbers.reshape(-1, numbers.shape[-1]), axis=0):
            q = orthogonal(len(head), rng)
            writers = [(output, i, 0, 1) for output in group.up for i in range(len(nodes[output].inputs))]
            for output, i, which, sign in (*writers, (group.readers[0], 1, 1, -1)):
                if (output, i) in channels.constants:
                    data = changed.get((output, i), _data(graph, nodes[output], i))
                    part = sign * np.broadcast_to(channels.constants[output, i][which], data.shape)
                    changed[output, i] = _mixed(data, part, head, q)
    return with_constants(graph, changed)


def _mixes(node: Node) -> bool:
    return node.op in _MIXING and "clamp" not in node.attrs


def _mixed(data: np.ndarray, numbers: np.ndarray, head: np.ndarray, q: np.ndarray) -> np.ndarray:
    """``data`` with every run of entries that ``head`` numbers turned by ``q``."""
    places = np.stack([np.flatnonzero(numbers == number) for number in head], 1)
    made = data.copy()
    made.reshape(-1)[places] = data.reshape(-1)[places] @ q
    return made
