"""Time of a program from priced terms, and where it goes.

    T = sum over stretches of  overhead + (C**4 + D**4)**(1/4)

C: MAC, vector, move and io terms times their rates; D: DDR terms. Fetching overlaps with computing, but only within a
stretch (see `work.stretches`): weights cannot be fetched further ahead than the on-chip memory holds them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeforge.estimate.program import Layer, Program
from edgeforge.estimate.work import AHEAD, DDR, GROUPS, OVERHEAD, PRECISIONS, Precision, works

OVERLAP = 4.0
GROUP_OF = {term: group for group, terms in GROUPS.items() for term in terms}

Rates = Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """Estimated time of one layer. ``bound``: what most of it is spent on, a key of `work.GROUPS`, or "fused"."""

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


def times(program: Program, precision: Precision, rates: Mapping[str, Rates], vtcm_bytes: float) -> list[Part]:
    """Microseconds of every layer; they sum to the time of the program. The first layer also carries the fixed cost
    and the graph's inputs, the last its outputs."""
    found = works(program, precision, vtcm_bytes)
    ends = {"graph": 1.0, "input": sum(program.size(name) for name in program.inputs) / 1e3}
    costs = []
    for i, work in enumerate(found):
        own = rates[layer_precision(work.layer, precision).name]
        cost = {term: amount * own[term] for term, amount in work.amounts.items()}
        if i == 0:
            cost.update({term: amount * rates[precision.name][term] for term, amount in ends.items()})
        if i == len(found) - 1:
            size = sum(program.size(name) for name in program.outputs) / 1e3
            cost["output"] = size * rates[precision.name]["output"]
        costs.append(cost)
    parts: list[Part] = []
    start = traffic = 0.0
    for i, work in enumerate(found):
        traffic += work.amounts.get("weights", 0.0) + work.amounts.get("spill", 0.0)
        if traffic >= AHEAD or i == len(found) - 1:
            parts += _stretch(found[int(start) : i + 1], costs[int(start) : i + 1])
            start, traffic = i + 1, 0.0
    return parts


def _stretch(found: list, costs: list[dict[str, float]]) -> list[Part]:
    total: Counter[str] = Counter()
    for cost in costs:
        total.update(cost)
    ddr = sum(total[term] for term in DDR)
    compute = sum(us for term, us in total.items() if term not in DDR and term not in OVERHEAD)
    _, by_compute, by_ddr = overlapped(np.array(compute), np.array(ddr))
    parts = []
    for work, cost in zip(found, costs, strict=True):
        groups: Counter[str] = Counter()
        for term, us in cost.items():
            slope = 1.0 if term in OVERHEAD else float(by_ddr if term in DDR else by_compute)
            groups[GROUP_OF[term]] += us * slope
        us = sum(groups.values())
        bound = max(groups, key=lambda group: groups[group]) if us > 0 else "fused"
        parts.append(Part(work.layer, us, bound, work.weight_bytes, work.moved_bytes))
    return parts


def spread(us: float, factor: float) -> tuple[float, float]:
    """Low and high end of an interval x / factor to x * factor."""
    return us / factor, us * factor


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
