"""Traces on disk, the first node at which two runs part, and what the command line says about bad ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from edgeforge.bundle import Bundle
from edgeforge.cli import app
from edgeforge.errors import EdgeForgeError, InvalidInput
from edgeforge.pipeline import export
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import read_feeds
from edgeforge.sim.trace import compare, read_trace, record, shadow, write_trace


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("trace") / "digits"
    return export("digits", "snapdragon-8-gen-3", out, "embedded", backend_names=("simulator", "onnx_qdq"))


@pytest.fixture
def inputs(bundle: Bundle, tmp_path: Path) -> Path:
    np.savez(tmp_path / "in.npz", **bundle.golden_part("real"))
    return tmp_path / "in.npz"


def edgeforge(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def simulate(bundle: Bundle, inputs: Path, folder: Path, *more: object) -> Path:
    done = edgeforge(
        "simulate", bundle.path, "--input", inputs, "--output", inputs.with_name("out.npz"), "--trace", folder, *more
    )
    assert done.exit_code == 0, done.output
    return folder


def test_a_trace_holds_every_node_and_equals_itself(bundle: Bundle, inputs: Path, tmp_path: Path) -> None:
    a = simulate(bundle, inputs, tmp_path / "a")
    held = read_trace(a)
    assert [entry.name for entry in held.entries] == [*bundle.graph.inputs, *(n.output for n in bundle.graph.nodes)]
    output = bundle.graph.outputs[0]
    np.testing.assert_array_equal(held.codes[output], bundle.golden[f"output/{output}"])
    done = edgeforge("diff", a, a, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["equal"] is True


def test_the_first_node_that_departs_is_named(bundle: Bundle, inputs: Path, tmp_path: Path) -> None:
    a = simulate(bundle, inputs, tmp_path / "a")
    changed = record(bundle.graph, bundle.golden_part("input"), bundle.manifest.graph_hash, "")
    name = bundle.graph.nodes[3].output
    codes = changed.codes[name].copy()
    codes[(0,) * codes.ndim] ^= 1
    write_trace(tmp_path / "b", replace(changed, codes={**changed.codes, name: codes}), {})
    done = edgeforge("diff", a, tmp_path / "b", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["first"]["name"], found["first"]["index"]) == (name, [0] * codes.ndim)
    assert (found["first"]["max_lsb"], len(found["departures"])) == (1, 1)
    assert name in edgeforge("diff", a, tmp_path / "b").output


def test_an_artifact_is_compared_node_by_node(bundle: Bundle, inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ours = simulate(bundle, inputs, tmp_path / "a")
    theirs = simulate(bundle, inputs, tmp_path / "b", "--backend", "onnx_qdq")
    assert edgeforge("diff", theirs, bundle.path, "--backend", "onnx_qdq").exit_code == 0
    assert edgeforge("diff", ours, bundle.path, "--backend", "onnx_qdq").exit_code == 1


def test_the_shadow_is_the_graph_in_real_numbers(bundle: Bundle) -> None:
    codes = bundle.golden_part("input")
    output = bundle.graph.outputs[0]
    real = shadow(bundle.graph, codes)[output]
    exact = bundle.golden[f"float/{output}"]
    assert np.abs(real - exact).max() < 0.05 * np.abs(exact).max()
    rounded = bundle.graph.type(output).q.dequantize(bundle.golden[f"output/{output}"])  # type: ignore[union-attr]
    assert np.abs(real - exact).mean() < np.abs(rounded - exact).mean()


def test_codes_and_real_numbers_are_told_apart_by_dtype(bundle: Bundle) -> None:
    name = bundle.graph.inputs[0]
    from_real = read_feeds(bundle.graph, bundle.golden_part("real"))
    from_codes = read_feeds(bundle.graph, bundle.golden_part("input"))
    np.testing.assert_array_equal(from_real[name], from_codes[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"x": x.astype(np.int32)}, "holds int32, expected u8 codes or float values"),
        (lambda x: {"x": x[..., :4]}, "expected shape"),
        (lambda x: {"y": x}, "no array for input x"),
        (lambda x: {"x": x * np.nan}, "holds NaN or infinity"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(bundle: Bundle, change: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_feeds(bundle.graph, change(bundle.golden["real/x"]))  # type: ignore[operator]


def test_a_folder_that_is_no_trace_is_refused(bundle: Bundle, inputs: Path, tmp_path: Path) -> None:
    a = simulate(bundle, inputs, tmp_path / "a")
    for folder, why in ((tmp_path / "nowhere", "is not a trace"), (inputs.parent, "is not a trace")):
        assert why in str(edgeforge("diff", a, folder).exception)
    assert "--backend" in str(edgeforge("diff", a, bundle.path).exception)
    made = record(bundle.graph, bundle.golden_part("input"), "", "")
    with pytest.raises(InvalidInput, match="exists and is not a trace"):
        write_trace(bundle.path, made, {})
    other = with_profile(bundle.graph, "xnnpack")
    write_trace(tmp_path / "other", record(other, bundle.golden_part("input"), other.hash(), "xnnpack"), {})
    refused = edgeforge("diff", tmp_path / "other", bundle.path, "--backend", "onnx_qdq").exception
    assert "not of the graph" in str(refused)


@pytest.mark.parametrize("damage", ["trace.json", "codes.safetensors"])
def test_a_damaged_trace_is_an_error_a_user_can_act_on(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    write_trace(tmp_path, record(bundle.graph, bundle.golden_part("input"), "", ""), {})
    whole = (tmp_path / damage).read_bytes()
    for cut in (0, 5, len(whole) // 2):
        (tmp_path / damage).write_bytes(whole[:cut])
        with pytest.raises(EdgeForgeError, match="simulate again"):
            read_trace(tmp_path)


def test_traces_of_other_shapes_or_models_are_not_compared(bundle: Bundle) -> None:
    a = record(bundle.graph, bundle.golden_part("input"), "", "")
    fewer = record(bundle.graph, {name: x[:2] for name, x in bundle.golden_part("input").items()}, "", "")
    with pytest.raises(InvalidInput, match="runs on the same inputs"):
        compare(a, fewer)
    with pytest.raises(InvalidInput, match="no value in common"):
        compare(a, replace(a, entries=()))
