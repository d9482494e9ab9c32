"""Outliers as large language models have them, planted into a decoder without changing its function.

1. Outlier channels: a few channels of every free scale (see `edgeforge.compress.channels`) are multiplied by 10..60.
2. An attention sink's massive activations: some MLPs get 32 more units in pairs. Both units of a pair answer the first
   token (whose hidden state never varies) with the same huge number and all others with almost nothing; their columns
   of the down projection are opposite, so their sum is 0.
       gate', up' = [gate; g; g], [up; u; u]     down' = [down, c, -c]

Sun et al., "Massive Activations in Large Language Models" (arXiv:2402.17762); Dettmers et al., "LLM.int8()"
(arXiv:2208.07339). Nothing in `edgeforge` knows this file: methods must find what it hides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeforge.compress.channels import find_channels
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import TensorType, Value
from edgeforge.ir.verify import verify
from edgeforge.sim.evaluate import run_float

UNITS = 32


@dataclass(frozen=True)
class _Mlp:
    """down(silu(gate(x)) * up(x)): the nodes."""

    gate: Node
    silu: Node
    up: Node
    product: Node
    down: Node


def stress(graph: Graph, feeds: Mapping[str, np.ndarray], seed: int, layers: int = 2) -> Graph:
    """``graph`` (a decoder whose windows all begin with one token) with outliers; its outputs are the same up to
    float32 rounding. feeds: token ids [N, T] on which hidden states are measured."""
    rng = np.random.default_rng(seed)
    graph = _with_outliers(graph, rng)
    mlps = _mlps(graph)
    chosen = sorted(rng.choice(len(mlps), min(layers, len(mlps)), replace=False))
    states: dict[str, np.ndarray] = {}
    read = {mlps[i].gate.inputs[0] for i in chosen}
    run_float(graph, feeds, lambda n, y: states.update({n.output: y.numpy()}) if n.output in read else None)
    for i in chosen:
        graph = _with_sink(graph, mlps[i], states[mlps[i].gate.inputs[0]], rng)
    return verify(graph)


def _mlps(graph: Graph) -> list[_Mlp]:
    made, found = graph.producers(), []
    for node in graph.nodes:
        product = made.get(node.inputs[0])
        if node.op != "linear" or product is None or product.op != "mul":
            continue
        a, b = (made.get(name) for name in product.inputs)
        if a is not None and b is not None and a.op == "silu" and b.op == "linear":
            found.append(_Mlp(made[a.inputs[0]], a, b, product, node))
    return found


def _with_sink(graph: Graph, mlp: _Mlp, states: np.ndarray, rng: np.random.Generator) -> Graph:
    first, others = states[0, 0].astype(np.float64), states[:, 1:].reshape(-1, states.shape[-1]).astype(np.float64)
    spread = others.T @ others / len(others) + 1e-3 * np.mean(others**2) * np.eye(len(first))
    seen = np.linalg.solve(spread, first)
    seen /= seen @ first  # 1 for the first token, as near to 0 as can be for all others

    def rows(low: float, high: float) -> np.ndarray:
        return np.repeat(rng.uniform(low, high, (UNITS // 2, 1)) * seen, 2, axis=0)

    values = dict(graph.values)
    _extend(values, mlp.gate.inputs[1], rows(20, 40), 0)
    _extend(values, mlp.up.inputs[1], rows(20, 100) * rng.choice([-1, 1]), 0)
    columns = rng.normal(0, 0.02, (values[mlp.down.inputs[1]].type.shape[0], UNITS // 2))
    _extend(values, mlp.down.inputs[1], np.stack([columns, -columns], 2).reshape(len(columns), UNITS), 1)
    for node in (mlp.gate, mlp.up):
        for bias in node.inputs[2:]:
            _extend(values, bias, np.zeros(UNITS), 0)
    for node in (mlp.gate, mlp.silu, mlp.up, mlp.product):
        *outer, width = values[node.output].type.shape
        values[node.output] = Value(node.output, TensorType((*outer, width + UNITS)))
    return graph.rebuild(values=values)


def _extend(values: dict[str, Value], name: str, more: np.ndarray, axis: int) -> None:
    data = values[name].data
    assert data is not None
    joined = np.concatenate([data, more.astype(np.float32)], axis)
    values[name] = Value(name, TensorType(joined.shape), joined)


def _with_outliers(graph: Graph, rng: np.random.Generator) -> Graph:
    channels = find_channels(graph)
    log_scale = np.zeros(channels.count)
    for group in channels.groups:
        size = group.last - group.first
        outliers = group.first + rng.choice(size, max(size // 48, 1), replace=False)
        log_scale[outliers] = np.log(rng.uniform(10, 60, len(outliers)))
    return channels.rescale(graph, log_scale)
