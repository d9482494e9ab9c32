"""The command line as a user meets it: what it prints, its exit codes, and what it says to bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Failed
from onnx import TensorProto, helper, save

TARGET = ("--target", "snapdragon-8-gen-3")
QUICK = ("--backend", "simulator", "--backend", "onnx_qdq")


@pytest.fixture
def refused(run, tmp_path):
    """What a command that must be refused says: exit code 2, no traceback, nothing written beside its inputs."""

    def command(*words: str | Path) -> str:
        before = set(tmp_path.rglob("*"))
        with pytest.raises(Failed) as failed:
            run(*words)
        assert failed.value.code == 2
        assert "Traceback" not in failed.value.said
        assert set(tmp_path.rglob("*")) == before
        return failed.value.said

    return command


def onnx_file(path: Path, op: str = "Relu", shape=(1, 4)) -> Path:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", ports[:1], ports[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_export_then_validate_agrees_with_itself(run, digits):
    rows = json.loads(run("validate", digits, "--json"))["artifacts"]
    assert [row["backend"] for row in rows] == ["simulator", "onnx_qdq"]
    for row in rows:
        assert set(row) == {
            "backend", "ran", "reason", "identical", "max_lsb", "sqnr_db", "cosine", "metric", "source"
        }  # fmt: skip
        assert row["ran"] and row["sqnr_db"] > 20
    assert rows[0]["identical"] == 1.0


def test_validation_on_labelled_data_prints_flips_in_both_directions(run, digits):
    metric = json.loads(run("validate", digits, "--json", "--model", "digits", "--data", "embedded"))["artifacts"][0][
        "metric"
    ]
    assert metric["name"] == "top1"
    samples = 360
    assert round((metric["float"] - metric["value"]) * samples) == metric["lost"] - metric["gained"]


def test_a_missed_bound_is_exit_code_1(run, digits, tmp_path):
    out = tmp_path / "strict"
    bound = 'bounds={"*": {sqnr_db: 90}}'
    run(
        "export", "digits", *TARGET, "--calibration", "embedded", "--out", out, "--backend", "simulator", "--set", bound
    )
    with pytest.raises(Failed) as failed:
        run("validate", out)
    assert failed.value.code == 1
    assert "is below the recipe's bound 90" in failed.value.said


def test_nodes_are_compared_one_by_one_worst_first(run, digits):
    nodes = json.loads(run("validate", digits, "--per-node", "--json"))["nodes"]["onnx_qdq"]
    assert len(nodes) == len([line for line in run("show", digits).splitlines() if line.startswith("%")])
    assert [n["identical"] for n in nodes] == sorted(n["identical"] for n in nodes)
    assert {n["status"] for n in nodes} <= {"exact", "bounded", "unverified"}


def test_simulate_writes_the_golden_integers(run, digits, tmp_path):
    from edgeforge.bundle import load_bundle

    bundle = load_bundle(digits)
    np.savez(tmp_path / "in.npz", **bundle.golden_part("real"))
    run("simulate", digits, "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        for name, codes in bundle.golden_part("output").items():
            assert np.array_equal(found[name], codes)


def test_two_exports_are_equal_byte_by_byte(digits, tmp_path):
    from edgeforge.pipeline import export

    export("digits", "snapdragon-8-gen-3", tmp_path / "again", "embedded", backend_names=("simulator", "onnx_qdq"))
    files = sorted(f.relative_to(digits) for f in digits.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(tmp_path / "again") for f in (tmp_path / "again").rglob("*") if f.is_file())
    for file in files:
        assert (digits / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_show_ends_with_what_deviates_from_the_precision(run, digits):
    assert run("show", digits).splitlines()[-1].startswith("; activations: ")
    assert "graph digits float" in run("show", "digits")
    assert all("stem" in line for line in run("show", digits, "stem").splitlines() if line[0] != ";")


def test_the_catalogue_the_matrix_and_the_doctor_speak_json(run):
    names = [t["name"] for t in json.loads(run("targets", "--json"))["targets"]]
    assert "snapdragon-8-gen-3" in names
    assert {row["op"] for row in json.loads(run("ops", "--json"))["ops"]} >= {"conv2d", "softmax"}
    rows = json.loads(run("doctor", "--json"))["backends"]
    assert {row["backend"]: row["exports"] for row in rows}["simulator"]


def test_a_corrupt_onnx_file(refused, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(onnx_file(tmp_path / "good.onnx").read_bytes()[:-20])
    said = refused("export", tmp_path / "broken.onnx", *TARGET, "--calibration", "random", "--out", tmp_path / "out")
    assert "broken" in said


def test_an_op_that_is_not_supported(refused, tmp_path):
    model = onnx_file(tmp_path / "odd.onnx", "Acosh")
    assert "Acosh" in refused("export", model, *TARGET, "--calibration", "random", "--out", tmp_path / "out")


def test_a_dynamic_shape(refused, tmp_path):
    model = onnx_file(tmp_path / "dynamic.onnx", shape=("N", 4))
    assert "dynamic" in refused("export", model, *TARGET, "--calibration", "random", "--out", tmp_path / "out")


def test_nan_in_the_calibration_data(refused, tmp_path):
    x = np.zeros((2, 1, 8, 8), np.float32)
    x[1, 0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", x=x)
    said = refused("export", "digits", *TARGET, "--calibration", tmp_path / "nan.npz", "--out", tmp_path / "out")
    assert "x holds NaN or infinity" in said


def test_an_empty_calibration_folder(refused, tmp_path):
    (tmp_path / "images").mkdir()
    words = ("--set", "data={kind: image}", "--out", tmp_path / "out")
    assert "no images" in refused("export", "digits", *TARGET, "--calibration", tmp_path / "images", *words)


def test_no_calibration_names_the_flag(refused, tmp_path):
    assert "--calibration DATA" in refused("export", "digits", *TARGET, "--out", tmp_path / "out")


def test_an_unknown_target_suggests_names(refused, tmp_path):
    words = ("--target", "snapdragon-8-gen-33", "--calibration", "embedded", "--out", tmp_path / "out")
    assert "did you mean" in refused("export", "digits", *words)


def test_an_unknown_model_backend_and_recipe_key(refused, tmp_path):
    end = (*TARGET, "--calibration", "embedded", "--out", tmp_path / "out")
    assert "unknown model" in refused("export", "digit", *end)
    assert "unknown backend" in refused("export", "digits", *end, "--backend", "tflite")
    assert "calibration.sample" in refused("export", "digits", *end, "--set", "calibration.sample=3")


def test_a_precision_that_the_target_does_not_offer_names_the_nearest(refused, tmp_path):
    end = ("--calibration", "embedded", "--out", tmp_path / "out")
    assert "to w4a8" in refused("export", "digits", *TARGET, *end, "--precision", "w4a8-b32")
    words = ("--target", "arm64-xnnpack", *end, "--precision", "w8a16")
    assert "w8a8" in refused("export", "digits", *words)


def test_random_calibration_is_stamped_everywhere(run, tmp_path):
    out = tmp_path / "out"
    assert "UNCALIBRATED" in run("export", "digits", *TARGET, "--calibration", "random", "--out", out, *QUICK)
    assert json.loads((out / "manifest.json").read_text())["calibrated"] is False
    assert "uncalibrated" in (out / "report.md").read_text() and "UNCALIBRATED" in (out / "README.txt").read_text()


@pytest.mark.parametrize("file", ["graph.safetensors", "graph.txt", "recipe.yaml", "artifacts/onnx_qdq/model.onnx"])
def test_a_flipped_byte_in_a_bundle_is_noticed(run, digits, tmp_path, file):
    shutil.copytree(digits, tmp_path / "bundle")
    damaged = bytearray((tmp_path / "bundle" / file).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "bundle" / file).write_bytes(damaged)
    with pytest.raises(Failed, match="sha256 differs") as failed:
        run("validate", tmp_path / "bundle")
    assert failed.value.code == 2 and file in failed.value.said


def test_an_unknown_schema_version_and_an_escaping_path_are_refused(run, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "manifest.json"
    known = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**known, "schema_version": 99}))
    with pytest.raises(Failed, match="schema version 99"):
        run("validate", tmp_path / "bundle")
    manifest.write_text(json.dumps({**known, "sha256": {"../../etc/passwd": "0"}}))
    with pytest.raises(Failed, match="outside the bundle"):
        run("validate", tmp_path / "bundle")


def test_an_output_folder_that_is_no_bundle_is_left_alone(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    words = ("--calibration", "embedded", "--out", tmp_path / "mine")
    assert "is not a bundle" in refused("export", "digits", *TARGET, *words)


def in_a_process(*words: str | Path) -> subprocess.Popen[str]:
    """The child minds SIGINT also where these tests run in the background, which ignores it."""
    command = [sys.executable, "-m", "edgeforge.cli", *map(str, words)]
    mind = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=mind)


def test_control_c_in_the_middle_leaves_nothing(tmp_path):
    words = ("export", "digits", *TARGET, "--calibration", "embedded", "--out", tmp_path / "out", *QUICK)
    process = in_a_process(*words)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "interrupted: no output was written" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a tmpfs")
def test_a_full_disk_leaves_nothing(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        words = ("export", "digits", *TARGET, "--calibration", "embedded", "--out", small / "out", *QUICK)
        process = in_a_process(*words)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and "free space" in said and "Traceback" not in said
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_help_is_instant(tmp_path):
    """No command's help imports torch, onnx or numba."""
    code = "import sys; import edgeforge.cli; print(*sorted({'torch', 'onnx', 'numba', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_core_install_exports_and_simulates_without_the_optional_packages(tmp_path):
    """macOS and Windows users have neither QNN nor ExecuTorch; nothing on this path may import them."""
    blocked = ("onnxruntime", "onnxruntime_qnn", "executorch", "torchao", "transformers", "qai_hub")
    code = f"""
import sys
from importlib.metadata import PackageNotFoundError
import importlib.metadata as metadata

sys.modules |= dict.fromkeys({blocked!r})  # an entry that is None makes the import fail

version = metadata.version
def absent(name):
    if name.replace("-", "_") in {blocked!r}:
        raise PackageNotFoundError(name)
    return version(name)

metadata.version = absent
options = ["--target", "snapdragon-8-gen-3", "--calibration", "embedded", "--out", sys.argv[1]]
sys.argv = ["edgeforge", "export", "digits", *options]
from edgeforge.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    backends = json.loads((tmp_path / "out" / "manifest.json").read_text())["backends"]
    assert backends["onnx_qdq"]["status"] == backends["simulator"]["status"] == "built"
    for name in ("ort_qnn", "executorch_xnnpack", "executorch_qnn"):
        assert backends[name]["status"] == "skipped" and "pip install" in backends[name]["reason"]


def test_a_module_and_callable_is_a_model_and_data(run, tmp_path, monkeypatch):
    source = """
import numpy, torch
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), (torch.zeros(1, 3, 6, 6),)
def data():
    return {"input": numpy.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype("float32")}
"""
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    run("export", "mine:model", *TARGET, "--calibration", "mine:data", "--out", "out", "--backend", "simulator")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["model"] == "model"
    assert torch.is_grad_enabled()


def test_refusals_with_one_cause_are_one_line():
    from edgeforge.errors import Reason
    from edgeforge.pipeline import in_short

    reasons = [Reason(f"conv{i}", "conv2d", "16 bits", "export at w8a8") for i in range(9)]
    assert in_short(reasons) == "conv0 and 8 more: 16 bits -> export at w8a8"
