"""From measurements to the ``latency`` block of a target's YAML."""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from edgeforge.errors import InvalidInput
from edgeforge.estimate.estimate import priced
from edgeforge.estimate.fit import CHIP_KEYS, Samples, fit_new_chip, predict, predict_chip
from edgeforge.estimate.latency import NAMES
from edgeforge.estimate.program import Program
from edgeforge.estimate.work import PRECISIONS, TERMS
from edgeforge.target import Target, load_target, names

COLUMNS = ("model", "precision", "latency_ms")
#: A fit with fewer models would only move noise.
FEWEST = 5
FASTEST_MS, SLOWEST_MS = 0.01, 60_000.0


@dataclass(frozen=True)
class Point:
    """One measurement of a workload."""

    model: str
    precision: str
    latency_ms: float


@dataclass(frozen=True)
class Calibration:
    """factors: for `Latency.factors`; before and after: median absolute error, as shares."""

    factors: dict[str, dict[str, float]]
    workloads: int
    before: float
    after: float
    worst: tuple[tuple[str, float], ...]


def read_points(path: Path) -> list[Point]:
    """Measurements from a CSV (or .csv.gz) with the columns model, precision, latency_ms.

    Raises InvalidInput listing every bad row (not a number, zero, implausible, contradictory) at once."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            rows = list(reader) if not missing else []
    except (OSError, UnicodeDecodeError, csv.Error, EOFError) as error:
        raise InvalidInput(f"measurements {path} cannot be read: {error}") from None
    if missing:
        raise InvalidInput(f"measurements {path}: no column {', '.join(missing)} -> {', '.join(COLUMNS)}")
    points, bad = [], []
    for line, row in enumerate(rows, 2):
        try:
            value = float(row["latency_ms"] or "")
        except ValueError:
            bad.append(f"line {line}: latency_ms {row['latency_ms']!r} is not a number")
            continue
        if not math.isfinite(value) or value <= 0:
            bad.append(f"line {line}: latency_ms {value:g} is not a positive number")
        elif not FASTEST_MS <= value <= SLOWEST_MS:
            bad.append(f"line {line}: latency_ms {value:g} is outside {FASTEST_MS} to {SLOWEST_MS:g}: another unit?")
        elif not (row["model"] or "").strip():
            bad.append(f"line {line}: no model")
        elif row["precision"] not in PRECISIONS:
            bad.append(f"line {line}: precision {row['precision']!r}, one of {', '.join(PRECISIONS)}")
        else:
            points.append(Point(row["model"], row["precision"], value))
    if bad:
        raise InvalidInput("\n  ".join([f"measurements {path}: {len(bad)} bad row(s)", *bad[:20]]))
    return _merge(points)


def _merge(points: Sequence[Point]) -> list[Point]:
    """One point per workload: the median of repetitions. Raises InvalidInput where they differ more than twofold."""
    found: dict[tuple[str, str], list[float]] = {}
    for point in points:
        found.setdefault((point.model, point.precision), []).append(point.latency_ms)
    wild = [f"{model} {precision}" for (model, precision), ms in found.items() if max(ms) > 2 * min(ms)]
    if wild:
        raise InvalidInput(f"measurements of the same workload differ more than twofold: {', '.join(wild[:10])}")
    return [Point(model, precision, float(np.median(ms))) for (model, precision), ms in found.items()]


def calibrate(target: Target, points: Sequence[Point], programs: Mapping[str, Program]) -> Calibration:
    """Fit the chip's factors to its own measurements. programs: by `Point.model`.

    Raises InvalidInput with fewer than FEWEST models, or when the times are off by a constant that looks like
    another unit."""
    models = len({point.model for point in points})
    if models < FEWEST:
        raise InvalidInput(f"{models} model(s) for {target.name}, a fit needs {FEWEST} -> measure more models")
    latency = priced(target)
    samples = Samples.of([(programs[point.model], PRECISIONS[point.precision]) for point in points])
    base = np.log([[latency.rates[name][term] for term in TERMS] for name in NAMES])
    log_us = np.log([point.latency_ms * 1e3 for point in points])
    before = np.abs(np.expm1(predict(samples, base[samples.precision])[0] - log_us))
    offset = float(np.median(log_us - predict(samples, base[samples.precision])[0]))
    if abs(offset) > math.log(30):
        raise InvalidInput(
            f"the measurements of {target.name} are {math.exp(offset):.3g} times what a typical chip needs"
            " -> latency_ms must be milliseconds of one inference on the NPU"
        )
    chip = fit_new_chip(samples, log_us, base, _known())
    error = predict_chip(samples, base, chip)[0] - log_us
    order = np.argsort(-np.abs(error))[:5]
    worst = tuple((f"{points[i].model} {points[i].precision}", float(np.exp(error[i]))) for i in order)
    after = float(np.median(np.abs(np.expm1(error))))
    return Calibration(factors_of(chip), len(points), float(np.median(before)), after, worst)


def _known() -> np.ndarray:
    """Log factors of the catalogue's chips [chips, factors]."""
    latencies = [latency for name in names() if (latency := load_target(name).latency) is not None]
    factors = [latency.factors for latency in latencies if latency.factors]
    return np.log([[of.get(part, {}).get(key, 1.0) for part, key in CHIP_KEYS] for of in factors])


def factors_of(chip: np.ndarray) -> dict[str, dict[str, float]]:
    """A fitted chip in the form of `Latency.factors`."""
    found: dict[str, dict[str, float]] = {}
    for (part, key), value in zip(CHIP_KEYS, np.exp(chip), strict=True):
        found.setdefault(part, {})[key] = float(f"{value:.4g}")
    return found


def write_latency(path: Path, block: Mapping[str, Any]) -> None:
    """Put ``block`` into the ``latency`` entry of a target's YAML; the other lines stay as they are."""
    text = path.read_text()
    old = (yaml.safe_load(text) or {}).get("latency", {})
    kept = re.sub(r"^latency:.*?(?=^\w|\Z)", "", text, flags=re.M | re.S)
    new = yaml.safe_dump({"latency": {**old, **block}}, sort_keys=False, width=110, default_flow_style=None)
    draft = path.with_suffix(".tmp")
    draft.write_text(kept.rstrip("\n") + "\n" + new)
    draft.replace(path)


def provenance(source: str, found: Calibration) -> dict[str, str | float]:
    """Where the factors come from, for the YAML."""
    return {
        "source": source,
        "date": date.today().isoformat(),
        "workloads": found.workloads,
        "median_error_before": round(found.before, 4),
        "median_error_after": round(found.after, 4),
    }
