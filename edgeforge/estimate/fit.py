"""Fits the latency model to measurements, in log space, with robust (Cauchy) weights and Gaussian priors.

Two levels. The rates of all terms per precision are fitted to one time per (workload, precision), the measurements of
all chips brought to a common chip. A chip then needs few numbers: factors (see `latency.FACTORS`), which
are fitted to the chip's measurements relative to what the same workloads need elsewhere, so that what the rates
get wrong about a workload does not disturb them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeforge.estimate.latency import FACTORS, NAMES, TYPICAL_US, factor_keys, overlapped
from edgeforge.estimate.program import Program
from edgeforge.estimate.work import DDR, MOVE, OVERHEAD, TERMS, Precision, stretches, summed, works

Array = np.ndarray

#: Where rates start: microseconds per million MACs, thousand elements, layer, matrix and kB; a 2023 phone NPU at w8a16.
START = {
    "conv": 0.07, "point": 0.1, "stem": 0.6, "dilated": 0.14, "grouped": 0.1, "depthwise": 1.5, "transposed": 0.07,
    "volume": 0.15, "dense": 0.1, "attend": 0.12, "feed": 0.0015, "load": 0.004, "add": 0.005, "scale": 0.012,
    "curve": 0.012, "softmax": 0.025, "norm": 0.1, "pool": 0.005, "window": 0.1, "sum": 0.05, "resize": 0.008,
    "exotic": 0.03, "copy": 0.004, "permute": 0.01, "input": 0.1, "output": 0.03, "image": 0.2, "graph": 60.0,
    "mac_op": 1.0, "vector_op": 1.0, "move_op": 1.0, "sum_op": 20.0, "batch_op": 0.3, "weights": 0.018, "spill": 0.012,
}  # fmt: skip
#: Log of the ratio to these where another precision starts.
SHIFT = {
    "float": {
        "conv": 0.7, "point": 0.7, "dilated": 0.7, "grouped": 0.3, "stem": 0.3, "dense": 0.4, "attend": 0.2, "feed": 0.3
    },
    "w8a8": {
        "conv": -0.7, "point": -0.6, "dilated": -0.7, "grouped": -0.3, "stem": -0.3, "dense": -0.2, "curve": -0.5,
        "input": -0.5, "output": -0.5,
        **dict.fromkeys((*MOVE, "feed", "load", "add", "scale", "pool", "resize"), -0.6),
    },
    "w8a16": {},
}  # fmt: skip
#: Standard deviation of the priors (log): of all rates, of a precision's deviation; tighter where physics says more.
#: WIDE and `CAUCHY` are where the evidence of the fit is largest.
WIDE, DEVIATION = 0.7, 0.5
TIGHT = {"graph": 0.6, "mac_op": 0.6, "vector_op": 0.6, "move_op": 0.6, "weights": 0.6, "spill": 0.6, "input": 0.6,
         "dilated": 0.4, "batch_op": 2.0, "window": 3.0, "sum": 3.0}  # fmt: skip
#: Traffic and fixed costs hardly depend on the precision once its bytes are counted.
TIGHT_DEVIATION = {
    "graph": 0.2, "mac_op": 0.3, "vector_op": 0.3, "move_op": 0.3, "sum_op": 0.5, "weights": 0.2,
    "spill": 0.2, "input": 0.5, "dilated": 0.25, "window": 3.0,
    **dict.fromkeys((*MOVE, "add", "scale", "pool", "sum", "resize"), 0.4),
}  # fmt: skip
#: Errors far beyond the first (log) hardly count; a fit begins with the second and comes down step by step. Both levels
#: share them: for chips alone the evidence is larger at half of it, but models that are held out fare worse.
CAUCHY, BROAD = 0.07, 0.5
#: Weight of a measurement against the priors: 2 is the Cauchy density itself.
TRUST = 2.0
#: Standard deviation of the priors of a chip's log factors.
CHIP_SPREAD = {"all": 1.0, "group": 0.2, "compute": 0.25, "vector": 0.25, "term": 0.25, "tenfold": 0.1}

IS_DDR = np.array([term in DDR for term in TERMS])
IS_OVERHEAD = np.array([term in OVERHEAD for term in TERMS])
IS_COMPUTE = ~(IS_DDR | IS_OVERHEAD)


@dataclass(frozen=True)
class Samples:
    """Workloads at a precision: amounts of every stretch [stretches, terms] and the sample each belongs to (rising)."""

    amounts: Array
    sample: Array
    precision: Array

    @classmethod
    def of(cls, workloads: Sequence[tuple[Program, Precision]]) -> Samples:
        parts = [[summed(stretch) for stretch in stretches(works(*workload))] for workload in workloads]
        rows = [[part.get(term, 0.0) for term in TERMS] for stretch in parts for part in stretch]
        sample = np.repeat(np.arange(len(parts)), [len(stretch) for stretch in parts])
        return cls(np.array(rows), sample, np.array([NAMES.index(precision.name) for _, precision in workloads]))

    def pick(self, keep: Array) -> Samples:
        """The samples with these numbers, in this order (repeats allowed)."""
        order = np.argsort(self.sample, kind="stable")
        first = np.searchsorted(self.sample[order], np.arange(len(self.precision) + 1))
        rows = [order[first[i] : first[i + 1]] for i in keep]
        sample = np.repeat(np.arange(len(keep)), [len(r) for r in rows])
        return Samples(self.amounts[np.concatenate(rows)], sample, self.precision[keep])


def predict(samples: Samples, rates: Array) -> tuple[Array, Array]:
    """log microseconds [n] and d log T / d log rate [n, terms], for log rates [n, terms]."""
    parts = samples.amounts * np.exp(rates)[samples.sample]
    body, by_compute, by_ddr = overlapped(parts[:, IS_COMPUTE].sum(1), parts[:, IS_DDR].sum(1))
    parts[:, IS_COMPUTE] *= by_compute[:, None]
    parts[:, IS_DDR] *= by_ddr[:, None]
    first = np.searchsorted(samples.sample, np.arange(len(samples.precision)))
    total = np.add.reduceat(body + parts[:, IS_OVERHEAD].sum(1), first)
    return np.log(total), np.add.reduceat(parts, first) / total[:, None]


def start_rates() -> Array:
    """[precisions, terms]"""
    return np.log([[START[term] for term in TERMS]]) + [
        [SHIFT[name].get(term, 0.0) for term in TERMS] for name in NAMES
    ]


def base_rates(theta: Array) -> Array:
    """log rates [precisions, terms] of parameters [1 + precisions, terms]."""
    return start_rates() + theta[0] + theta[1:]


def _prior() -> Array:
    wide = [WIDE * TIGHT.get(term, 1.0) for term in TERMS]
    deviation = [DEVIATION * TIGHT_DEVIATION.get(term, 1.0) for term in TERMS]
    return np.concatenate([wide, *[deviation] * len(NAMES)])


def fit_base(samples: Samples, log_us: Array, steps: int = 40) -> Array:
    """Parameters of the rates of all precisions: Gauss-Newton, with weights that become robust step by step."""
    k, n = len(TERMS), len(log_us)
    theta, scale, certainty = np.zeros((1 + len(NAMES), k)), BROAD, np.diag(1 / _prior() ** 2)
    for _ in range(steps):
        predicted, share = predict(samples, base_rates(theta)[samples.precision])
        error = log_us - predicted
        jacobian = np.zeros((n, theta.size))
        jacobian[:, :k] = share
        for p in range(len(NAMES)):
            rows = samples.precision == p
            jacobian[rows, k * (p + 1) : k * (p + 2)] = share[rows]
        step = _step(jacobian, error, TRUST / CAUCHY**2 * _cauchy(error, scale), theta.ravel(), certainty)
        theta += np.clip(step, -0.5, 0.5).reshape(theta.shape)
        if scale == CAUCHY and np.abs(step).max() < 2e-3:
            break
        scale = max(CAUCHY, scale * 0.8)
    return theta


def _step(jacobian: Array, error: Array, weight: Array, theta: Array, certainty: Array) -> Array:
    """One Gauss-Newton step of a weighted least-squares fit with a Gaussian prior around zero, whose inverse
    covariance is ``certainty``."""
    hessian = (jacobian * weight[:, None]).T @ jacobian + certainty
    return np.linalg.solve(hessian, jacobian.T @ (weight * error) - certainty @ theta)


def _cauchy(error: Array, scale: float) -> Array:
    """Robust weights: errors far beyond ``scale`` hardly count."""
    return 1 / (1 + (error / scale) ** 2)


# -------------------------------------------------------------------------------------------------------------- chips

#: A chip's parameters, in order: (part, key) as in `Latency.factors`.
CHIP_KEYS = [(part, key) for part, keys in FACTORS.items() for key in keys]
TENFOLD = CHIP_KEYS.index(("tenfold", "tenfold"))
CHIP_PRIOR = np.array([CHIP_SPREAD[part] for part, _ in CHIP_KEYS])
#: 1 where a parameter applies: [precisions, parameters, terms]
APPLIES = np.array(
    [[[float(factor_keys(name, term).get(part) == key) for term in TERMS] for part, key in CHIP_KEYS] for name in NAMES]
)


def chip_rates(base: Array, chip: Array, precision: Array) -> Array:
    """log rates [n, terms] on a chip with log factors ``chip``, for precision numbers [n]."""
    return (base + chip @ APPLIES)[precision]


def predict_chip(samples: Samples, base: Array, chip: Array) -> tuple[Array, Array]:
    """log microseconds [n] on a chip and their derivatives by its log factors [n, factors]."""
    log_us, share = predict(samples, chip_rates(base, chip, samples.precision))
    tens, more = (log_us - np.log(TYPICAL_US)) / np.log(10), chip[TENFOLD]
    slopes = (1 + more / np.log(10)) * np.einsum("nt,nkt->nk", share, APPLIES[samples.precision])
    slopes[:, TENFOLD] = tens
    return log_us + more * tens, slopes


def fit_chip(
    samples: Samples, log_us: Array, base: Array, center: Array | None = None, certainty: Array | None = None
) -> Array:
    """Log factors of one chip from log_us [n], less what the base is known to get wrong about each sample. Errors far
    beyond `CAUCHY` hardly count, at first those far beyond `BROAD`: else a chip unlike the others would be fitted to
    the few workloads that it runs as they do. center, certainty: mean and inverse covariance of the prior (default:
    zero, `CHIP_PRIOR`)."""
    center = np.zeros(len(CHIP_KEYS)) if center is None else center
    certainty = np.diag(1 / CHIP_PRIOR**2) if certainty is None else certainty
    chip, scale = center.copy(), BROAD
    for _ in range(15):
        predicted, jacobian = predict_chip(samples, base, chip)
        error = log_us - predicted
        step = _step(jacobian, error, TRUST / CAUCHY**2 * _cauchy(error, scale), chip - center, certainty)
        chip += np.clip(step, -0.7, 0.7)
        if scale == CAUCHY and np.abs(step).max() < 1e-3:
            break
        scale = max(CAUCHY, 0.7 * scale)
    return chip


#: Share of `CHIP_PRIOR`'s variance that is left where the known chips do not differ.
OWN = 0.1


def fit_new_chip(samples: Samples, log_us: Array, base: Array, known: Array) -> Array:
    """Log factors of a chip with few measurements, log_us [n] as for `fit_chip`. It resembles one of the ``known``
    chips [chips, factors] and differs from it as they differ from each other: one fit around each of them, averaged
    by how well they explain the measurements."""
    apart = known - np.median(known, axis=0)
    certainty = np.linalg.inv(apart.T @ apart / len(known) + OWN * np.diag(CHIP_PRIOR**2))
    fits = np.array([fit_chip(samples, log_us, base, near, certainty) for near in known])
    misfit = np.zeros(len(known))
    for i, chip in enumerate(fits):
        error = log_us - predict_chip(samples, base, chip)[0]
        away = chip - known[i]
        misfit[i] = TRUST * np.log1p((error / CAUCHY) ** 2).sum() + away @ certainty @ away
    return np.average(fits, axis=0, weights=np.exp((misfit.min() - misfit) / 2))


@dataclass
class Fit:
    """theta: see `base_rates`; chips: name -> factors; residual [samples]: mean log error of the base, per sample."""

    theta: Array
    chips: dict[str, Array] = field(default_factory=dict)
    residual: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def base(self) -> Array:
        return base_rates(self.theta)

    @property
    def known(self) -> Array:
        """Log factors of all chips [chips, factors]."""
        return np.array(list(self.chips.values()))


@dataclass(frozen=True)
class Measured:
    """Rows: the sample number, the chip and log microseconds of each measurement."""

    sample: Array
    chip: Array
    log_us: Array

    def pick(self, mask: Array) -> Measured:
        return Measured(self.sample[mask], self.chip[mask], self.log_us[mask])


def fit_all(samples: Samples, rows: Measured) -> Fit:
    """Both levels in turn, from the priors. Samples without rows do not take part."""
    names = sorted(set(rows.chip))
    used = np.unique(rows.sample)
    picked = samples.pick(used)
    relative = _two_way(samples, rows, names)
    found: dict[str, Array] = {}
    for _ in range(3):
        theta = fit_base(picked, relative[used])
        base = base_rates(theta)
        residual = relative - predict(samples, base[samples.precision])[0]
        for name in names:
            mine = rows.pick(rows.chip == name)
            found[name] = fit_chip(samples.pick(mine.sample), mine.log_us - residual[mine.sample], base)
        relative = _relative(samples, rows, base, found)
    return Fit(theta, found, relative - predict(samples, base[samples.precision])[0])


def _two_way(samples: Samples, rows: Measured, names: Sequence[str]) -> Array:
    """log us per sample with each chip's median offset (per precision) taken out."""
    table = np.full((len(samples.precision), len(names)), np.nan)
    table[rows.sample, np.searchsorted(names, rows.chip)] = rows.log_us
    known = np.isfinite(table)
    offset = np.zeros((len(NAMES), len(names)))
    mean = np.full(len(table), np.nan)
    for _ in range(5):
        rest = table - offset[samples.precision]
        for i in np.flatnonzero(known.any(1)):
            mean[i] = np.median(rest[i, known[i]])
        for p in range(len(NAMES)):
            for c in range(len(names)):
                mine = known[:, c] & (samples.precision == p)
                offset[p, c] = np.median((table[:, c] - mean)[mine]) if mine.any() else 0.0
    return mean


def _relative(samples: Samples, rows: Measured, base: Array, chips: Mapping[str, Array]) -> Array:
    """log us per sample as if at the base rates: each measurement minus what the model says its chip adds."""
    at_base, _ = predict(samples, base[samples.precision])
    found: dict[int, list[float]] = {}
    for name in sorted(set(rows.chip)):
        mine = rows.pick(rows.chip == name)
        there, _ = predict_chip(samples.pick(mine.sample), base, chips[name])
        for i, value in zip(mine.sample, mine.log_us - there + at_base[mine.sample], strict=True):
            found.setdefault(int(i), []).append(float(value))
    out = np.full(len(samples.precision), np.nan)
    for i, values in found.items():
        out[i] = np.median(values)
    return out


# ------------------------------------------------------------------------------------------- decoders and memory

SUM_SPREAD, SUM_SCALE = {"base": 0.7, "chip": 0.35}, 0.1


def fit_sums(amounts: Array, log_us: Array, chips: Array, start: Array, steps: int = 30) -> dict[str, Array]:
    """Log rates [terms] per chip (and of a typical one, "") for sums of amounts [n, terms] times rates."""
    names = sorted(set(chips))
    k = len(start)
    theta = np.zeros((1 + len(names), k))
    prior = np.concatenate([np.full(k, SUM_SPREAD["base"]), np.full(k * len(names), SUM_SPREAD["chip"])])
    certainty = np.diag(1 / prior**2)
    which = np.searchsorted(names, chips)
    for _ in range(steps):
        parts = amounts * np.exp(start + theta[0] + theta[1 + which])
        total = parts.sum(1)
        share = parts / total[:, None]
        jacobian = np.zeros((len(log_us), theta.size))
        jacobian[:, :k] = share
        for c in range(len(names)):
            jacobian[which == c, k * (c + 1) : k * (c + 2)] = share[which == c]
        error = log_us - np.log(total)
        step = _step(jacobian, error, _cauchy(error, SUM_SCALE) / SUM_SCALE**2, theta.ravel(), certainty)
        theta += np.clip(step, -0.5, 0.5).reshape(theta.shape)
        if np.abs(step).max() < 1e-3:
            break
    return {"": start + theta[0], **{name: start + theta[0] + theta[1 + c] for c, name in enumerate(names)}}
