"""Range estimators: what interval of real numbers the codes of a tensor shall cover."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BINS = 2048


class Histogram:
    """Counts of a tensor's values over a range that is known from a first pass; BINS equal bins."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high if high > low else low + 1e-8
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        self.counts += np.histogram(values, BINS, (self.low, self.high))[0]

    @property
    def centers(self) -> np.ndarray:
        edges = np.linspace(self.low, self.high, BINS + 1)
        return (edges[1:] + edges[:-1]) / 2


def minmax(h: Histogram, bits: int, percentile: float) -> tuple[float, float]:
    """Everything that calibration saw."""
    return h.low, h.high


def percentile(h: Histogram, bits: int, percentile: float) -> tuple[float, float]:
    """Cuts ``(100 - percentile) / 2`` percent of the values off each side."""
    mass = np.cumsum(h.counts) / max(h.counts.sum(), 1)
    tail = (100 - percentile) / 200
    low, high = np.searchsorted(mass, tail, "right"), np.searchsorted(mass, 1 - tail)
    edges = np.linspace(h.low, h.high, BINS + 1)
    return float(edges[low]), float(edges[min(high + 1, BINS)])


def _shrunk(h: Histogram) -> list[tuple[float, float]]:
    """Candidate ranges: the seen one with each side cut back toward zero in 40 steps."""
    return [(h.low * cut, h.high * cut) for cut in np.linspace(1.0, 0.2, 41)]


def _rounded(h: Histogram, low: float, high: float, bits: int) -> np.ndarray:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-12) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(h.centers / scale) + zero, 0, 2**bits - 1) - zero) * scale


def mse(h: Histogram, bits: int, percentile: float) -> tuple[float, float]:
    """The candidate with the least squared rounding and clipping error."""
    return min(_shrunk(h), key=lambda r: float((h.counts * (_rounded(h, *r, bits) - h.centers) ** 2).sum()))


def entropy(h: Histogram, bits: int, percentile: float) -> tuple[float, float]:
    """The candidate with the least Kullback-Leibler divergence between the histogram and its quantized version
    (Migacz, "8-bit inference with TensorRT", GTC 2017); 16-bit tensors have as many codes as bins need, so they
    keep the seen range."""
    if bits > 10:
        return h.low, h.high
    p = h.counts / max(h.counts.sum(), 1)
    step = (h.high - h.low) / BINS

    def divergence(r: tuple[float, float]) -> float:
        inside = (h.centers >= r[0]) & (h.centers <= r[1])
        clipped = np.where(inside, p, 0.0)
        where = np.flatnonzero(inside)
        if where.size == 0:
            return np.inf
        clipped[where[0]] += p[: where[0]].sum()
        clipped[where[-1]] += p[where[-1] + 1 :].sum()
        level = np.floor((h.centers - r[0]) / max(r[1] - r[0], step) * (2**bits - 1)).astype(np.int64)
        level = np.clip(level, 0, 2**bits - 1)
        occupied = inside & (p > 0)
        mass = np.bincount(level[inside], p[inside], 2**bits)
        share = np.maximum(np.bincount(level[occupied], minlength=2**bits), 1)
        q = np.where(occupied, mass[level] / share[level], 0.0)
        both = (clipped > 0) & (q > 0)
        lost = clipped[(clipped > 0) & (q <= 0)].sum()
        return float((clipped[both] * np.log(clipped[both] / q[both])).sum() + lost)

    return min(_shrunk(h), key=divergence)


METHODS: dict[str, Callable[[Histogram, int, float], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
