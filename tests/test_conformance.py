"""Conformance: cases are reproducible and legal, rows count what differs, refusals are rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgeforge.ops  # noqa: F401
from edgeforge.backends import backend
from edgeforge.conformance import page
from edgeforge.conformance.cases import CHAIN, make_case, precisions, prefix, union
from edgeforge.conformance.child import Child
from edgeforge.conformance.run import _short, conformance, outcomes, select
from edgeforge.conformance.samplers import without_sampler
from edgeforge.errors import InvalidInput
from edgeforge.ir.op import OPS
from edgeforge.ir.text import parse_graph, print_graph
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import simulate
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")
needs_ort = pytest.mark.skipif(bool(backend("onnx_qdq").cannot_run()), reason="onnxruntime is not installed")


def test_every_op_of_the_table_has_a_sampler() -> None:
    assert without_sampler() == []


@pytest.mark.parametrize("op", sorted(OPS))
def test_cases_are_legal_at_every_precision_and_run_in_the_simulator(op: str) -> None:
    for precision in precisions(op):
        for number in range(2 * CHAIN):
            case = make_case(op, precision, number, 0, TARGET)
            outputs = simulate(with_profile(case.graph, TARGET.numerics), case.feeds)
            assert outputs[case.graph.outputs[0]].shape == case.graph.type(case.graph.outputs[0]).shape
            assert len(case.graph.nodes) > 1 or number % CHAIN != CHAIN - 1


def test_a_case_depends_on_seed_and_number_alone() -> None:
    first, again = (make_case("conv2d", "w8a8", 5, 1) for _ in range(2))
    assert first.graph.hash() == again.graph.hash()
    assert all(np.array_equal(codes, again.feeds[name]) for name, codes in first.feeds.items())
    assert make_case("conv2d", "w8a8", 5, 2).graph.hash() != first.graph.hash()


def test_forced_encodings_of_the_target_reach_the_graph() -> None:
    free, forced = make_case("sigmoid", "w8a16", 0, 0), make_case("sigmoid", "w8a16", 0, 0, TARGET)
    assert forced.graph.values["y"].type.q.scale == np.float32(1 / 65536)
    assert free.graph.values["y"].type.q != forced.graph.values["y"].type.q
    assert make_case("matmul", "w8a16", 0, 0, TARGET).graph.values["b"].type.q.zero == TARGET.second_operand_zero


def test_a_batch_of_cases_computes_what_each_case_does() -> None:
    cases = [make_case("add", "w8a8", number, 0) for number in range(8)]
    graph, feeds = union(cases)
    together = simulate(with_profile(graph, "xnnpack"), feeds)
    for case in cases:
        alone = simulate(with_profile(case.graph, "xnnpack"), case.feeds)
        for name, codes in alone.items():
            assert np.array_equal(together[prefix(case) + name], codes)


@needs_ort
def test_movement_is_exact_and_a_difference_is_kept_with_its_case(tmp_path: Path) -> None:
    # Half up (the rounded exact value at 2**-40) and half to even differ on decimal scales.
    rows = conformance(TARGET, "onnx_qdq", [("reshape", "w8a8"), ("softmax", "w8a16")], 12, 0, tmp_path)
    assert (rows[0].identical, rows[0].max_lsb, rows[0].rule, rows[0].worst) == (1.0, 0, "exact", None)
    assert rows[0].cases == rows[1].cases == 12
    differing = rows[1]
    assert differing.worst is not None and differing.identical < 1
    text = (tmp_path / "softmax-w8a16.txt").read_text()
    assert f"# case {differing.worst}" in text
    with np.load(tmp_path / "softmax-w8a16.npz") as kept:
        arrays = {name.removeprefix("constant/"): kept[name] for name in kept if name.startswith("constant/")}
        graph = parse_graph(text.partition("\n")[2], arrays)
        feeds = {name.removeprefix("input/"): kept[name] for name in kept if name.startswith("input/")}
        assert np.array_equal(simulate(graph, feeds)[graph.outputs[0]], kept["simulator"])
        assert (kept["simulator"] != kept["runtime"]).any()
    assert print_graph(graph) in text


@needs_ort
def test_one_refused_case_is_named_and_the_others_still_run() -> None:
    cases = [make_case("reshape", "w8a8", number, 0) for number in range(5)]
    graph = cases[2].graph
    node = replace(graph.nodes[0], op="relu", attrs={}) if len(graph.nodes) == 1 else graph.nodes[0]
    wrong = replace(cases[2], graph=graph.rebuild([node]))
    with Child("onnx_qdq", TARGET) as child:
        found = outcomes(backend("onnx_qdq"), child, TARGET, [*cases[:2], wrong, *cases[3:]])
    refused = [outcome for outcome in found if outcome.codes is None]
    assert len(found) == 5 and [outcome.case.number for outcome in refused] == [2]
    assert refused[0].refused


def test_a_refusal_is_a_row_with_its_reason() -> None:
    rows = conformance(TARGET, "ort_qnn", [("linear", "w4a8-b32")], 2, 0) if not backend("ort_qnn").missing() else []
    for row in rows:
        assert row.cases == 0 and row.identical is None
        assert "block-wise weights with 8-bit activations" in (row.refused or "")


def test_unknown_selections_are_errors() -> None:
    with pytest.raises(InvalidInput, match="unknown op 'ad'"):
        select(["ad"], [])
    with pytest.raises(InvalidInput, match="no op has a row for w9a9"):
        select([], ["w9a9"])


def test_writing_a_section_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    one = page.document(TARGET, "onnx_qdq", 0, 1, [])
    two = page.document(TARGET, "ort_qnn", 0, 1, [])
    page.write(file, one)
    page.write(file, two)
    before = file.read_text()
    page.write(file, one)
    assert file.read_text() == before
    assert before.count("\n## ") == 2 and "emulated (HTP on x86-64)" in before


def test_a_seed_makes_the_same_cases_with_any_number_of_threads() -> None:
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1]));"
        "from edgeforge.conformance.cases import make_case; from edgeforge.conformance.run import select;"
        "print(*(make_case(*row, k, 3).graph.hash() for row in select([], []) for k in range(2)))"
    )
    made = {
        subprocess.run([sys.executable, "-c", code, threads], check=True, capture_output=True, text=True).stdout
        for threads in ("1", "2", "5")
    }
    assert len(made) == 1
    assert len(made.pop().split()) > 100


def test_the_same_failure_at_another_time_is_the_same_reason() -> None:
    def reason(time: str) -> str:
        return _short(
            f"BackendFailed: ort_qnn: failed; log: /tmp/a.log\n    {time} [W:onnxruntime:, a.cc:5 f] No Conv."
        )

    assert reason("2026-11-25 15:19:41.09") == reason("2026-11-26 03:00:00.1") == "No Conv."
