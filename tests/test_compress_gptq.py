"""GPTQ: outputs on calibration-like data err less than with each weight rounded by itself."""

from __future__ import annotations

import numpy as np
import pytest
from compress_models import block, data

from edgeforge.ir.fixed import LPBQ_STEPS
from edgeforge.ir.types import RANGE
from edgeforge.quantize.assign import assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert
from edgeforge.quantize.gptq import factored, gptq, round_columns
from edgeforge.quantize.weights import quantize_weight
from edgeforge.recipe import Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.parity import sqnr_db
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")


@pytest.mark.parametrize("block_size", [None, 16])
def test_correlated_inputs_let_columns_make_up_for_each_other(block_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 32)) + 0.1 * rng.normal(size=(400, 32))
    weight = rng.normal(size=(24, 32)).astype(np.float32)
    plain = quantize_weight("w", weight, "i4", block_size, "minmax")
    codes = round_columns(weight, plain.type, factored((x.T @ x)[None]))
    assert np.abs(codes).max() <= RANGE["i4"][1]
    errors = [((x @ (plain.type.q.dequantize(c) - weight).T) ** 2).mean() for c in (codes, plain.data)]
    assert errors[0] < 0.35 * errors[1]


def test_independent_inputs_change_no_code():
    weight = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    plain = quantize_weight("w", weight, "i8", None, "minmax")
    np.testing.assert_array_equal(round_columns(weight, plain.type, factored(np.eye(16)[None])), plain.data)


@pytest.mark.parametrize("precision", ["w4a16", "w4a16-b16"])
def test_the_integer_graph_holds_the_codes_that_were_chosen_and_is_better(precision):
    graph, feeds = block(), data(96).stacked()
    plan = assign(graph, calibrate(graph, [feeds]), Recipe(precision=precision), TARGET)
    made, learned = gptq(graph, plan, [feeds], "mse")
    wanted, found = run_float(graph, feeds)[graph.outputs[0]], []
    for candidate in (convert(graph, plan, TARGET, "mse"), convert(made, learned, TARGET)):
        codes = simulate(candidate, quantize_feeds(candidate, feeds))
        found.append(sqnr_db(wanted, dequantize_outputs(candidate, codes)[graph.outputs[0]]))
    assert found[1] > found[0] + 0.3
    integer = convert(made, learned, TARGET)
    for node in made.nodes:
        if node.op == "linear":
            value = integer.values[node.inputs[1]]
            q = value.type.q
            np.testing.assert_array_equal(q.dequantize(value.data), made.values[node.inputs[1]].data)
            if q.block is not None:
                multipliers = q.scale / (q.scale.max(1, keepdims=True) / LPBQ_STEPS)
                np.testing.assert_allclose(multipliers, np.rint(multipliers), atol=1e-4)
                assert multipliers.min() > 0.99


def test_moments_in_several_passes_are_those_of_one(monkeypatch):
    graph, feeds = block(), data(96).stacked()
    plan = assign(graph, calibrate(graph, [feeds]), Recipe(precision="w4a16"), TARGET)
    whole, _ = gptq(graph, plan, [feeds], "mse")
    passes = []
    monkeypatch.setattr("edgeforge.quantize.gptq.MOST_BYTES", 8 * 16**2)
    monkeypatch.setattr("edgeforge.quantize.gptq.run_float", lambda *a: passes.append(a) or run_float(*a))
    parts, _ = gptq(graph, plan, [feeds], "mse")
    assert len(passes) == 4  # q, k, v | o | gate, up | down
    for a, b in zip(whole.constants(), parts.constants(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)
