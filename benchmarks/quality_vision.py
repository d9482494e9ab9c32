"""What quantization costs MobileNetV2 and a sentence encoder: docs/quality_vision.json and docs/quality_vision.md.

    EDGEFORGE_DATA=... python -m benchmarks.quality_vision --model mobilenetv2 [--precision w4a8] [--method gptaq]

Rows as in `benchmarks.quality`: the whole integer graph in the simulator against the float model. `mobilenetv2`: images
right of the 1,000 that no method sees (800 development photographs, 200 others), with those that turned wrong (lost)
and right (gained); a draw takes 100 of the 200 calibration photographs, or seeds the rotation where all 200 are taken.
`minilm`: Spearman correlation (percent) with the scores of STS-B's development pairs; a draw takes 256 sentences of
WikiText-2."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge.data import Dataset, from_arrays
from edgeforge.ir.graph import Graph
from edgeforge.models import Model
from edgeforge.pipeline import load, quantize, read_recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.target import load_target

DOCS = Path(__file__).parents[1] / "docs"
TARGET = "snapdragon-8-gen-3"
PRECISIONS = {"mobilenetv2": ("w8a8", "w8a16", "w4a8"), "minilm": ("w8a8",)}
SAMPLES = {"mobilenetv2": 100, "minilm": 256}
BATCH = 32

ROTATE, ROTATIONS = "compress=[{method: rotate}]", "compress=[{method: rotate, seed: DRAW}]"
DEPTHWISE = "overrides=[{match: '*.dw*', precision: w8a8}, {match: 'stem*', precision: w8a8}]"

#: Method -> recipe lines. All weights have the precision's bits, but where the name says otherwise.
METHODS = {
    "rtn": ["weights=minmax", "bias_correction=0"],
    "rtn + bias correction": ["weights=minmax", "bias_correction=32"],
    "mse + bias correction": ["weights=mse", "bias_correction=32"],
    "gptq + bias correction": ["weights=gptq", "bias_correction=32"],
    "seqmse": ["weights=seqmse"],
    "adaround": ["weights=adaround"],
    "gptaq": ["weights=gptaq"],
    "gptaq, 200 photographs": ["weights=gptaq", "calibration.samples=200"],
    "gptaq, 8 views of 200 photographs": ["weights=gptaq", "calibration.samples=200", "calibration.views=8"],
    "gptaq, depthwise and stem at 8 bits": ["weights=gptaq", DEPTHWISE],
    "rotate + gptaq": [ROTATE, "weights=gptaq"],
    "rotate + gptaq, 200 photographs": [ROTATIONS, "weights=gptaq", "calibration.samples=200"],
    "rotate + gptaq, depthwise and stem at 8 bits": [ROTATE, "weights=gptaq", DEPTHWISE],
    "rotate + gptaq, depthwise and stem at 8 bits, 200 photographs": [
        ROTATE,
        "weights=gptaq",
        DEPTHWISE,
        "calibration.samples=200",
    ],
}
#: Precision, method, and images that may be lost (less those gained) on the mean of the draws.
BARS = (
    ("w8a8", "rtn + bias correction", 5),
    ("w8a16", "rtn + bias correction", 2),
    ("w4a8", "rotate + gptaq", 30),
    ("w4a8", "rotate + gptaq, 200 photographs", 30),
)

#: What makes a row the same row.
KEY = ("model", "method", "precision", "task", "protocol", "stress", "draw")


class Images:
    """MobileNetV2's task: a score is whether an image is right."""

    task = "images right of 1000 (ImageNet sample 800, NIPS 17 200)"

    def __init__(self, model: Model):
        self.model, self.data = model, model.data("heldout")

    def calibration(self, draw: int, count: int) -> Dataset:
        whole = self.model.data("calibration")
        picked = np.random.default_rng(draw).choice(len(whole), min(count, len(whole)), replace=False)
        return Dataset(whole.name, len(picked), lambda i: whole.sample(int(picked[i])))

    def scores(self, run: Any) -> np.ndarray:
        outputs = [run(batch) for batch in self.data.batches(BATCH)]
        return np.concatenate(outputs)[:, 1:].argmax(1) == self.data.labels

    def value(self, scores: np.ndarray) -> float:
        return float(scores.sum())

    def more(self, exact: np.ndarray, found: np.ndarray) -> dict[str, Any]:
        return {"lost": int((exact & ~found).sum()), "gained": int((found & ~exact).sum())}


class Sentences:
    """The sentence encoder's task: a score is a cosine."""

    task = "Spearman correlation (percent) on STS-B dev"

    def __init__(self, model: Model):
        self.model = model
        file = Path(os.environ["EDGEFORGE_DATA"]) / "eval_stsb" / "stsb-en-dev.csv"
        with file.open(newline="") as stream:
            rows = list(csv.reader(stream))
        self.wanted = [float(row[2]) for row in rows]
        feeds = model.code.encode([row[0] for row in rows] + [row[1] for row in rows])
        self.data = from_arrays("STS-B dev", feeds, model.imported.graph)

    def calibration(self, draw: int, count: int) -> Dataset:
        return from_arrays("WikiText-2", self.model.code.calibration(draw, count), self.model.imported.graph)

    def scores(self, run: Any) -> np.ndarray:
        y = np.concatenate([run(batch) for batch in self.data.batches(BATCH)])
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        a, b = np.split(y, 2)
        return (a * b).sum(1)

    def value(self, scores: np.ndarray) -> float:
        from scipy.stats import spearmanr

        return 100 * float(spearmanr(scores, self.wanted).statistic)

    def more(self, exact: np.ndarray, found: np.ndarray) -> dict[str, Any]:
        return {}


TASKS = {"mobilenetv2": Images, "minilm": Sentences}


def reference(name: str) -> np.ndarray:
    """The float model's scores."""
    model = load(name)
    graph = model.imported.graph
    return TASKS[name](model).scores(lambda feeds: run_float(graph, feeds)[graph.outputs[0]])


def measure(name: str, method: str, precision: str, draw: int, exact: np.ndarray) -> dict[str, Any]:
    """One row."""
    model = load(name)
    task = TASKS[name](model)
    lines = [line.replace("DRAW", str(draw)) for line in METHODS[method]]
    recipe = read_recipe(model, model.recipe, precision, [f"calibration.samples={SAMPLES[name]}", *lines])
    data = task.calibration(draw, recipe.calibration.samples)
    start = time.perf_counter()
    integer = quantize(model, recipe, load_target(TARGET), data)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    found = task.scores(lambda feeds: _simulated(integer, feeds))
    a, b = task.value(exact), task.value(found)
    return {
        "model": name,
        "method": method,
        "precision": precision,
        "task": task.task,
        "protocol": "integer",
        "stress": None,
        "draw": draw,
        "float": round(a, 2),
        "value": round(b, 2),
        "delta_percent": round(100 * (b / a - 1), 2),
        **task.more(exact, found),
        "seconds": round(seconds, 1),
        "peak_mib": peak,
    }


def _simulated(integer: Graph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return dequantize_outputs(integer, simulate(integer, quantize_feeds(integer, feeds)))[integer.outputs[0]]


def record(row: dict[str, Any]) -> None:
    """Put a row into docs/quality_vision.json in place of its like, and write docs/quality_vision.md anew."""
    file = DOCS / "quality_vision.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in KEY)] + [row]
    order = list(METHODS)
    rows.sort(
        key=lambda r: (r["model"], r["precision"], order.index(r["method"]) if r["method"] in order else 99, r["draw"])
    )
    file.write_text(json.dumps(rows, indent=1) + "\n")
    (DOCS / "quality_vision.md").write_text(page(rows))


def page(rows: list[dict[str, Any]]) -> str:
    columns = [*KEY, "float", "value", "delta_percent", "lost", "gained", "seconds", "peak_mib"]
    lines = [
        "# Quality: MobileNetV2 and a sentence encoder",
        "",
        "Made by `python -m benchmarks.quality_vision`; see there for data and protocol. `draw`: seed of the",
        "calibration data. `seconds` to quantize on a shared host (one thread, but two for adaround): an upper bound.",
        "The float weights of MobileNetV2's classifier are dequantized int8 ones: at 8 bits that one layer is lossless",
        "by construction. Widths and ranges are those of `models/<model>/recipe.yaml`: all 8 bits for MobileNetV2, 16",
        "bits for the residual stream and attention of the encoder.",
        "All weights have the precision's bits unless the method says otherwise. What is lost less what is gained has",
        "a standard error of about the root of their sum: 9 images at w4a8.",
        "`models/mobilenetv2/recipe-w4a8.yaml` is rotate + gptaq, 200 photographs, draw 0.",
        "",
        *bars(rows),
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    return "\n".join([*lines, *(f"| {' | '.join(str(row.get(c, '')) for c in columns)} |" for row in rows)]) + "\n"


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """A table: images lost less gained, by draw."""
    lines = ["| mobilenetv2 | method | bar | images lost, by draw | mean | met |", "|---|---|---|---|---|---|"]
    for precision, method, most in BARS:
        row_of = ("mobilenetv2", precision, method)
        same = [row for row in rows if (row["model"], row["precision"], row["method"]) == row_of]
        lost = [row["lost"] - row["gained"] for row in same]
        mean = f"{np.mean(lost):.1f} ± {np.std(lost, ddof=1) / len(lost) ** 0.5:.1f}" if len(lost) > 1 else "-"
        met = "yes" if len(lost) > 2 and np.mean(lost) <= most else "**no**"
        lines.append(f"| {precision} | {method} | {most} | {', '.join(map(str, lost))} | {mean} | {met} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TASKS), required=True)
    parser.add_argument("--precision", action="append")
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--draw", action="append", type=int, help="seed of the calibration data; 0 without it")
    asked = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each: peak memory
        exact = pool.apply(reference, (asked.model,))
        for precision in asked.precision or PRECISIONS[asked.model]:
            for method in asked.method or METHODS:
                for draw in asked.draw or [0]:
                    row = pool.apply(measure, (asked.model, method, precision, draw, exact))
                    record(row)
                    flips = "".join(f", {row[key]} {key}" for key in ("lost", "gained") if key in row)
                    print(precision, method, draw, f"{row['float']} -> {row['value']}{flips}", flush=True)


if __name__ == "__main__":
    main()
