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
    return nearest(layer, scale), kind


def clipping(layer: Layer) -> np.ndarray:
    """The best share of each channel, [G, P]."""
    moment, cross = layer.moments()
    wanted = layer.weight @ cross
    best, least = np.ones(layer.bias.shape), np.full(layer.bias.shape, np.inf)
    for share in SHARES:
        weight = nearest(layer, layer.scaled(share)[1])
        error = np.einsum("gpd,gpd->gp", weight @ moment - 2 * wanted, weight)
        best, least = np.where(error < least, share, best), np.minimum(error, least)
    return best


def nearest(layer: Layer, scale: np.ndarray) -> np.ndarray:
    """The weight rounded to the nearest codes."""
    return np.clip(np.rint(layer.weight / scale), -layer.top, layer.top) * scale
