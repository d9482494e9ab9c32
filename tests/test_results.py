"""Results of devices: what a file may say, what becomes of it, and that nothing emulated stands among devices."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from conftest import Failed, another_network

from edgeforge.devices.result import SCHEMA, DeviceResult
from edgeforge.devices.store import bundle_hash


@pytest.fixture
def bundle(digits, tmp_path, monkeypatch):
    """A copy of the digits bundle, and a database of its own."""
    monkeypatch.setenv("EDGEFORGE_RESULTS", str(tmp_path / "db" / "results.sqlite"))
    return Path(shutil.copytree(digits, tmp_path / "bundle"))


@pytest.fixture
def written(bundle, tmp_path):
    """Write a result of that bundle, with changes, as a phone would have."""

    def write(**changes) -> Path:
        document = {
            "schema": SCHEMA, "source": "device-usb", "run_id": "run-1", "created": "2026-11-25T10:00:00Z",
            "bundle_sha256": bundle_hash(bundle), "artifact": "onnx_qdq", "device": {"name": "Phone", "os": "Android"},
            "runtime": {"name": "onnxruntime", "versions": {"onnxruntime": "1.32.0"}},
            "latency_us": [100 + i % 10 for i in range(40)], "golden": {"status": "identical", "identical": 1},
            **changes,
        }  # fmt: skip
        file = tmp_path / "result.json"
        file.write_text(json.dumps(document))
        return file

    return write


def refusal(run, tmp_path, *words) -> str:
    """What `ingest` says to a file that must be refused: exit code 2, no traceback, nothing written anywhere."""
    before = {f for f in tmp_path.rglob("*") if f.parent.name != "db"}
    with pytest.raises(Failed) as failed:
        run("ingest", *words)
    assert failed.value.code == 2 and "Traceback" not in failed.value.said
    assert {f for f in tmp_path.rglob("*") if f.parent.name != "db"} == before
    return failed.value.said


def test_a_result_is_kept_beside_its_bundle_and_in_the_database_once(run, bundle, written):
    file = written()
    (kept,) = json.loads(run("ingest", file, "--bundle", bundle, "--json"))["results"]
    assert kept["percentiles_us"]["p50"] == 104.5 and kept["flags"] == []
    run("ingest", file)  # the bundle is known by its hash now
    assert [f.name for f in (bundle / "results").iterdir()] == ["run-1.onnx_qdq.json"]
    (row,) = json.loads(run("results", "--json"))["results"]
    assert (row["model"], row["device"], row["latency_ms"]) == ("digits", "Phone", 0.1045)


def test_golden_failures_and_throttled_runs_are_kept_and_flagged(run, bundle, written):
    golden = {"status": "differs", "identical": 0.9, "max_lsb": 3, "where": "y[0, 1]: 4 instead of 7"}
    hot = {"thermal_before": 0, "thermal_after": 3}
    file = written(golden=golden, conditions=hot, flags=["all is well"])
    (kept,) = json.loads(run("ingest", file, "--bundle", bundle, "--json"))["results"]
    assert kept["flags"] == ["golden vectors differ", "throttled: thermal status 3"]
    slowing = written(run_id="run-2", latency_us=[100 + 2 * i for i in range(40)])
    assert "throttled: the last tenth" in json.loads(run("ingest", slowing, "--json"))["results"][0]["flags"][0]
    assert "not run" in json.loads(run("ingest", written(run_id="r3", golden={"status": "not run"}), "--json"))[
        "results"][0]["flags"][0]  # fmt: skip


@pytest.mark.parametrize("source", ["host", "emulated", "loopback"])
def test_nothing_but_devices_stands_in_a_comparison_of_devices(run, bundle, written, tmp_path, source):
    run("ingest", written(), "--bundle", bundle)
    run("ingest", written(run_id="other", source=source))
    assert len(json.loads(run("results", "--json"))["results"]) == 2
    assert [r["source"] for r in json.loads(run("results", "--devices", "--json"))["results"]] == ["device-usb"]
    run("results", "--devices", "--export", tmp_path / "devices.csv")
    with (tmp_path / "devices.csv").open() as stream:
        assert [row["source"] for row in csv.DictReader(stream)] == ["device-usb"]
    run("results", "--export", tmp_path / "all.json")
    whole = json.loads((tmp_path / "all.json").read_text())["results"]
    assert sorted(DeviceResult.model_validate(r).run_id for r in whole) == ["other", "run-1"]


def test_exported_results_calibrate_a_target(run, bundle, written, tmp_path):
    from edgeforge.estimate.calibrate import read_points

    run("ingest", written(), "--bundle", bundle)
    run("results", "--devices", "--artifact", "onnx_qdq", "--export", tmp_path / "measured.csv")
    (point,) = read_points(tmp_path / "measured.csv")
    assert (point.model, point.precision, point.latency_ms) == ("digits", "w8a8", 0.1045)


def test_a_spreadsheet_runs_nothing_that_a_result_says(run, bundle, written, tmp_path):
    run("ingest", written(device={"name": "=cmd|' /c calc'!A1"}), "--bundle", bundle)
    run("results", "--export", tmp_path / "a.csv")
    assert next(csv.DictReader((tmp_path / "a.csv").open()))["device"].startswith("'=")


HOSTILE = {
    "another schema": ({"schema": "edgeforge.device_result/2"}, "schema"),
    "an unknown key": ({"shell": "rm -rf"}, "shell"),
    "another bundle": ({"bundle_sha256": "0" * 64}, "the result is of bundle 0000"),
    "an artifact that the bundle lacks": ({"artifact": "tflite"}, "no artifact 'tflite'"),
    "a path as run id": ({"run_id": "../../../etc/cron.d/x"}, "run_id"),
    "an absolute path as artifact": ({"artifact": "/etc/passwd"}, "artifact"),
    "a hidden file as run id": ({"run_id": ".bashrc"}, "run_id"),
    "HTML in a name": ({"device": {"name": "<script>alert(1)</script>"}}, "device.name"),
    "HTML in a node": ({"nodes": [{"name": "<img src=x onerror=alert(1)>", "us": 1}]}, "nodes.0.name"),
    "terminal codes in a name": ({"device": {"name": "\x1b[2J"}}, "device.name"),
    "percentiles that do not follow": ({"percentiles_us": {"p50": 1}}, "does not follow"),
    "a negative time": ({"latency_us": [-1]}, "latency_us.0"),
    "an unknown source": ({"source": "trust me"}, "source"),
    "no time": ({"created": "yesterday"}, "created"),
    "a number as text": ({"latency_us": ["; drop table results"]}, "latency_us.0"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_results_are_refused_with_the_reason(run, bundle, written, tmp_path, what):
    changes, reason = HOSTILE[what]
    assert reason in refusal(run, tmp_path, written(**changes), "--bundle", bundle)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[1, 2]", "schema"), (b"[" * 100_000, "deeply"),
        (b'{"schema": "a", "schema": "b"}', "twice"), (b'{"schema": NaN}', "no number"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(run, bundle, tmp_path, content, reason):
    (tmp_path / "odd.json").write_bytes(content)
    assert reason in refusal(run, tmp_path, tmp_path / "odd.json", "--bundle", bundle)


def test_a_gigabyte_is_refused_unread(run, bundle, tmp_path):
    with (tmp_path / "big.json").open("wb") as stream:
        stream.truncate(1 << 30)
    assert "1074 MB" in refusal(run, tmp_path, tmp_path / "big.json", "--bundle", bundle)


def test_folders_pipes_and_absent_files_are_refused(run, bundle, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {"bundle": "not a file", "pipe": "not a file", "absent": "No such file"}.items():
        assert reason in refusal(run, tmp_path, tmp_path / name, "--bundle", bundle)


def test_another_result_under_a_known_run_id_changes_nothing(run, bundle, written):
    run("ingest", written(), "--bundle", bundle)
    kept = (bundle / "results" / "run-1.onnx_qdq.json").read_bytes()
    with pytest.raises(Failed, match="another result with this run id"):
        run("ingest", written(latency_us=[1.0]))
    assert (bundle / "results" / "run-1.onnx_qdq.json").read_bytes() == kept
    assert [f.name for f in (bundle / "results").iterdir()] == ["run-1.onnx_qdq.json"]


def test_an_unknown_bundle_and_a_damaged_database_are_named(run, bundle, written, tmp_path):
    with pytest.raises(Failed, match="--bundle"):
        run("ingest", written())
    database = tmp_path / "db" / "results.sqlite"
    sqlite3.connect(database).close()
    database.write_bytes(b"no database, but long enough to look like one" * 50)
    with pytest.raises(Failed, match="results database"):
        run("results")


def test_the_schema_on_record_is_the_one_that_is_read(run):
    file = Path(__file__).parents[1] / "docs" / "device_result.schema.json"
    if not file.is_file():
        pytest.skip("tests run without a checkout")
    assert json.loads(file.read_text()) == json.loads(run("results", "--schema")), "edgeforge results --schema > it"


def test_every_artifact_that_runs_on_this_host_is_timed_and_checked(run, bundle):
    pytest.importorskip("onnxruntime")
    found = json.loads(run("bench", bundle, "--repeats", 7, "--warmup", 1, "--json"))["results"]
    by_name = {r["artifact"]: r for r in found}
    assert {name: r["source"] for name, r in by_name.items()} == {"simulator": "emulated", "onnx_qdq": "host"}
    for r in found:
        assert r["golden"] == {"status": "identical", "identical": 1.0, "max_lsb": 0, "where": ""}
        assert len(r["latency_us"]) == 7 and r["conditions"]["threads"] == 1
        assert 0 < r["percentiles_us"]["min"] <= r["percentiles_us"]["p50"] <= r["percentiles_us"]["max"]
        assert 10 < r["peak_memory_mb"] == max(mb for _, mb in r["memory_mb"])
    assert by_name["simulator"]["percentiles_us"]["p50"] > by_name["onnx_qdq"]["percentiles_us"]["p50"]
    assert len(json.loads(run("results", "--json"))["results"]) == 2
    assert json.loads(run("results", "--devices", "--json"))["results"] == []


def test_a_changed_weight_is_a_golden_failure(run, bundle, tmp_path):
    """The artifact of another network in this bundle's place, hashes renewed: it runs, and is flagged."""
    import hashlib

    pytest.importorskip("onnxruntime")
    file = bundle / "artifacts" / "onnx_qdq" / "model.onnx"
    another_network(file)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["sha256"]["artifacts/onnx_qdq/model.onnx"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    words = ("--backend", "onnx_qdq", "--repeats", 3, "--warmup", 0, "--json")
    (found,) = json.loads(run("bench", bundle, *words))["results"]
    assert found["golden"]["status"] == "differs" and "instead of" in found["golden"]["where"]
    assert found["flags"] == ["golden vectors differ"]


def test_a_result_in_which_the_clock_of_this_host_drifts_is_not_called_throttled():
    """Host timings share the machine with other work: only devices are judged by their drift."""
    samples = [100.0] * 20 + [200.0] * 20
    made = {
        "run_id": "a", "created": "2026-01-01T00:00:00Z", "bundle_sha256": "0" * 64, "artifact": "x",
        "device": {"name": "d"}, "runtime": {"name": "r"}, "latency_us": samples, "golden": {"status": "identical"},
    }  # fmt: skip
    assert DeviceResult(source="host", **made).flags == ()
    assert DeviceResult(source="device-usb", **made).flags != ()
