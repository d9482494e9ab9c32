"""The planted outliers of the quality benchmark: nothing changes in float, and plain rounding fails."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.stress import stress
from edgeforge.compress import compress
from edgeforge.data import Dataset
from edgeforge.ir.graph import Graph
from edgeforge.pipeline import find_data, load
from edgeforge.quantize.assign import assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert
from edgeforge.recipe import Recipe, Smooth
from edgeforge.sim.evaluate import dequantize_outputs, run_float, simulate
from edgeforge.target import load_target, read_yaml
from edgeforge.validate import perplexity

TARGET = load_target("snapdragon-8-gen-3")


@pytest.fixture(scope="module")
def tinylm():
    return load("tinylm")


@pytest.fixture(scope="module")
def recipe(tinylm) -> Recipe:
    return read_yaml(tinylm.base / "recipe.yaml", Recipe)


@pytest.fixture(scope="module")
def data(tinylm, recipe) -> Dataset:
    return find_data("embedded", "calibration", tinylm, tinylm.imported.graph, recipe, tinylm.base).head(16)


def drop(graph: Graph, quantizable: Graph, recipe: Recipe, data: Dataset) -> float:
    """Relative growth of perplexity on the samples that calibrate."""
    feeds = data.stacked()
    (ids,) = feeds.values()
    plan = assign(quantizable, calibrate(quantizable, [feeds]), recipe, TARGET)
    integer = convert(quantizable, plan, TARGET)
    got = dequantize_outputs(integer, simulate(integer, feeds))["lm_head"]
    return perplexity(got, ids) / perplexity(run_float(graph, feeds)["lm_head"], ids) - 1


@pytest.mark.parametrize("seed", [0, 1])
def test_outliers_leave_the_float_model_and_break_rounding_that_smoothing_mends(tinylm, recipe, data, seed):
    graph, feeds = tinylm.imported.graph, data.stacked()
    stressed = stress(graph, feeds, seed)
    before, after = (run_float(g, feeds)["lm_head"] for g in (graph, stressed))
    assert np.abs(before - after).max() < 1e-4
    plain = drop(graph, stressed, recipe, data)
    smoothed = compress(stressed, recipe.model_copy(update={"compress": (Smooth(samples=4),)}), TARGET, data)
    assert plain > 0.2
    assert drop(graph, smoothed, recipe, data) < plain / 3
