"""smooth: difficulty moves from activations with outlier channels into weights, by the free scales of the graph.

    x * (peak(x)^-a peak(w)^(1-a))   and   w / (the same)        per channel, a chosen per group

Xiao et al., "SmoothQuant" (arXiv:2211.10438), on every group of `channels`: also values into the output projection, the
MLP's gated product (MobileQuant, arXiv:2408.13933) and queries against keys, where the keys' peaks stand for the
weight's. ``a`` is fixed, or the one of a grid that leaves the group's readers the least squared error at the recipe's
widths (Outlier Suppression+, arXiv:2304.09145, searches likewise)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from edgeforge.compress.channels import NORMS, Channels, Group, factors, find_channels
from edgeforge.data import Dataset
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import OPS, WEIGHT
from edgeforge.ir.types import RANGE, TensorType
from edgeforge.quantize.assign import Plan, affine, assign, symmetric
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.weights import quantize_weight
from edgeforge.recipe import Recipe, Smooth
from edgeforge.sim.evaluate import run_float
from edgeforge.target import Target

#: Smallest peak of an activation's channel, as a share of the median.
LEAST = 0.05
GRID = tuple(float(a) for a in np.linspace(0, 1, 6))


def apply(graph: Graph, config: Smooth, recipe: Recipe, target: Target, data: Dataset) -> Graph:
    """``graph`` with the scales of every group (or of ``config.pairs``) folded in; ``data``: calibration samples."""
    channels = find_channels(graph)
    search = _Search(graph, channels, recipe, target, data, config.samples)
    chosen = np.zeros(channels.count)
    for group in channels.groups:
        if config.pairs == "norms" and any(search.nodes[name].op not in NORMS for name in group.up):
            continue
        chosen[group.span] = search.best(group, GRID if config.alpha is None else (config.alpha,))
    return channels.rescale(graph, chosen)


class _Search:
    """Peaks over all data, float activations of the most extreme ``samples``, and what any scales do to the products of
    a group there."""

    def __init__(self, graph: Graph, channels: Channels, recipe: Recipe, target: Target, data: Dataset, samples: int):
        self.graph, self.channels, self.target = graph, channels, target
        self.clips = recipe.weights != "minmax"
        self.nodes = graph.producers()
        self.weights = {value.name: torch.tensor(value.data) for value in graph.constants()}
        self.found, order = self.seen(data)
        picked = [data.sample(int(i)) for i in order[:samples]]
        feeds = {name: np.concatenate([sample[name] for sample in picked]) for name in graph.inputs}
        self.plan: Plan = assign(graph, calibrate(graph, [feeds]), recipe, target)
        self.exact = dict(self.weights)

        def keep(node: Node, y: torch.Tensor) -> None:
            self.exact[node.output] = y

        run_float(graph, feeds, keep)

    def best(self, group: Group, alphas: tuple[float, ...]) -> np.ndarray:
        """Log scales of the group: those of the only alpha, or of the alphas and none at all the least harmful."""
        high, low = self.peaks(group)
        moves = [np.log(low) * (1 - alpha) - np.log(high) * alpha for alpha in alphas]
        moves = [move - move.mean() for move in moves]
        if len(moves) == 1:
            return moves[0]
        return min((np.zeros_like(high), *moves), key=lambda move: self.error(group, move))

    def products(self, group: Group) -> list[Node]:
        """The nodes in which scales of the group meet their inverses."""
        contracted = [n for n in map(self.nodes.get, self.channels.contracted) if n and n.inputs[0] in group.values]
        return [*(self.nodes[name] for name in group.readers), *contracted]

    def numbers(self, node: Node, i: int) -> np.ndarray:
        """Scale numbers of a product's operand: of an activation, or of a weight's columns."""
        columns = self.channels.constants.get((node.output, i))
        return self.channels.labels[node.inputs[i]] if columns is None else columns[1]

    def peaks(self, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """Per scale the largest magnitude of what it multiplies, and of what it divides, over the group's products.
        What is far below the others counts as more: rare tokens would find it blown up."""
        high, low = self.found[:, 1:][:, group.span]
        return np.maximum(high, LEAST * np.median(high) + 1e-5 * high.max()), np.maximum(low, 1e-5 * low.max())

    def seen(self, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Peaks [2, count + 1] of all scales over all of ``data``, and the samples in which most values peak first."""
        found = np.zeros((2, self.channels.count + 1))
        readers: dict[str, list[np.ndarray]] = {}
        for node in (node for group in self.channels.groups for node in self.products(group)):
            for i in (0, 1):
                readers.setdefault(node.inputs[i], []).append(self.numbers(node, i))

        def see(name: str, x: torch.Tensor) -> None:
            for numbers in readers.get(name, ()):
                wide = np.broadcast_to(numbers, x.shape)
                np.maximum.at(found, ((wide < 0).astype(int), np.abs(wide)), x.abs().numpy())

        for value in self.graph.constants():
            see(value.name, self.weights[value.name])
        largest: dict[str, list[torch.Tensor]] = {}

        def see_batch(node: Node, y: torch.Tensor) -> None:
            if node.output in readers:
                see(node.output, y.abs().amax(0, keepdim=True))
                largest.setdefault(node.output, []).append(y.abs().flatten(1).amax(1))

        for batch in data.batches(8):
            run_float(self.graph, batch, see_batch)
        firsts = [int(torch.cat(parts).argmax()) for parts in largest.values()]
        return found, np.argsort(-np.bincount(np.array(firsts, int), minlength=len(data)), kind="stable")

    def error(self, group: Group, move: np.ndarray) -> float:
        """Squared error of the group's products, relative to their squares, when every value on the way from where the
        scales enter is rounded as the plan says."""
        log_scale = np.zeros(self.channels.count)
        log_scale[group.span] = move
        products = {node.output: node for node in self.products(group)}
        known: dict[str, torch.Tensor] = {}
        total = 0.0
        for node in self.graph.nodes:
            if node.output in products:
                wanted, got = self.exact[node.output], self.run(node, known, log_scale)
                total += float(((got - wanted) ** 2).mean() / (wanted**2).mean().clamp_min(1e-20))
            if node.output in (*group.up, *group.down):
                scaled = self.exact[node.output] * _factors(self.channels.labels[node.output], log_scale)
                known[node.output] = _rounded(scaled, self.plan.types[node.output])
            elif node.output in group.values:
                known[node.output] = _rounded(self.run(node, known, log_scale), self.plan.types[node.output])
        return total

    def run(self, node: Node, known: Mapping[str, torch.Tensor], log_scale: np.ndarray) -> torch.Tensor:
        """``node`` on rounded operands where ``known`` has them, a weight with the group's columns undone."""
        operands = []
        for i, name in enumerate(node.inputs):
            x = known.get(name, self.exact[name])
            wanted = self.plan.reads.get((node.output, i))
            if wanted is not None and name in known:
                second = self.target.second_operand_zero if node.op == "matmul" and i == 1 else None
                x = _rounded(x, wanted, second)
            if (node.output, i) in self.channels.constants and OPS[node.op].port(i).role == WEIGHT:
                x = self.weight(node, x, log_scale)
            operands.append(x)
        return OPS[node.op].torch(torch, self.graph.view(node), *operands)

    def weight(self, node: Node, w: torch.Tensor, log_scale: np.ndarray) -> torch.Tensor:
        precision = self.plan.precision[node.output]
        block = precision.block if node.op == "linear" else None
        scaled = (w * _factors(self.numbers(node, 1), log_scale)).numpy()
        method = "mse" if self.clips and precision.weights == "i4" else "minmax"  # at 8 bits nothing is gained
        value = quantize_weight(node.inputs[1], scaled, precision.weights, block, method)
        assert value.type.q is not None and value.data is not None
        return torch.from_numpy(value.type.q.dequantize(value.data))


def _factors(numbers: np.ndarray, log_scale: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(factors(numbers, log_scale).astype(np.float32))


def _rounded(x: torch.Tensor, kind: TensorType, zero: int | None = None) -> torch.Tensor:
    """What quantizing leaves of ``x`` at the width of ``kind``, over the range that ``x`` has."""
    limits = float(x.min()), float(x.max())
    q = affine(limits, kind.dtype) if zero is None else symmetric(limits, zero)
    low, high = RANGE[kind.dtype]
    return ((x / float(q.scale)).round() + q.zero).clamp(low, high).sub(q.zero).mul(float(q.scale))
