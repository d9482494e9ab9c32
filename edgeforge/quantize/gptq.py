"""gptq: weights of linears rounded column by column, each column's error made up for by the columns still to come.

    q_j = round(w_j / s_j);   w_k -= (w_j - s_j q_j) / U_jj * U_jk   for k > j     U = cholesky((X^T X + d I)^-1)

U is upper triangular. Frantar et al., "GPTQ" (arXiv:2210.17323), columns in order of falling diag(X^T X), scales
chosen beforehand per channel or as LPBQ blocks with integer multipliers: the codes are those that the integer graph
stores. X is what the layer reads in the float graph on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import RANGE, TensorType
from edgeforge.passes.constants import with_constants
from edgeforge.quantize.assign import Plan
from edgeforge.quantize.weights import least_scale, quantize_weight
from edgeforge.sim.evaluate import run_float

#: Added to X^T X, as a share of its mean diagonal: the inverse must exist.
DAMPING = 0.01


def gptq(graph: Graph, plan: Plan, batches: Iterable[Mapping[str, np.ndarray]], scales: str) -> tuple[Graph, Plan]:
    """``graph`` with the weights that the codes of its linears stand for, and ``plan`` with their encodings.

    scales: "minmax" or "mse" (of channels; blocks have one rule), where ``plan`` does not give them. A weight that
    several linears share is left alone."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear":
            readers.setdefault(node.inputs[1], []).append(node)
    nodes = [found[0] for found in readers.values() if len(found) == 1]
    moments = _moments(graph, {node.inputs[0] for node in nodes}, batches)
    rounded: dict[tuple[str, int], np.ndarray] = {}
    kinds: dict[str, TensorType] = {}
    for node in nodes:
        data = graph.values[node.inputs[1]].data
        assert data is not None
        kinds[node.output] = kind = plan.constants.get(node.inputs[1]) or weight_type(graph, plan, node, data, scales)
        rounded[node.output, 1] = round_columns(data, kind, moments[node.inputs[0]])
    graph = with_constants(graph, rounded)
    made = graph.producers()
    constants = {made[output].inputs[1]: kind for output, kind in kinds.items()}
    return graph, replace(plan, constants={**plan.constants, **constants})


def _moments(graph: Graph, names: set[str], batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """X^T X of each value over all data, float64 [I, I]."""
    found: dict[str, np.ndarray] = {}

    def add(name: str, x: np.ndarray) -> None:
        if name in names:
            rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
            found[name] = found.get(name, 0) + rows.T @ rows

    for batch in batches:
        for name in graph.inputs:
            add(name, np.asarray(batch[name]))
        run_float(graph, batch, lambda node, y: add(node.output, y.numpy()))
    return found


def weight_type(graph: Graph, plan: Plan, node: Node, data: np.ndarray, scales: str) -> TensorType:
    """The encoding of a layer's weight; the accumulator holds its bias at that scale."""
    precision = plan.precision[node.output]
    least: np.ndarray | float = 0.0
    if len(node.inputs) == 3:
        bias, kind = graph.values[node.inputs[2]].data, plan.reads.get((node.output, 0), plan.types[node.inputs[0]])
        assert bias is not None and kind.q is not None
        least = least_scale(bias, float(kind.q.scale))
    return quantize_weight(node.inputs[1], data, precision.weights, precision.block, scales, least).type


def round_columns(weight: np.ndarray, kind: TensorType, moment: np.ndarray) -> np.ndarray:
    """float32 [O, I] on the grid of ``kind``. moment: X^T X, [I, I]."""
    assert kind.q is not None
    top = RANGE[kind.dtype][1]
    order = np.argsort(-np.diag(moment), kind="stable")
    damped = moment + np.eye(len(moment)) * max(DAMPING * np.diag(moment).mean(), 1e-12)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    scale = np.broadcast_to(kind.q.broadcast(weight.shape), weight.shape).astype(np.float64)[:, order]
    rest, codes = weight[:, order].astype(np.float64), np.zeros(weight.shape)
    for j in range(rest.shape[1]):
        codes[:, j] = np.clip(np.rint(rest[:, j] / scale[:, j]), -top, top)
        error = (rest[:, j] - codes[:, j] * scale[:, j]) / upper[j, j]
        rest[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    back = np.empty_like(codes)
    back[:, order] = codes
    return kind.q.dequantize(back.astype(np.int8))
