"""The hosted measurements and the workloads they belong to, as arrays for the fit."""

from __future__ import annotations

import csv
import functools
import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.workloads import MODELS
from edgeforge.estimate.fit import NAMES, Measured, Samples
from edgeforge.estimate.work import PRECISIONS
from edgeforge.target import load_target

DATA = Path(os.environ.get("EDGEFORGE_DATA", "../shared/data")) / "hub_measurements" / "measurements.csv.gz"

Key = tuple[tuple[str, str], str]


@dataclass(frozen=True)
class Hub:
    """``keys``: (model, component), precision of each sample."""

    keys: list[Key]
    samples: Samples
    rows: Measured
    missing: dict[tuple[str, str], int]

    @property
    def models(self) -> np.ndarray:
        return np.array(["/".join(key[0]) for key in self.keys])

    @property
    def families(self) -> np.ndarray:
        return np.array([MODELS[key[0]].family for key in self.keys])


def records(path: Path = DATA) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        yield from csv.DictReader(file)


@functools.cache
def chip_name(chipset: str) -> str:
    return load_target(chipset).name


def usable(row: dict[str, str], runtime: str = "qnn_dlc") -> bool:
    """On the NPU alone, not copied from another chip."""
    return (
        row["runtime"] == runtime
        and row["latency_ms"] != ""
        and row["primary_compute_unit"] == "NPU"
        and row["layers_cpu"] in ("", "0")
        and row["layers_gpu"] in ("", "0")
        and row["duplicate_of_reference_chip"] == "0"
    )


def load(path: Path = DATA, runtime: str = "qnn_dlc", fitted: bool = True) -> Hub:
    """Every usable row whose model has a workload that is ``fitted`` (or not); ``missing``: how many rows each model
    without a workload has."""
    keys: list[Key] = []
    found: dict[Key, int] = {}
    missing: dict[tuple[str, str], int] = {}
    sample, chip, log_us = [], [], []
    for row in records(path):
        if not usable(row, runtime) or row["precision"] not in NAMES:
            continue
        model = (row["model_id"], row["component"])
        if model not in MODELS:
            missing[model] = missing.get(model, 0) + 1
            continue
        if MODELS[model].fitted != fitted:
            continue
        key = (model, row["precision"])
        if key not in found:
            found[key] = len(keys)
            keys.append(key)
        sample.append(found[key])
        chip.append(chip_name(row["chipset"]))
        log_us.append(np.log(float(row["latency_ms"]) * 1e3))
    programs = {model: MODELS[model].build() for model, _ in keys}
    samples = Samples.of([(programs[model], PRECISIONS[precision]) for model, precision in keys])
    return Hub(keys, samples, Measured(np.array(sample), np.array(chip), np.array(log_us)), missing)
