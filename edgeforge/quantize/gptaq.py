"""gptaq: weights rounded as in `gptq`, toward the float output, from inputs that are rounded already.

    min over W' of E |W x - W' x'|^2 + d |W - W'|^2     x: input in the float graph, x': in the rounded graph
    W* = (W E[x x'^T] + d W) (E[x' x'^T] + d I)^-1      is best without a grid; the columns of W* are then rounded

Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (arXiv:2504.02692), with the
target in closed form and, of several ranges of each channel, the one with the least error after rounding."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.types import TensorType
from edgeforge.quantize.gptq import column_codes, factored
from edgeforge.quantize.layerwise import Layer

#: d, as a share of the mean variance of the input: few samples must not decide alone.
DAMPING = 1.0

#: Shares of a channel's range that are tried.
SHARES = np.linspace(0.5, 1.1, 13)


def choose(layer: Layer) -> tuple[np.ndarray, TensorType]:
    """See `layerwise.Choose`."""
    best, weight = np.zeros(layer.bias.shape), np.empty(layer.weight.shape)
    for at, moment, cross in layer.moments():
        level = np.maximum(DAMPING * np.einsum("kdd->kd", moment).mean(1), 1e-12)
        damping = level[:, None, None] * np.eye(moment.shape[1])
        moment, cross = moment + damping, cross + damping
        w = layer.weight[at].reshape(len(moment), -1, moment.shape[1])
        wanted = np.linalg.solve(moment, (w @ cross).swapaxes(1, 2)).swapaxes(1, 2)
        factor = factored(moment)
        kept, share, least = np.empty_like(wanted), np.zeros(w.shape[:2]), np.full(w.shape[:2], np.inf)
        for tried in SHARES:
            scale = layer.scaled(tried)[1][at].reshape(*w.shape[:2], -1)
            found = column_codes(wanted[None], scale[None], factor, layer.top)[0] * scale
            error = np.einsum("kpd,kpd->kp", (found - wanted) @ moment, found - wanted)
            better = error < least
            kept[better], share[better], least[better] = found[better], tried, error[better]
        weight[at], best[at] = kept.reshape(weight[at].shape), share.reshape(best[at].shape)
    return weight, layer.scaled(best)[0]
