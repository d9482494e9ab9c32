"""layerwise: weights chosen layer by layer, each behind layers whose weights and activations are rounded already.

    float graph     x  -> y  = W x + b
    rounded graph   x' -> y' = W' x' + b'     W' = choose(layer),  b' = b + W mean(x) - W' mean(x')

A layer sees what it really reads, so that it can make up for the rounding before it; the bias takes up the shift of
the mean (bias correction as in `correct`), where there is one. Activations are rounded as the plan says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from edgeforge.ir.graph import Graph, Node, NodeView
from edgeforge.ir.op import ACT, LAYERS, OPS, WEIGHT
from edgeforge.ir.types import RANGE, TensorType
from edgeforge.passes.constants import with_constants
from edgeforge.quantize.assign import Plan, _data_range, affine
from edgeforge.quantize.weights import least_scale, quantize_weight

#: What a layer reads is sampled to about so many rows; of a convolution these are windows.
ROWS = 12000

Batches = Iterable[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Layer:
    """A linear or convolution of G groups in P output channels each, of D inputs (times kernel positions).

    weight float32 [G, P, D], bias [G, P]; exact, rounded: what it reads in the two graphs, float32 [G, N, D]; kind: an
    encoding with the weight's whole range; least: the smallest scale per channel; clamp: of the output."""

    weight: np.ndarray
    bias: np.ndarray
    exact: np.ndarray
    rounded: np.ndarray
    kind: TensorType
    least: np.ndarray | float
    clamp: tuple[float, float] | None

    @property
    def top(self) -> int:
        return RANGE[self.kind.dtype][1]

    def scaled(self, share: np.ndarray | float) -> tuple[TensorType, np.ndarray]:
        """``kind`` with its range times ``share`` (of all channels, or [G, P]), and its scales, float64 [G, P, D] or
        [G, P, 1]. Of blocks all have the share of their channel: their multipliers stay integers."""
        q = self.kind.q
        assert q is not None
        shares = np.broadcast_to(share, self.bias.shape).reshape(-1)
        if q.block is None:
            scale = np.maximum(q.scale * shares, self.least).astype(np.float32)
        else:
            scale = (q.scale * shares[:, None]).astype(np.float32)
        kind = replace(self.kind, q=replace(q, scale=scale))
        assert kind.q is not None
        wide = kind.q.broadcast(kind.shape).astype(np.float64)
        return kind, wide.reshape(*self.bias.shape, -1)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Of what it reads, about the mean, float64 [G, D, D]: rounded with rounded, and exact with rounded."""
        x, y = (a.astype(np.float64) - a.mean(1, keepdims=True) for a in (self.exact, self.rounded))
        return y.swapaxes(1, 2) @ y / y.shape[1], x.swapaxes(1, 2) @ y / y.shape[1]


#: A layer -> its weight [G, P, D] on the grid of the encoding beside it.
Choose = Callable[[Layer], tuple[np.ndarray, TensorType]]


def choose_layerwise(graph: Graph, plan: Plan, batches: Batches, choose: Choose) -> tuple[Graph, Plan]:
    """``graph`` with the chosen weights and biases, and ``plan`` with the encodings of the weights.

    All batches are in memory at once, as far as their values are still to be read. A weight that several layers share,
    or of a transposed convolution, is left alone."""
    walk = _Walk(graph, plan, [dict(batch) for batch in batches])
    changed: dict[tuple[str, int], np.ndarray] = {}
    kinds: dict[str, TensorType] = {}
    for node in graph.nodes:
        given: dict[int, np.ndarray] = {}
        if own_weight(graph, node):
            layer = walk.layer(node)
            weight, kind = choose(layer)
            shift = _means(layer.weight, layer.exact) - _means(weight, layer.rounded)
            assert kind.q is not None
            given[1] = kind.q.dequantize(kind.q.quantize(weight.reshape(kind.shape), kind.dtype))
            if len(node.inputs) == 3:
                given[2] = (layer.bias + shift).ravel().astype(np.float32)
            changed |= {(node.output, i): array for i, array in given.items()}
            kinds[node.output] = kind
        walk.step(node, given)
    graph = with_constants(graph, changed)
    made = graph.producers()
    return graph, replace(plan, constants={**plan.constants, **{made[o].inputs[1]: k for o, k in kinds.items()}})


def _means(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum("gpd,gd->gp", weight.astype(np.float64), x.mean(1, dtype=np.float64))


def own_weight(graph: Graph, node: Node) -> bool:
    """Whether ``node`` is a linear or convolution that alone reads its weight."""
    if node.op not in LAYERS or node.op == "conv_transpose2d":
        return False
    return len(graph.users()[node.inputs[1]]) == 1


def grouped(node: Node, weight: np.ndarray) -> np.ndarray:
    """A weight [O, ...] as [G, P, D]."""
    groups = node.attrs.get("groups", 1)
    return weight.reshape(groups, len(weight) // groups, -1)


def first_encoding(
    graph: Graph, plan: Plan, node: Node, scales: str, data: np.ndarray | None = None
) -> tuple[TensorType, np.ndarray | float]:
    """The encoding of a layer's weight (or of ``data`` in its place) by itself, and its smallest scale per channel."""
    precision, data = plan.precision[node.output], _data(graph, node, 1) if data is None else data
    least: np.ndarray | float = 0.0
    if len(node.inputs) == 3:
        bias, kind = graph.values[node.inputs[2]].data, plan.reads.get((node.output, 0), plan.types[node.inputs[0]])
        assert bias is not None and kind.q is not None
        least = least_scale(bias, float(kind.q.scale))
    block = precision.block if node.op == "linear" else None
    return quantize_weight(node.inputs[1], data, precision.weights, block, scales, least).type, least


def patches(n: NodeView, x: np.ndarray, most: int | None) -> np.ndarray:
    """What a layer multiplies, [G, N, D], from its input [N, ...]: of each sample at most ``most`` rows (None: all), at
    random places that are the same in every call. A linear has the rows of its input, a convolution windows of it."""
    picks = np.random.default_rng(0)
    if n.node.op == "linear":
        x = x.reshape(len(x), -1, x.shape[-1])
        if most is not None and most < x.shape[1]:
            x = x[:, np.sort(picks.permutation(x.shape[1])[:most])]
        return x.reshape(1, -1, x.shape[-1])
    top, left, bottom, right = n["pads"]
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (kh, kw), (sh, sw), (dh, dw) = n.shape(1)[2:], n["stride"], n["dilation"]
    height, width = n.out.shape[2:]
    at = np.sort(picks.permutation(height * width)[:most])
    rows = (at // width * sh)[:, None] + np.repeat(np.arange(kh) * dh, kw)
    columns = (at % width * sw)[:, None] + np.tile(np.arange(kw) * dw, kh)
    found = x[:, :, rows, columns].reshape(len(x), n["groups"], -1, len(at), kh * kw)
    return found.transpose(1, 0, 3, 2, 4).reshape(n["groups"], len(x) * len(at), -1)


class _Walk:
    """Both graphs, node by node, on all batches."""

    def __init__(self, graph: Graph, plan: Plan, batches: list[dict[str, np.ndarray]]):
        self.graph, self.plan = graph, plan
        self.size = sum(len(batch[graph.inputs[0]]) for batch in batches)
        self.exact: dict[str, list[torch.Tensor]] = {}
        self.rounded: dict[str, list[torch.Tensor]] = {}
        self.left = Counter(name for node in graph.nodes for name in set(node.inputs))
        self.count = len(batches)
        for name in graph.inputs:
            self.exact[name] = [torch.from_numpy(np.array(batch[name])) for batch in batches]
            self.rounded[name] = [rounded(x, plan.types.get(name)) for x in self.exact[name]]

    def layer(self, node: Node) -> Layer:
        n = self.graph.view(node)
        kind, least = first_encoding(self.graph, self.plan, node, "minmax")
        weight = grouped(node, _data(self.graph, node, 1))
        bias = _data(self.graph, node, 2) if n.arity == 3 else np.zeros(n.shape(1)[0], np.float32)
        most = max(ROWS // self.size, 1)
        exact = [patches(n, x.numpy(), most) for x in self.exact[node.inputs[0]]]
        reads = [patches(n, self.read(node, 0, x).numpy(), most) for x in self.rounded[node.inputs[0]]]
        x, y = (np.concatenate(parts, 1) for parts in (exact, reads))
        return Layer(weight, bias.reshape(weight.shape[:2]), x, y, kind, least, node.attrs.get("clamp"))

    def read(self, node: Node, i: int, x: torch.Tensor) -> torch.Tensor:
        return rounded(x, self.plan.reads.get((node.output, i)))

    def step(self, node: Node, given: Mapping[int, np.ndarray]) -> None:
        """given: constants of the rounded graph in place of those that the plan gives it."""
        view, acts = self.graph.view(node), {name for name in node.inputs if not self.graph.values[name].const}
        done = {name for name in acts if self.left[name] == 1}
        ours = {name: tensor(self.graph, name) for name in node.inputs if name not in acts}
        theirs = {i: torch.from_numpy(array) for i, array in given.items()}
        results: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        with torch.no_grad():
            for i, name in enumerate(node.inputs):
                if name not in acts and i not in theirs:
                    theirs[i] = _constant(self.graph, self.plan, node, i)
            for b in range(self.count):
                exact = {**ours, **{name: self.exact[name][b] for name in acts}}
                results[0].append(OPS[node.op].torch(torch, view, *(exact[name] for name in node.inputs)))
                seen = {i: self.read(node, i, self.rounded[x][b]) for i, x in enumerate(node.inputs) if x in acts}
                operands = [operand for _, operand in sorted((theirs | seen).items(), key=lambda item: item[0])]
                y = OPS[node.op].torch(torch, view, *operands)
                results[1].append(rounded(y, self.plan.types.get(node.output)))
                for name in done:
                    self.exact[name][b] = self.rounded[name][b] = torch.empty(0)
        self.exact[node.output], self.rounded[node.output] = results
        for name in acts:
            self.left[name] -= 1
        for name in done:
            del self.exact[name], self.rounded[name]


def _constant(graph: Graph, plan: Plan, node: Node, i: int) -> torch.Tensor:
    """A constant operand as `convert` encodes it."""
    name, role, data = node.inputs[i], OPS[node.op].port(i).role, _data(graph, node, i)
    kind: TensorType | None = None
    if role == WEIGHT:
        kind = plan.constants.get(name) or first_encoding(graph, plan, node, "minmax")[0]
    elif role == ACT:
        kind = plan.types.get(name) if OPS[node.op].shared else None
        dtype = plan.types[node.output].dtype
        kind = kind or TensorType(data.shape, dtype, affine(_data_range(data), dtype))
    if kind is None or kind.q is None:
        return tensor(graph, name)
    return torch.from_numpy(kind.q.dequantize(kind.q.quantize(data, kind.dtype)))


def _data(graph: Graph, node: Node, i: int) -> np.ndarray:
    data = graph.values[node.inputs[i]].data
    assert data is not None
    return data


def tensor(graph: Graph, name: str) -> torch.Tensor:
    """A constant, in place if it can be."""
    data = graph.values[name].data
    assert data is not None
    return torch.from_numpy(data if data.flags.writeable else np.array(data))


def rounded(x: torch.Tensor, kind: TensorType | None) -> torch.Tensor:
    """The nearest values that an encoding has."""
    if kind is None or kind.q is None:
        return x
    low, high = RANGE[kind.dtype]
    return torch.fake_quantize_per_tensor_affine(x, float(kind.q.scale), kind.q.zero, low, high)
