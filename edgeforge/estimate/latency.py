"""Time of a program from priced terms, and where it goes.

    T = sum over stretches of  overhead + (C**2 + D**2)**(1/2)

C: MAC, vector, move and io terms times their rates; D: DDR terms. Fetching overlaps with computing, but only within a
stretch (see `work.stretches`): weights cannot be fetched further ahead than the on-chip memory holds them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgeforge.estimate.program import Layer, Program
from edgeforge.estimate.work import DDR, GROUPS, OVERHEAD, PRECISIONS, TERMS, Precision, Work, stretches, works

OVERLAP = 2.0
GROUP_OF = {term: group for group, terms in GROUPS.items() for term in terms}

Rates = Mapping[str, float]
#: Precisions with rates of their own.
NAMES = ("float", "w8a8", "w8a16")
#: A chip's factors: part -> keys. "compute" and "vector": of the terms of that group at a precision, because the units
#: that compute at 8 and 16 bits and in float differ in number from chip to chip; "term": of one term; "tenfold": what
#: ten times the time is multiplied by once more, presumably as a clock falls under load, or needs time to rise.
FACTORS = {
    "all": ("all",), "group": tuple(GROUPS), "compute": NAMES, "vector": NAMES, "term": TERMS, "tenfold": ("tenfold",)
}  # fmt: skip
#: Microseconds that "tenfold" leaves as they are.
TYPICAL_US = 3000.0


def factor_keys(precision: str, term: str) -> dict[str, str]:
    """The factors that apply to the rate of a term: part -> key."""
    group = GROUP_OF[term]
    own = {group: precision} if group in ("compute", "vector") else {}
    return {"all": "all", "group": group, "term": term, **own}


def chip_rates(rates: Mapping[str, Rates], factors: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """precision -> term -> microseconds per unit on a chip with ``factors``."""

    def factor(precision: str, term: str) -> float:
        keys = factor_keys(precision, term)
        return math.prod(factors.get(part, {}).get(key, 1.0) for part, key in keys.items())

    return {name: {term: rate * factor(name, term) for term, rate in of.items()} for name, of in rates.items()}


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


def times(program: Program, precision: Precision, rates: Mapping[str, Rates], tenfold: float = 1.0) -> list[Part]:
    """Microseconds of every layer; they sum to the time of the program. A layer's share of what overlaps is its
    derivative's. tenfold: see `FACTORS`."""
    parts: list[Part] = []
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
    total = sum(part.us for part in parts)
    longer = (total / TYPICAL_US) ** math.log10(tenfold) if total else 1.0
    return [replace(part, us=longer * part.us) for part in parts]


def _cost(work: Work, rates: Rates) -> dict[str, float]:
    return {term: amount * rates[term] for term, amount in work.amounts.items()}
