"""gptq: weights of layers rounded column by column, each column's error made up for by the columns still to come.

    q_j = round(w_j / s_j);   w_k -= (w_j - s_j q_j) / U_jj * U_jk   for k > j     U = cholesky((X^T X + d I)^-1)

U is upper triangular. Frantar et al., "GPTQ" (arXiv:2210.17323), columns in order of falling diag(X^T X), scales
chosen beforehand per channel or as LPBQ blocks with integer multipliers: the codes are those that the integer graph
stores. X is what the layer reads in the float graph on calibration data; of a convolution its windows, by group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import RANGE, TensorType
from edgeforge.passes.constants import with_constants
from edgeforge.quantize.assign import Plan
from edgeforge.quantize.layerwise import first_encoding, own_weight, patches
from edgeforge.sim.evaluate import run_float

#: Added to X^T X, as a share of its mean diagonal: the inverse must exist.
DAMPING = 0.01

#: Columns whose errors are carried to those behind them in one product.
STRIDE = 64

#: Windows of one image that count.
WINDOWS = 256

#: Output channels that are rounded at once.
ROWS = 4096

#: Moments that are in memory at once.
MOST_BYTES = 2 << 30


def gptq(graph: Graph, plan: Plan, batches: Iterable[Mapping[str, np.ndarray]], scales: str) -> tuple[Graph, Plan]:
    """``graph`` with the weights that the codes of its layers stand for, and ``plan`` with their encodings.

    scales: "minmax" or "mse" (of channels; blocks have one rule), where ``plan`` gives none. A weight that several
    layers share is left alone."""
    codes: dict[str, np.ndarray] = {}
    kinds: dict[str, TensorType] = {}
    for nodes in _together(graph):
        moments = _moments(graph, nodes, batches)
        factors = {place: factored(_damped(moments.pop(place))) for place in list(moments)}
        for node in nodes:
            data = graph.values[node.inputs[1]].data
            assert data is not None
            known = plan.constants.get(node.inputs[1])
            kinds[node.output] = kind = known or first_encoding(graph, plan, node, scales)[0]
            codes[node.output] = round_columns(data, kind, factors[_place(node)])
    rounded: dict[tuple[str, int], np.ndarray] = {}
    for output, kind in kinds.items():
        assert kind.q is not None
        rounded[output, 1] = kind.q.dequantize(codes.pop(output))
    graph = with_constants(graph, rounded)
    made = graph.producers()
    constants = {made[output].inputs[1]: kind for output, kind in kinds.items()}
    return graph, replace(plan, constants={**plan.constants, **constants})


def _place(node: Node) -> str:
    """Where X is seen: linears that read one value share it."""
    return node.inputs[0] if node.op == "linear" else node.output


def _together(graph: Graph) -> list[list[Node]]:
    """The layers in order, in groups whose moments fit MOST_BYTES: each group takes a pass over the data."""
    groups: list[list[Node]] = []
    places: dict[str, int] = {}
    for node in graph.nodes:
        if own_weight(graph, node):
            size = 8 * node.attrs.get("groups", 1) * math.prod(graph.type(node.inputs[1]).shape[1:]) ** 2
            if not groups or (_place(node) not in places and sum(places.values()) + size > MOST_BYTES):
                groups.append([])
                places = {}
            groups[-1].append(node)
            places[_place(node)] = size
    return groups


def _moments(graph: Graph, nodes: list[Node], batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """X^T X at each place over all data, float64 [G, D, D]."""
    found: dict[str, np.ndarray] = {}
    places = {_place(node): node for node in nodes}
    readers: dict[str, list[Node]] = {}
    for node in places.values():
        readers.setdefault(node.inputs[0], []).append(node)

    def see(name: str, x: np.ndarray) -> None:
        for node in readers.get(name, ()):
            rows = patches(graph.view(node), x, WINDOWS if node.op != "linear" else None).astype(np.float64)
            found[_place(node)] = found.get(_place(node), 0) + rows.swapaxes(1, 2) @ rows

    for batch in batches:
        for name in graph.inputs:
            see(name, np.asarray(batch[name]))
        run_float(graph, batch, lambda node, y: see(node.output, y.numpy()))
    return found


def _damped(moment: np.ndarray) -> np.ndarray:
    """``moment`` with DAMPING on its diagonals; in place."""
    diagonal = np.einsum("gdd->gd", moment)
    diagonal += np.maximum(DAMPING * diagonal.mean(1, keepdims=True), 1e-12)
    return moment


class Factor(NamedTuple):
    """Of moments, for each of G groups: ``order`` of columns [G, D], and U of the ordered inverse, [G, D, D]."""

    order: np.ndarray
    upper: np.ndarray


def factored(moment: np.ndarray) -> Factor:
    """moment: X^T X, positive definite, float64 [G, D, D]. Its inverse is not needed: with rows and columns in
    reversed order, moment = L L^T, and U is L^-1 in reversed order."""
    order = np.argsort(-np.einsum("gdd->gd", moment), 1, kind="stable")
    upper = np.empty_like(moment)
    for square, places, made in zip(moment, order[:, ::-1], upper, strict=True):
        lower = torch.linalg.cholesky(torch.from_numpy(square[np.ix_(places, places)]))
        one = torch.eye(len(places), dtype=lower.dtype)
        made[:] = torch.linalg.solve_triangular(lower, one, upper=False).numpy()[::-1, ::-1]
    return Factor(order, upper)


def round_columns(weight: np.ndarray, kind: TensorType, factor: Factor) -> np.ndarray:
    """Codes of ``kind``, int8 [O, ...]. factor: of X^T X for each group of output channels."""
    assert kind.q is not None
    w = weight.reshape(len(factor.order), -1, factor.order.shape[1])
    scale = np.broadcast_to(kind.q.broadcast(weight.shape), weight.shape).reshape(w.shape)
    return column_codes(w[None], scale[None], factor, RANGE[kind.dtype][1]).reshape(weight.shape)


def column_codes(weight: np.ndarray, scale: np.ndarray, factor: Factor, top: int) -> np.ndarray:
    """Codes in -top..top, int8 [K, G, P, D], of K weights (or scales) at once; ``weight`` and ``scale`` broadcast to
    that."""
    shape = np.broadcast_shapes(weight.shape, scale.shape)
    weights, scales = (np.broadcast_to(x, shape) for x in (weight, scale))
    found = np.empty(shape, np.int8)
    for first in range(0, shape[2], ROWS):
        rows = slice(first, first + ROWS)
        codes = _codes(*(_columns(x[:, :, rows], factor.order) for x in (weights, scales)), factor.upper, top)
        for g, places in enumerate(factor.order):
            found[:, g, rows, places] = codes[:, g].swapaxes(0, 1)
    return found


def _columns(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """float64 [K, G, D, P] of [K, G, P, D]: columns in order, and each of them contiguous."""
    return np.stack([x[:, g, :, places].swapaxes(0, 1) for g, places in enumerate(order)], 1).astype(np.float64)


def _codes(rest: np.ndarray, steps: np.ndarray, upper: np.ndarray, top: int) -> np.ndarray:
    """Of weights and scales [K, G, D, P]; ``rest`` is used up."""
    codes, errors = np.empty(rest.shape), np.empty(rest.shape)
    for first in range(0, rest.shape[2], STRIDE):
        last = min(first + STRIDE, rest.shape[2])
        for j in range(first, last):
            codes[:, :, j] = np.clip(np.rint(rest[:, :, j] / steps[:, :, j]), -top, top)
            errors[:, :, j] = (rest[:, :, j] - codes[:, :, j] * steps[:, :, j]) / upper[:, j, j, None]
            rest[:, :, j + 1 : last] -= upper[:, j, j + 1 : last, None] * errors[:, :, j, None]
        rest[:, :, last:] -= upper[:, first:last, last:].swapaxes(1, 2) @ errors[:, :, first:last]
    return codes
