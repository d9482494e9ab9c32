"""Fits the latency model's rates to measurements: hierarchical over precisions and chips, robust, in log space.

    T = overheads + (C**q + D**q)**(1/q),  C: sum of amount * rate over MAC, vector, move and io terms, D: over DDR

log rate = base[term] + precision[p, term] + chip[c, group] + chip_precision[c, p, group]; every part but the base has
a Gaussian prior around 0, so a chip with few points stays near the others. Loss: Cauchy on the log error, every
(model, precision) with equal weight."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgeforge.estimate.work import DDR, IO, MAC, MOVE, OVERHEAD, TERMS, VECTOR

Array = np.ndarray

GROUPS = {term: i for i, terms in enumerate((MAC, (*VECTOR, *MOVE, *IO), OVERHEAD, DDR)) for term in terms}
GROUP_NAMES = ("mac", "vector", "overhead", "ddr")
GROUP = np.array([GROUPS[term] for term in TERMS])
IS_DDR = np.array([term in DDR for term in TERMS])
IS_OVERHEAD = np.array([term in OVERHEAD for term in TERMS])
#: Where rates start: microseconds per million MACs, thousand elements, layer and kB on a 2023 flagship's NPU.
START = {
    "conv": 0.06, "point": 0.08, "stem": 0.2, "dilated": 0.3, "grouped": 0.1, "depthwise": 1.0, "transposed": 0.1,
    "volume": 0.3, "dense": 0.15, "attend": 0.2, "feed": 0.003, "add": 0.004, "mul": 0.004, "curve": 0.008,
    "softmax": 0.02, "norm": 0.015, "pool": 0.005, "resize": 0.01, "reduce": 0.01, "exotic": 0.02, "copy": 0.005,
    "permute": 0.01, "relayout": 0.005, "high_rank": 0.015, "input": 0.02, "output": 0.02, "graph": 60.0, "mac_op": 1.2,
    "vector_op": 1.2, "move_op": 1.2, "weights": 0.018, "spill": 0.014,
}  # fmt: skip
SPREAD = {"base": 1.0, "precision": 0.5, "chip": 0.6, "chip_precision": 0.12, "chip_term": 0.08}
OVERLAP = 6.0
CAUCHY = 0.1


@dataclass
class Rates:
    """Fitted log rates. ``base`` [terms]; ``precision`` name -> [terms]; ``chip`` name -> [groups]; ``chip_precision``
    (chip, precision) -> [groups]; ``chip_term`` chip -> [terms]."""

    base: Array
    precision: dict[str, Array] = field(default_factory=dict)
    chip: dict[str, Array] = field(default_factory=dict)
    chip_precision: dict[tuple[str, str], Array] = field(default_factory=dict)
    chip_term: dict[str, Array] = field(default_factory=dict)

    def log_rates(self, chip: str, precision: str) -> Array:
        zero, none = np.zeros(len(GROUP_NAMES)), np.zeros(len(TERMS))
        groups = self.chip.get(chip, zero) + self.chip_precision.get((chip, precision), zero)
        return self.base + self.precision.get(precision, none) + groups[GROUP] + self.chip_term.get(chip, none)


def predict(amounts: Array, rates: Array) -> tuple[Array, Array]:
    """Microseconds [rows] and shares d log T / d log rate [rows, terms] for amounts [rows, terms] and log rates."""
    parts = amounts * np.exp(rates)
    compute, ddr = parts[:, ~(IS_DDR | IS_OVERHEAD)].sum(1), parts[:, IS_DDR].sum(1)
    overhead = parts[:, IS_OVERHEAD].sum(1)
    big = np.maximum(np.maximum(compute, ddr), 1e-9)
    body = big * ((compute / big) ** OVERLAP + (ddr / big) ** OVERLAP) ** (1 / OVERLAP)
    total = overhead + body
    slope = np.ones_like(parts)
    slope[:, ~(IS_DDR | IS_OVERHEAD)] = ((compute / body) ** (OVERLAP - 1))[:, None]
    slope[:, IS_DDR] = ((ddr / body) ** (OVERLAP - 1))[:, None]
    return total, parts * slope / total[:, None]


@dataclass(frozen=True)
class Rows:
    """Measurements: amounts [n, terms], microseconds [n], and per row chip, precision and model."""

    amounts: Array
    time_us: Array
    chips: Array
    precisions: Array
    models: Array

    def pick(self, mask: Array) -> Rows:
        return Rows(self.amounts[mask], self.time_us[mask], self.chips[mask], self.precisions[mask], self.models[mask])

    def weights(self) -> Array:
        """One per row, so that every (model, precision) counts the same."""
        keys = np.char.add(np.char.add(self.models.astype(str), "|"), self.precisions.astype(str))
        _, index, count = np.unique(keys, return_inverse=True, return_counts=True)
        return 1.0 / np.sqrt(count[index]) if False else 3.0 / count[index]


class Design:
    """Which parameter belongs to which (row, term)."""

    def __init__(self, rows: Rows):
        self.chip_names = sorted(set(rows.chips))
        self.precision_names = sorted(set(rows.precisions))
        self.terms = len(TERMS)
        c, p, g = len(self.chip_names), len(self.precision_names), len(GROUP_NAMES)
        sizes = {"base": self.terms, "precision": p * self.terms, "chip": c * g, "chip_precision": c * p * g,
                 "chip_term": c * self.terms}  # fmt: skip
        self.offset, start = {}, 0
        for name, size in sizes.items():
            self.offset[name], start = start, start + size
        self.size = start
        self.spread = np.concatenate([np.full(size, SPREAD[name]) for name, size in sizes.items()])

    def index(self, rows: Rows) -> Array:
        """[rows, terms, 5] parameter numbers."""
        chip = np.searchsorted(self.chip_names, rows.chips)[:, None]
        precision = np.searchsorted(self.precision_names, rows.precisions)[:, None]
        term, g = np.arange(self.terms)[None, :], len(GROUP_NAMES)
        parts = (
            self.offset["base"] + term + 0 * chip,
            self.offset["precision"] + precision * self.terms + term,
            self.offset["chip"] + chip * g + GROUP[None, :],
            self.offset["chip_precision"] + (chip * len(self.precision_names) + precision) * g + GROUP[None, :],
            self.offset["chip_term"] + chip * self.terms + term,
        )
        return np.stack(np.broadcast_arrays(*parts), -1)

    def rates(self, theta: Array) -> Rates:
        t, g = self.terms, len(GROUP_NAMES)

        def block(name: str, i: int, size: int) -> Array:
            start = self.offset[name] + i * size
            return theta[start : start + size].copy()

        found = Rates(start_rates() + block("base", 0, t))
        for i, name in enumerate(self.precision_names):
            found.precision[name] = block("precision", i, t)
        for i, chip in enumerate(self.chip_names):
            found.chip[chip] = block("chip", i, g)
            found.chip_term[chip] = block("chip_term", i, t)
            for j, name in enumerate(self.precision_names):
                found.chip_precision[chip, name] = block("chip_precision", i * len(self.precision_names) + j, g)
        return found


def start_rates() -> Array:
    return np.log([START[term] for term in TERMS])


def fit(rows: Rows, design: Design | None = None, theta: Array | None = None, steps: int = 30) -> tuple[Design, Array]:
    """Gauss-Newton with Cauchy weights from ``theta`` (or the start rates). Returns the design and its parameters."""
    design = design or Design(rows)
    index, weight = design.index(rows), rows.weights()
    theta = np.zeros(design.size) if theta is None else theta.copy()
    row = np.repeat(np.arange(len(rows.time_us)), design.terms * index.shape[-1])
    flat = index.reshape(len(rows.time_us), -1)
    start, measured = start_rates(), np.log(rows.time_us)
    scale = 0.5 if not theta.any() else CAUCHY
    for _ in range(steps):
        total, share = predict(rows.amounts, start + theta[index].sum(-1))
        error = measured - np.log(total)
        jacobian = np.zeros((len(measured), design.size))
        np.add.at(jacobian, (row, flat.ravel()), np.repeat(share, index.shape[-1], axis=1).ravel())
        robust = weight / (1 + (error / scale) ** 2) / CAUCHY**2
        hessian = (jacobian * robust[:, None]).T @ jacobian
        hessian[np.diag_indices(design.size)] += 1 / design.spread**2
        gradient = jacobian.T @ (robust * error) - theta / design.spread**2
        step = np.linalg.solve(hessian, gradient)
        theta += np.clip(step, -0.5, 0.5)
        if np.abs(step).max() < 1e-3 and scale == CAUCHY:
            break
        scale = max(CAUCHY, scale * 0.8)
    return design, theta
