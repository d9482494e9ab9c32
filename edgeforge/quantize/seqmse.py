"""seqmse: the clipping of each weight channel that errs least at the layer's output, codes rounded to nearest.

    min over c of E |W x - W'(c) x'|^2     W'(c): W rounded within c times its range, x': input in the rounded graph

Sequential MSE of Qualcomm's AIMET (github.com/quic/aimet, `apply_seq_mse`): layer by layer, behind layers that are
rounded already. The expectation is a form in the moments of x', so that every c is tried on all data."""

from __future__ import annotations

import numpy as np

from edgeforge.ir.types import TensorType
from edgeforge.quantize.layerwise import Layer

#: Shares c that are tried.
SHARES = np.linspace(0.3, 1.0, 36)


def choose(layer: Layer) -> tuple[np.ndarray, TensorType]:
    """See `layerwise.Choose`."""
    kind, scale = layer.scaled(clipping(layer))
    return nearest(layer.weight, scale, layer.top), kind


def clipping(layer: Layer) -> np.ndarray:
    """The best share of each channel, [G, P]."""
    best, least = np.ones(layer.bias.shape), np.full(layer.bias.shape, np.inf)
    for at, moment, cross in layer.moments():
        w = layer.weight[at].reshape(len(moment), -1, moment.shape[1])
        for share in SHARES:
            found = nearest(w, layer.scaled(share)[1][at].reshape(*w.shape[:2], -1), layer.top)
            error = np.einsum("kpd,kpd->kp", found @ moment - 2 * w @ cross, found).reshape(least[at].shape)
            best[at], least[at] = np.where(error < least[at], share, best[at]), np.minimum(error, least[at])
    return best


def nearest(weight: np.ndarray, scale: np.ndarray, top: int) -> np.ndarray:
    """The nearest multiples of ``scale`` up to ``top`` of it."""
    return np.clip(np.rint(weight / scale), -top, top) * scale
