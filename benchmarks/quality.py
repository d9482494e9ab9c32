"""What quantization costs a language model, method by method: docs/quality.json and docs/quality.md.

    EDGEFORGE_DATA=... python -m benchmarks.quality [--precision w4a8] [--method mobilequant] [--stress 0] [--draws 3]

Every row is the whole integer graph in the simulator (no node stays in float) against the float model, on windows of
TinyStories 600-799 that no method sees; calibration windows are drawn from stories 0-549. Rows of earlier calls are
kept, rows of the same model, method, precision, stress and draw are replaced. A stressed model (`benchmarks.stress`)
is compared with the float model before stress."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stress import stress
from edgeforge.data import Dataset, from_arrays, load_tokenizer, windows
from edgeforge.pipeline import load, quantize, read_recipe
from edgeforge.sim.evaluate import dequantize_outputs, run_float, simulate
from edgeforge.target import load_target
from edgeforge.validate import perplexity

DOCS = Path(__file__).parents[1] / "docs"
TARGET = "snapdragon-8-gen-3"
MODEL = "tinylm"
PRECISIONS = ("w8a8", "w4a8", "w8a16")

#: Method -> recipe lines.
METHODS = {
    "rtn": ["weights=minmax"],
    "mse": ["weights=mse", "calibration.method=mse"],
    "smoothquant, norms": ["compress=[{method: smooth, alpha: 0.5, pairs: norms}]"],
    "smoothquant, all pairs": ["compress=[{method: smooth, alpha: 0.5}]"],
    "smooth, searched": ["compress=[{method: smooth, samples: 8}]"],
    "equalize": ["compress=[{method: equalize}]"],
    "mobilequant": ["compress=[{method: smooth, samples: 8}]", "train={steps: 150, batch: 4}"],
}
#: What makes a row the same row.
KEY = ("model", "method", "precision", "task", "protocol", "stress", "draw")


def texts(part: slice, every: int, length: int, tokenizer: Any) -> np.ndarray:
    file = Path(os.environ["EDGEFORGE_DATA"]) / "text_tinystories" / "tinystories_800.json"
    return windows(json.loads(file.read_text())[part], tokenizer, length)[::every]


def measure(method: str, precision: str, seed: int | None, draw: int, count: int) -> dict[str, Any]:
    """One row. seed: of the stress, None for the model as it is."""
    model, target = load(MODEL), load_target(TARGET)
    graph = model.imported.graph
    (name,) = graph.inputs
    recipe = read_recipe(model, None, precision, ["calibration.method=minmax", "calibration.samples=64"])
    recipe = recipe.with_set(METHODS[method])
    tokenizer = load_tokenizer(model.base / "tokenizer.json")
    length = graph.type(name).shape[1]
    pool = texts(slice(0, 550), 1, length, tokenizer)
    picked = np.random.default_rng(draw).choice(len(pool), recipe.calibration.samples, replace=False)
    data: Dataset = from_arrays("TinyStories 0-549", {name: pool[picked]}, graph)
    ids = texts(slice(600, 800), 8, length, tokenizer)[:count]
    exact = perplexity(run_float(graph, {name: ids})[graph.outputs[0]], ids)
    if seed is not None:
        changed = stress(graph, data.head(16).stacked(), seed)
        model = replace(model, imported=replace(model.imported, graph=changed))
    start = time.perf_counter()
    integer = quantize(model, recipe, target, data)
    seconds = time.perf_counter() - start
    value = perplexity(dequantize_outputs(integer, simulate(integer, {name: ids}))[integer.outputs[0]], ids)
    return {
        "model": MODEL,
        "method": method,
        "precision": precision,
        "task": f"perplexity, {len(ids)} windows of TinyStories 600-799",
        "protocol": "integer",
        "stress": seed,
        "draw": draw,
        "float": round(exact, 4),
        "value": round(value, 4),
        "delta_percent": round(100 * (value / exact - 1), 2),
        "seconds": round(seconds, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def record(row: dict[str, Any]) -> None:
    """Put a row into docs/quality.json in place of its like, and write docs/quality.md anew."""
    file = DOCS / "quality.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in KEY)] + [row]
    rows.sort(key=lambda r: [str(r[key]) for key in ("model", "stress", "precision")] + [order(r["method"]), r["draw"]])
    file.write_text(json.dumps(rows, indent=1) + "\n")
    (DOCS / "quality.md").write_text(page(rows))


def order(method: str) -> str:
    return f"{list(METHODS).index(method):02}" if method in METHODS else method


def page(rows: list[dict[str, Any]]) -> str:
    columns = [*KEY, "float", "value", "delta_percent", "seconds", "peak_mib"]
    lines = [
        "# Quality",
        "",
        "Made by `python -m benchmarks.quality`; see there for data and protocol. `stress`: seed of its outliers,",
        "None for the model as it is. `seconds` on a shared host: an upper bound.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[c]) for c in columns)} |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--stress", action="append", type=int, help="seed; without it the model as it is")
    parser.add_argument("--draws", type=int, default=1, help="calibration draws")
    parser.add_argument("--windows", type=int, default=100, help="of development text")
    asked = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each: peak memory
        for seed in asked.stress or [None]:
            for precision in asked.precision or PRECISIONS:
                for method in asked.method or METHODS:
                    for draw in range(asked.draws):
                        row = pool.apply(measure, (method, precision, seed, draw, asked.windows))
                        record(row)
                        print(precision, method, seed, draw, f"{row['delta_percent']:+.2f} %", flush=True)


if __name__ == "__main__":
    main()
