"""layerwise: weights chosen layer by layer, each behind layers whose weights and activations are rounded already.

    float graph     x  -> y  = W x + b
    rounded graph   x' -> y' = W' x' + b'     W' = choose(layer),  b' = b + W mean(x) - W' mean(x')

A layer sees what it really reads, so that it can make up for the rounding before it; the bias takes up the shift of
the mean (bias correction as in `correct`), where there is one. Activations are rounded as the plan says. Where a clamp
is fused, means and moments of a channel are those of the rows that pass it: errors elsewhere are not seen (AdaRound,
arXiv:2004.10568, has the clamp in its loss for the same reason)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from edgeforge.ir.graph import Graph, Node, NodeView
from edgeforge.ir.op import ACT, LAYERS, OPS, WEIGHT
from edgeforge.ir.types import RANGE, TensorType
from edgeforge.passes.constants import with_constants
from edgeforge.quantize.assign import Plan, _data_range, affine
from edgeforge.quantize.weights import least_scale, quantize_weight

#: What a layer reads is sampled to about so many rows, of so many numbers; of a convolution these are windows.
ROWS, NUMBERS = 60_000, 100_000_000

#: Rows pass a clamp by so many standard deviations of the output: rounding may bring them back.
MARGIN = 0.05

#: A channel with fewer rows that pass has all rows.
FEWEST = 200

#: Moments that are in memory at once, and values of samples.
MOMENTS, MOST_BYTES = 16_000_000, 2 << 30

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

    @cached_property
    def passing(self) -> np.ndarray | None:
        """The rows of each channel that pass the clamp, bool [G, P, N]; None without one."""
        if self.clamp is None:
            return None
        y = self.weight @ self.exact.swapaxes(1, 2) + self.bias[..., None]
        slack, (low, high) = MARGIN * y.std(2, keepdims=True), self.clamp
        found = (y > low - slack) & (y < high + slack)
        found[found.sum(2) < FEWEST] = True
        return found

    def moments(self) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """Places of channels in [G, P], and the moments of what they read about its mean, float64 [K, D, D]: rounded
        with rounded, and exact with rounded. K: the groups, or channels where each has rows of its own."""
        if self.passing is None:
            found = [_moments(x, y) for x, y in zip(*(a.astype(np.float64) for a in self._reads), strict=True)]
            yield (slice(None),), *map(np.stack, zip(*found, strict=True))
            return
        _, outputs, inputs = self.weight.shape
        for g, (x, y) in enumerate(zip(*self._reads, strict=True)):
            step = max(MOMENTS // inputs**2, 1)
            for first in range(0, outputs, step):
                rows = self.passing[g, first : first + step]
                found = [_moments(x[picked], y[picked]) for picked in rows]
                yield (g, slice(first, first + step)), *map(np.stack, zip(*found, strict=True))

    def shift(self, weight: np.ndarray) -> np.ndarray:
        """Mean of the output less that with ``weight``, [G, P], over the rows that pass."""
        if self.passing is None:
            x, y = (a.mean(1, dtype=np.float64)[:, None] for a in self._reads)
        else:
            share = self.passing / self.passing.sum(2, keepdims=True, dtype=np.float32)
            x, y = (share @ a for a in self._reads)
        return (self.weight * x - weight * y).sum(2)

    @property
    def _reads(self) -> tuple[np.ndarray, np.ndarray]:
        return self.exact, self.rounded


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [D, D] of [N, D], computed as they are."""
    x, y = (a - a.mean(0) for a in (x, y))
    return (y.T @ y / len(y)).astype(np.float64), (x.T @ y / len(y)).astype(np.float64)


#: A layer -> its weight [G, P, D] on the grid of the encoding beside it.
Choose = Callable[[Layer], tuple[np.ndarray, TensorType]]


def choose_layerwise(graph: Graph, plan: Plan, batches: Batches, choose: Choose) -> tuple[Graph, Plan]:
    """``graph`` with the chosen weights and biases, and ``plan`` with the encodings of the weights.

    Layers see as many batches as fit MOST_BYTES, those with large values fewer. A weight that several layers share, or
    of a transposed convolution, is left alone."""
    walk = _Walk(graph, plan, batches)
    changed: dict[tuple[str, int], np.ndarray] = {}
    kinds: dict[str, TensorType] = {}
    for node in graph.nodes:
        given: dict[int, np.ndarray] = {}
        if own_weight(graph, node):
            layer = walk.layer(node)
            weight, kind = choose(layer)
            assert kind.q is not None
            given[1] = kind.q.dequantize(kind.q.quantize(weight.reshape(kind.shape), kind.dtype))
            if len(node.inputs) == 3:
                given[2] = (layer.bias + layer.shift(weight)).ravel().astype(np.float32)
            changed |= {(node.output, i): array for i, array in given.items()}
            kinds[node.output] = kind
        walk.step(node, given)
    graph = with_constants(graph, changed)
    made = graph.producers()
    return graph, replace(plan, constants={**plan.constants, **{made[o].inputs[1]: k for o, k in kinds.items()}})


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
        assert bias is not None
        least = least_scale(bias, kind)
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


@dataclass
class _Batch:
    """What is still to be read, in the float graph and in the rounded one."""

    exact: dict[str, torch.Tensor]
    rounded: dict[str, torch.Tensor]


class _Walk:
    """Both graphs, node by node, on all batches that fit."""

    def __init__(self, graph: Graph, plan: Plan, batches: Batches):
        self.graph, self.plan = graph, plan
        self.last = {name: node.output for node in graph.nodes for name in node.inputs}
        self.bytes, self.done = _most_bytes(graph, self.last), 0
        #: By node and input: a constant in the two graphs, for as long as batches are to follow.
        self.given: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
        self.batches: list[_Batch] = []
        self.size, self.waiting = 0, iter(batches)
        self.next: Mapping[str, np.ndarray] | None = next(self.waiting, None)

    def join(self) -> None:
        """Bring further batches to where the walk is, while they fit."""
        while self.next is not None:
            count = len(self.next[self.graph.inputs[0]])
            if self.batches and (self.size + count) * self.bytes[self.done] > MOST_BYTES:
                return
            exact = {name: torch.from_numpy(np.array(self.next[name])) for name in self.graph.inputs}
            batch = _Batch(exact, {name: rounded(x, self.plan.types.get(name)) for name, x in exact.items()})
            for node in self.graph.nodes[: self.done]:
                self._advance(batch, node)
            self.batches.append(batch)
            self.size, self.next = self.size + count, next(self.waiting, None)

    def layer(self, node: Node) -> Layer:
        self.join()
        n = self.graph.view(node)
        kind, least = first_encoding(self.graph, self.plan, node, "minmax")
        weight = grouped(node, _data(self.graph, node, 1))
        bias = _data(self.graph, node, 2) if n.arity == 3 else np.zeros(n.shape(1)[0], np.float32)
        rows = min(ROWS, NUMBERS // (len(weight) * weight.shape[2]))
        most, name = max(rows // self.size, 1), node.inputs[0]
        exact = [patches(n, batch.exact[name].numpy(), most) for batch in self.batches]
        reads = [patches(n, self.read(node, 0, batch.rounded[name]).numpy(), most) for batch in self.batches]
        x, y = (np.concatenate(parts, 1) for parts in (exact, reads))
        return Layer(weight, bias.reshape(weight.shape[:2]), x, y, kind, least, node.attrs.get("clamp"))

    def read(self, node: Node, i: int, x: torch.Tensor) -> torch.Tensor:
        return rounded(x, self.plan.reads.get((node.output, i)))

    def step(self, node: Node, given: Mapping[int, np.ndarray]) -> None:
        """given: constants of the rounded graph in place of those that the plan gives it."""
        self.join()
        pairs = self.given[node.output] = {}
        for i, name in enumerate(node.inputs):
            if self.graph.values[name].const:
                theirs = torch.from_numpy(given[i]) if i in given else _constant(self.graph, self.plan, node, i)
                pairs[i] = tensor(self.graph, name), theirs
        for batch in self.batches:
            self._advance(batch, node)
        self.done += 1
        if self.next is None:
            self.given.clear()

    def _advance(self, batch: _Batch, node: Node) -> None:
        view, op = self.graph.view(node), OPS[node.op].torch
        pairs = dict(self.given[node.output])
        for i, name in enumerate(node.inputs):
            if i not in pairs:
                pairs[i] = batch.exact[name], self.read(node, i, batch.rounded[name])
        exact, seen = zip(*(pairs[i] for i in range(len(node.inputs))), strict=True)
        with torch.no_grad():
            batch.exact[node.output] = op(torch, view, *exact)
            batch.rounded[node.output] = rounded(op(torch, view, *seen), self.plan.types.get(node.output))
        for name in set(node.inputs):
            if self.last[name] == node.output and name in batch.exact:
                del batch.exact[name], batch.rounded[name]


def _most_bytes(graph: Graph, last: Mapping[str, str]) -> list[int]:
    """Of values that are in memory for one sample, in both graphs, at each node or any behind it."""
    live, sizes = set(graph.inputs), []
    for node in graph.nodes:
        live.add(node.output)
        sizes.append(sum(8 * math.prod(graph.type(name).shape) for name in live))
        live -= {name for name in node.inputs if last[name] == node.output}
    return [max(sizes[i:]) for i in range(len(sizes))]


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
