"""equalize: rows of a layer and the columns of the next that undo them get equal ranges, without data.

    w1 * s[:, None],  w2 / s     s = sqrt(peak(w2) / peak(w1))     so that both peaks are sqrt(peak(w1) peak(w2))

Cross-layer equalization of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv:1906.04721), section 4.1, on every group of `channels`; chains are swept until nothing moves. A norm's gain
stands for its row; queries and keys are equalized by the rows that make them."""

from __future__ import annotations

import numpy as np

from edgeforge.compress.channels import Channels, factors, find_channels
from edgeforge.data import Dataset
from edgeforge.ir.graph import Graph
from edgeforge.ir.op import BIAS, OPS
from edgeforge.recipe import Equalize, Recipe
from edgeforge.target import Target


def apply(graph: Graph, config: Equalize, recipe: Recipe, target: Target, data: Dataset) -> Graph:
    """``graph`` with equalized weights; ``data`` is not read."""
    channels = find_channels(graph)
    log_scale = np.zeros(channels.count)
    for _ in range(config.sweeps):
        step = _step(graph, channels, log_scale)
        log_scale += step
        if np.abs(step).max(initial=0.0) < 1e-3:
            break
    return channels.rescale(graph, log_scale)


def _step(graph: Graph, channels: Channels, log_scale: np.ndarray) -> np.ndarray:
    """Half the log ratio of the peaks that each scale divides and multiplies, as they are now."""
    peaks = np.zeros((2, channels.count + 1))
    nodes = {node.output: node for node in graph.nodes}
    for (output, i), parts in channels.constants.items():
        node = nodes[output]
        if OPS[node.op].port(i).role == BIAS:
            continue
        data = graph.values[node.inputs[i]].data
        assert data is not None
        now = np.abs(data).astype(np.float64)
        for part in parts:
            now = now * factors(part, log_scale)
        for part in parts:
            numbers = np.broadcast_to(part, now.shape)
            np.maximum.at(peaks, ((numbers < 0).astype(int), np.abs(numbers)), now)
    up, down = peaks[:, 1:]
    both = (up > 0) & (down > 0)
    return np.where(both, 0.5 * np.log(np.where(both, down, 1) / np.where(both, up, 1)), 0.0)
