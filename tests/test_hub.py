"""Hosted benchmarks: the real qai-hub client against a server on this machine, through faults, kills and restarts."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Failed

pytest.importorskip("qai_hub", reason="pip install 'edgeforge[hub]'")

from hub_server import DEVICES, TOKEN, Fault, HubServer

from edgeforge.bundle import load_bundle
from edgeforge.devices import hub
from edgeforge.devices.journal import Journal
from edgeforge.devices.result import read_result
from edgeforge.devices.store import Store
from edgeforge.errors import BackendFailed, InvalidInput
from edgeforge.sim.evaluate import simulate

FAULTS = yaml.safe_load((Path(__file__).parent / "data" / "hub_faults.yaml").read_text())
QUICK = hub.Patience(retries_s=(0.01,) * 6, polls_s=(0.01,), timeout_s=30)
S24, S25 = DEVICES


@pytest.fixture(scope="module")
def context_binary(digits, tmp_path_factory):
    """The digits bundle with a stand-in for Qualcomm's context binary: 100 kB that nobody here reads."""
    place = Path(shutil.copytree(digits, tmp_path_factory.mktemp("hub") / "bundle"))
    folder = place / "artifacts" / "ort_qnn"
    folder.mkdir()
    (folder / "model_ctx_qnn.bin").write_bytes(np.random.default_rng(0).bytes(100_000))
    import hashlib

    manifest = json.loads((place / "manifest.json").read_text())
    file = "artifacts/ort_qnn/model_ctx_qnn.bin"
    manifest["sha256"][file] = hashlib.sha256((place / file).read_bytes()).hexdigest()
    manifest["backends"]["ort_qnn"] = {**manifest["backends"]["onnx_qdq"], "files": [file]}
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


@pytest.fixture
def bundle(context_binary, tmp_path):
    return load_bundle(Path(shutil.copytree(context_binary, tmp_path / "bundle")))


@pytest.fixture
def server(bundle, tmp_path, monkeypatch):
    """A hub on this machine that computes what the simulator computes; the client is configured for it."""
    import qai_hub.util.session as session

    def evaluate(inputs):
        found = simulate(bundle.graph, {name: np.concatenate(arrays) for name, arrays in inputs.items()})
        return {name: [codes[i : i + 1] for i in range(len(codes))] for name, codes in found.items()}

    started = HubServer(evaluate)
    config = tmp_path / "client.ini"
    config.write_text(f"[api]\napi_token = {TOKEN}\napi_url = {started.url}\nweb_url = {started.url}\n")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(config))
    monkeypatch.setenv("EDGEFORGE_RESULTS", str(tmp_path / "results.sqlite"))
    monkeypatch.setattr(session, "BACKOFF_FACTOR", 0.001)
    monkeypatch.setattr(session, "MAX_WAIT", 0.01)
    yield started
    started.shutdown()
    started.server_close()


def bench(bundle, devices=(S24,), artifact="ort_qnn", patience=QUICK, **options):
    return hub.bench(bundle, Store(), devices, (artifact,), patience=patience, **options)


def test_the_whole_flow_keeps_a_record_that_no_device_table_shows(server, bundle, run):
    said = []
    (result,) = bench(bundle, say=said.append)
    assert (result.source, result.device.name, result.device.soc) == ("loopback", S24, "SM8650")
    assert result.golden.status == "identical" and result.golden.identical == 1
    assert result.percentiles_us["min"] == 512 and result.load_ms == 90 and result.peak_memory_mb == 12
    first = result.nodes[0]
    assert (first.name, first.us, first.unit) == ("conv/ lambda :0", 100, "NPU")
    assert read_result(bundle.path / "results" / result.name) == result
    assert json.loads(run("results", "--devices", "--json"))["results"] == []
    assert [r["source"] for r in json.loads(run("results", "--json"))["results"]] == ["loopback"]
    assert Journal.read(bundle.path / "results") is None


def test_an_onnx_model_is_compiled_linked_and_run_on_two_devices_at_once(server, bundle):
    server.looks = 3
    results = bench(bundle, (S24, S25), "onnx_qdq")
    assert sorted(r.device.name for r in results) == [S24, S25]
    assert server.created == {(kind, d): 1 for kind in ("compile", "link", "inference") for d in (S24, S25)}
    assert set(server.uploads.values()) == {1} and len(server.uploads) == 2  # the model, the inputs


def test_several_contexts_are_not_uploaded(bundle):
    place, manifest = bundle.path / "artifacts" / "ort_qnn", bundle.path / "manifest.json"
    (place / "context1").mkdir()
    (place / "model_ctx_qnn.bin").rename(place / "context1" / "model_ctx_qnn.bin")
    manifest.write_text(manifest.read_text().replace("ort_qnn/model_ctx", "ort_qnn/context1/model_ctx"))
    with pytest.raises(InvalidInput, match="several contexts are not uploaded -> bench --on host"):
        hub.plan(load_bundle(bundle.path), ("ort_qnn",))


@pytest.mark.parametrize("fault", [None, Fault(r"POST /form/\w+", "truncate"), Fault(r"PUT /blob/\w+/\d+", "truncate")])
def test_no_temporary_file_is_left(server, bundle, tmp_path, monkeypatch, fault):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    server.faults = [fault] if fault else []
    bench(bundle)
    assert list((tmp_path / "temporary").iterdir()) == [] and tempfile.gettempdir() == str(tmp_path / "temporary")


def test_a_second_run_uploads_nothing_again_and_measures_anew(server, bundle):
    first, second = bench(bundle), bench(bundle)
    assert first[0].run_id != second[0].run_id
    assert set(server.uploads.values()) == {1} and server.created["inference", S24] == 2


def test_integers_that_depart_are_named(server, bundle):
    honest = server.evaluate

    def off_by_one(inputs):
        found = honest(inputs)
        next(iter(found.values()))[1][0, 2] ^= 1
        return found

    server.evaluate = off_by_one
    (result,) = bench(bundle)
    assert result.golden.status == "differs" and "[1, 2]" in result.golden.where
    assert result.flags == ("golden vectors differ",)


def test_compile_only_makes_no_inference_job_and_dry_run_asks_nobody(server, bundle, run):
    words = ("bench", bundle.path, "--on", "hub", "--device", S24)
    plan = json.loads(run(*words, "--dry-run", "--json"))
    assert plan == {"devices": [S24], "uploads": [
        {"artifact": "ort_qnn", "file": str(bundle.path / "artifacts/ort_qnn/model_ctx_qnn.bin"), "bytes": 100_000,
         "jobs": ["infer"]}]}  # fmt: skip
    assert server.log == []
    run(*words, "--compile-only")
    assert server.created == {("compile", S24): 1, ("link", S24): 1}


@pytest.mark.parametrize("fault", FAULTS, ids=[fault["name"] for fault in FAULTS])
def test_no_fault_loses_a_job_or_uploads_twice(server, bundle, fault, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    fault = dict(fault)
    ends, again, name = fault.pop("ends"), fault.pop("again", None), fault.pop("name")
    devices = list(DEVICES)[: fault.pop("devices", 1)]
    artifact, said = fault.pop("artifact", "onnx_qdq" if len(devices) > 1 else "ort_qnn"), []
    server.part_size = fault.pop("part_size", server.part_size)
    server.faults = [Fault(**fault)]
    begun = time.monotonic()
    kept: list = []
    if ends == "kept":
        kept = bench(bundle, devices, artifact, say=said.append)
    else:
        with pytest.raises((BackendFailed, InvalidInput)) as failed:
            bench(bundle, devices, artifact, say=said.append)
        assert ends in str(failed.value) and "->" in str(failed.value) and "<b>" not in str(failed.value), name
        said.append(str(failed.value))
        made = sum(server.created.values())
        server.faults, server.devices = [], dict(DEVICES)
        kept = bench(bundle, devices, artifact, say=said.append)
        if again == "resumes":
            assert sum(server.created.values()) == made, "a job was made twice"
    assert server.faults == [] or server.faults[0].times <= 0, "the fault was never met"
    assert {r.device.name for r in kept} == set(devices) and all(r.golden.status == "identical" for r in kept)
    assert set(server.uploads.values()) == {1} and len(server.uploads) == 2, "something was uploaded twice"
    if again != "anew":
        assert set(server.created.values()) == {1}, "a job was made twice"
    assert Journal.read(bundle.path / "results") is None
    assert time.monotonic() - begun < 20
    everything = "\n".join([*said, caplog.text, *capfd.readouterr()])
    everything += "".join(f.read_text() for f in (bundle.path / "results").iterdir())
    assert TOKEN not in everything
    assert "Traceback" not in "\n".join(said)


def test_there_are_at_least_twenty_faults():
    assert len({fault["name"] for fault in FAULTS}) == len(FAULTS) >= 20


def killed(server, bundle, number: int, when: str, artifact: str) -> bool:
    """Run a benchmark in another process, killed at the n-th request; False when it ended before."""
    server.hang = (len(server.log) + number, when)
    server.hung.clear()
    child = os.fork()
    if child == 0:
        try:
            bench(bundle, artifact=artifact)
        finally:
            os._exit(0)
    ended = False
    while not server.hung.wait(0.01):
        if os.waitpid(child, os.WNOHANG)[0]:
            ended = True
            break
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    server.hang = None
    return not ended


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("artifact", ["ort_qnn", "onnx_qdq"])
def test_a_run_killed_at_any_request_finishes_with_the_same_record(server, context_binary, tmp_path, when, artifact):
    server.looks = 0
    number = 0
    while True:
        place = load_bundle(Path(shutil.copytree(context_binary, tmp_path / f"{number}")))
        server.models.clear(), server.datasets.clear(), server.jobs.clear()
        server.uploads.clear(), server.created.clear()
        if not killed(server, place, number, when, artifact):
            break
        journal = Journal.read(place.path / "results")
        (result,) = bench(place, artifact=artifact)
        if journal is not None:
            assert result.run_id.startswith(journal.run_id) and result.created == journal.created
        assert result.golden.status == "identical" and len(list((place.path / "results").iterdir())) == 1
        assert set(server.uploads.values()) == {1} and len(server.uploads) == 2, number
        jobs = {"ort_qnn": ("inference",), "onnx_qdq": ("compile", "link", "inference")}[artifact]
        assert server.created == dict.fromkeys([(kind, S24) for kind in jobs], 1), number
        number += 1
    assert number > (20 if artifact == "ort_qnn" else 30)


def test_what_is_asked_of_an_interrupted_run_must_be_the_same(server, bundle):
    server.looks = 10_000
    with pytest.raises(BackendFailed, match="still running"):
        bench(bundle, patience=hub.Patience((0.01,), (0.01,), 0.2))
    with pytest.raises(InvalidInput, match="an interrupted run"):
        bench(bundle, (S25,), "onnx_qdq")
    for job in server.jobs.values():
        job["looks"] = 0
    assert len(bench(bundle)) == 1 and server.created["inference", S24] == 1


def test_devices_are_found_by_target_attribute_and_name(server, bundle):
    (result,) = bench(bundle, ("snapdragon-8-gen-3",))
    assert result.device.name == S24
    (result,) = bench(bundle, ("chipset:qualcomm-snapdragon-8gen3",))
    assert result.device.name == S24
    with pytest.raises(InvalidInput, match=r"no device 'Galaxy S99'.*Samsung Galaxy S24"):
        bench(bundle, ("Galaxy S99",))
    with pytest.raises(InvalidInput, match=r"is for SM8650, .* has SM8750"):
        bench(bundle, (S25,))


def test_a_model_in_two_files_is_not_uploaded_by_half(server, bundle):
    (bundle.artifact("onnx_qdq") / "model.onnx.data").write_bytes(b"weights")
    with pytest.raises(InvalidInput, match="file of their own"):
        bench(bundle, artifact="onnx_qdq")
    assert server.log == []


def test_without_a_configuration_the_remedy_is_named(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "absent.ini"))
    with pytest.raises(InvalidInput, match="qai-hub configure"):
        bench(bundle)


def test_a_damaged_journal_is_named_and_left_alone(server, bundle):
    (bundle.path / "results").mkdir()
    (bundle.path / "results" / ".hub-journal").write_text("{")
    with pytest.raises(InvalidInput, match="damaged"):
        bench(bundle)


@pytest.mark.parametrize(
    ("url", "real"),
    [
        ("https://workbench.aihub.qualcomm.com", True), ("http://workbench.aihub.qualcomm.com", False),
        ("https://workbench.aihub.qualcomm.com.evil.org", False), ("https://notqualcomm.com", False),
        ("http://127.0.0.1:80", False), ("https://localhost", False),
    ],
)  # fmt: skip
def test_only_the_real_service_has_devices(url, real):
    assert hub.official(url) == real


def test_the_command_line_says_what_failed_without_a_traceback(server, bundle, run):
    server.faults = [Fault("POST /jobs/", "fail", text="out of memory")]
    with pytest.raises(Failed) as failed:
        run("bench", bundle.path, "--on", "hub", "--device", S24)
    assert failed.value.code == 2 and "out of memory" in failed.value.said and "Traceback" not in failed.value.said
