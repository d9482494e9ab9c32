"""Hexagon's softmax and norms against integers that the HTP emulator gave."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from record_htp_norm import BACKEND, RECORDED, cases, emulate, layer_norm, rms_norm, softmax

from edgeforge.ir import qfloat
from edgeforge.ir.rules import RULES
from edgeforge.sim.evaluate import simulate

CASES = cases()


def simulated(name: str) -> np.ndarray:
    graph, codes = CASES[name]
    return simulate(graph, {"x": codes})["y"]


@pytest.mark.parametrize("name", CASES)
def test_the_simulator_gives_the_recorded_integers(name):
    np.testing.assert_array_equal(simulated(name), np.load(RECORDED)[name])


def test_rules_that_can_differ_are_not_called_exact():
    bounded = {name for name in CASES if RULES[CASES[name][0].nodes[0].rule].status != "exact"}
    assert bounded == {"softmax8", "layer_norm8"}


def test_softmax_of_a_pair_is_not_called_exact():
    assert RULES[softmax((4, 2), 5e-4, 1)[0].nodes[0].rule].status == "bounded"


def test_the_rounded_exact_value_is_not_what_the_hardware_gives():
    graph, codes = CASES["softmax16"]
    view = graph.view(replace(graph.nodes[0], fixed=RULES["softmax"].derive(graph.view(graph.nodes[0]))))
    exact = RULES["softmax"].apply(view, codes)
    assert (exact != np.load(RECORDED)["softmax16"]).mean() > 0.3


def test_vector_float_has_no_multiples_of_four_in_its_last_bits():
    one = np.float32(1)
    assert qfloat.multiply(one, one) == one + np.float32(2**-23)
    assert qfloat.add(one, np.float32(2**-22)) == one + np.float32(2**-22)
    np.testing.assert_array_equal(qfloat.floor(np.float32([-0.0, 0.0, -1.5])), [-1, 0, -2])


def test_vector_float_reciprocal_root_is_close_to_the_exact_one():
    x = np.geomspace(1e-6, 1e12, 1000).astype(np.float32)
    assert np.abs(qfloat.rsqrt(x) * np.sqrt(x.astype(np.float64)) - 1).max() < 2**-21


@pytest.mark.slow
@pytest.mark.skipif(bool(BACKEND.missing()), reason="needs onnxruntime-qnn")
def test_fresh_rows_agree_with_the_emulator():
    fresh = [rms_norm(dtype, (8, 320), 1e-6, 9) for dtype in ("u8", "u16")]
    for case in (*fresh, softmax((8, 512), 3e-4, 9), layer_norm("u16", (8, 320), 9)):
        np.testing.assert_array_equal(simulate(case[0], {"x": case[1]})["y"], emulate(*case))
