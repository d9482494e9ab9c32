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
from edgeforge.estimate.program import Program
from edgeforge.estimate.work import PRECISIONS, Layout
from edgeforge.target import load_target

DATA = Path(os.environ.get("EDGEFORGE_DATA", "../shared/data")) / "hub_measurements" / "measurements.csv.gz"

Model = tuple[str, str]
Key = tuple[Model, str]
CONVOLUTIONS = ("conv2d", "conv3d", "conv_transpose")


@dataclass(frozen=True)
class Hub:
    """``keys``: (model, component), precision of each sample. ``missing``: measured models without a workload that
    counts as rebuilt, and how many of how many layers theirs has (0 of them: none was written)."""

    keys: list[Key]
    samples: Samples
    rows: Measured
    missing: dict[tuple[str, str], tuple[int, int]]

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


#: Share of the layers by which a workload may differ from what ran and still count as rebuilt. Exporters differ in how
#: they write attention, norms and reshapes: up to about 8 layers of the 40 of a transformer block. A part that is left
#: out or misread (boxes not decoded, a branch missing) is more. Fixed before its effect on the errors was known. The
#: published numbers of weights are no second rule: they count what a checkpoint holds, with parts that are not exported
#: and tied matrices once.
LAYERS_APART = 0.2


def converted_layers(program: Program) -> int:
    """Layers that the vendor's converter makes of a program: silu is a sigmoid and a product, the slices of one value
    are one split, a linear layer of more than two dimensions is reshaped after it, and transposes beside a convolution
    that move only its channels vanish (it stores channels last)."""
    made = {layer.output: layer.op for layer in program.layers}
    convolved = {name for layer in program.layers if layer.op in CONVOLUTIONS for name in layer.inputs}
    layout, split, count = Layout(program), set(), 0
    for layer in program.layers:
        moved = layout.follow(layer)
        source = layer.inputs[0] if layer.inputs else ""
        beside = layer.output in convolved or made.get(source) in CONVOLUTIONS
        if layer.op == "expand" or (layer.op == "transpose" and beside and not moved):
            continue
        if layer.op == "slice" and source in split:
            continue
        if layer.op == "slice":
            split.add(source)
        count += 1 + (layer.op == "silu" or (layer.op == "linear" and len(program.shapes[layer.output]) > 2))
    return count


def rebuilt(path: Path = DATA, runtime: str = "qnn_dlc") -> tuple[dict[Model, Program], dict[Model, tuple[int, int]]]:
    """Programs of the measured models whose workload has as many layers as ran (see `LAYERS_APART`), in float where
    float was measured, and (its layers, those that ran) of the others. Looks at layers, never at times."""
    ran: dict[Model, dict[str, list[int]]] = {}
    for row in records(path):
        if usable(row, runtime) and row["precision"] in NAMES:
            found = ran.setdefault((row["model_id"], row["component"]), {})
            found.setdefault(row["precision"], []).append(int(float(row["layers_total"])))
    programs: dict[Model, Program] = {}
    missing: dict[Model, tuple[int, int]] = {}
    for model, found in ran.items():
        layers = int(np.median(found.get("float") or next(iter(found.values()))))
        program = MODELS[model].build() if model in MODELS else None
        count = converted_layers(program) if program else 0
        if program and abs(count - layers) <= LAYERS_APART * layers:
            programs[model] = program
        else:
            missing[model] = count, layers
    return programs, missing


def load(path: Path = DATA, runtime: str = "qnn_dlc") -> Hub:
    """Every usable row of the models that are rebuilt."""
    keys: list[Key] = []
    found: dict[Key, int] = {}
    programs, missing = rebuilt(path, runtime)
    sample, chip, log_us = [], [], []
    for row in records(path):
        model = (row["model_id"], row["component"])
        if not usable(row, runtime) or row["precision"] not in NAMES or model not in programs:
            continue
        key = (model, row["precision"])
        if key not in found:
            found[key] = len(keys)
            keys.append(key)
        sample.append(found[key])
        chip.append(chip_name(row["chipset"]))
        log_us.append(np.log(float(row["latency_ms"]) * 1e3))
    samples = Samples.of([(programs[model], PRECISIONS[precision]) for model, precision in keys])
    return Hub(keys, samples, Measured(np.array(sample), np.array(chip), np.array(log_us)), missing)
