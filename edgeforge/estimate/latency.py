"""Time of a program from priced terms, and where it goes.

    T = sum over stretches of  overhead + (C**4 + D**4)**(1/4)

C: MAC, vector, move and io terms times their rates; D: DDR terms. Fetching overlaps with computing, but only within a
stretch (see `work.stretches`): weights cannot be fetched further ahead than the on-chip memory holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeforge.estimate.program import Layer, Program
from edgeforge.estimate.work import DDR, GROUPS, OVERHEAD, PRECISIONS, Precision, Work, stretches, works

OVERLAP = 4.0
GROUP_OF = {term: group for group, terms in GROUPS.items() for term in terms}

Rates = Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """Estimated time of one layer. ``bound``: what most of it is spent on, a key of `work.GROUPS`, or "fused" (into
    the layer before, or a view)."""

    layer: Layer
    us: float
    bound: str
    weight_bytes: float
    moved_bytes: float


def overlapped(compute: np.ndarray, ddr: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The time of two overlapping streams, and its derivatives by each; the derivatives times the streams sum to it."""
    big = np.maximum(np.maximum(compute, ddr), 1e-9)
    total = big * ((compute / big) ** OVERLAP + (ddr / big) ** OVERLAP) ** (1 / OVERLAP)
    return total, (compute / total) ** (OVERLAP - 1), (ddr / total) ** (OVERLAP - 1)


def layer_precision(layer: Layer, default: Precision) -> Precision:
    """Of a layer in an integer graph its own; else the one asked for."""
    if layer.bits is None:
        return default
    return PRECISIONS["w8a16" if layer.bits == 16 else "w8a8"]


def times(program: Program, precision: Precision, rates: Mapping[str, Rates]) -> list[Part]:
    """Microseconds of every layer; they sum to the time of the program. A layer's share of what overlaps is its
    derivative's."""
    parts = []
    for stretch in stretches(works(program, precision)):
        costs = [_cost(work, rates[layer_precision(work.layer, precision).name]) for work in stretch]
        ddr = sum(us for cost in costs for term, us in cost.items() if term in DDR)
        compute = sum(us for cost in costs for term, us in cost.items() if term not in (*DDR, *OVERHEAD))
        _, by_compute, by_ddr = overlapped(np.array(compute), np.array(ddr))
        for work, cost in zip(stretch, costs, strict=True):
            groups: Counter[str] = Counter()
            for term, us in cost.items():
                slope = 1.0 if term in OVERHEAD else float(by_ddr if term in DDR else by_compute)
                groups[GROUP_OF[term]] += us * slope
            us = sum(groups.values())
            bound = max(groups, key=lambda group: groups[group]) if us > 0 else "fused"
            parts.append(Part(work.layer, us, bound, work.weight_bytes, work.moved_bytes))
    return parts


def _cost(work: Work, rates: Rates) -> dict[str, float]:
    return {term: amount * rates[term] for term, amount in work.amounts.items()}


def spread(us: float, factor: float) -> tuple[float, float]:
    """Low and high end of an interval x / factor to x * factor."""
    return us / factor, us * factor
