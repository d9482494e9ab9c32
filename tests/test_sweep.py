"""Sweeps: every combination runs, a failure stops nothing else, and what is done is not done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import Failed

from edgeforge import sweep as sweeping

SWEEP = """
models: [digits]
targets: [snapdragon-8-gen-3]
precisions: [w8a8, w3a3]
methods:
  minmax: [calibration.method=minmax]
backends: [simulator]
workers: 2
"""


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path / "sweep.yaml"


def check(found):
    good, bad = found
    assert (good["precision"], good["status"], good["method"]) == ("w8a8", "done", "minmax")
    assert [a["backend"] for a in good["artifacts"]] == ["simulator"] and good["artifacts"][0]["sqnr_db"] > 20
    assert (bad["precision"], bad["status"]) == ("w3a3", "failed") and "w3a3" in bad["reason"]


def test_a_sweep_runs_all_keeps_a_log_per_trial_and_resumes(run, sweep, tmp_path):
    words = ("sweep", sweep, "--out", tmp_path / "out", "--json")
    found = json.loads(run(*words))["trials"]
    check(found)
    folders = {r["name"]: tmp_path / "out" / r["name"] for r in found}
    assert all((folder / "log.txt").stat().st_size > 0 for folder in folders.values())
    stamps = {name: (folder / "trial.json").stat().st_mtime_ns for name, folder in folders.items()}
    assert json.loads(run(*words))["trials"] == found
    assert {name: (folder / "trial.json").stat().st_mtime_ns for name, folder in folders.items()} == stamps
    (folders[found[0]["name"]] / "trial.json").unlink()  # as if it had been killed in the middle
    assert json.loads(run(*words))["trials"] == found
    assert (folders[found[1]["name"]] / "trial.json").stat().st_mtime_ns == stamps[found[1]["name"]]
    assert "failed" in run("sweep", sweep, "--out", tmp_path / "out")


def test_a_wrong_sweep_is_refused_as_a_whole(run, sweep, tmp_path):
    sweep.write_text(SWEEP.replace("workers", "wrokers"))
    with pytest.raises(Failed, match="wrokers"):
        run("sweep", sweep, "--out", tmp_path / "out")
    sweep.write_text(SWEEP.replace("gen-3", "gen-33"))
    with pytest.raises(Failed, match="did you mean"):
        run("sweep", sweep, "--out", tmp_path / "out")
    sweep.write_text(SWEEP)
    for executor in ("dask", "ray", "slurm"):
        with pytest.raises(Failed, match="--address"):
            run("sweep", sweep, "--out", tmp_path / "out", "--executor", executor)
    assert not (tmp_path / "out").exists()


def test_a_sweep_runs_on_a_dask_cluster_of_two_workers(run, sweep, tmp_path):
    pytest.importorskip("distributed", reason="pip install 'edgeforge[cluster]'")
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--host"]
    file = tmp_path / "scheduler.json"
    started = [subprocess.Popen([*command, "127.0.0.1", "--scheduler-file", file], stderr=subprocess.DEVNULL)]
    try:
        until = time.monotonic() + 60
        while not file.is_file() and time.monotonic() < until:
            time.sleep(0.1)
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", file, "--nthreads", "1"]
        started += [subprocess.Popen([*worker, "--no-dashboard"], stderr=subprocess.DEVNULL) for _ in range(2)]
        address = json.loads(file.read_text())["address"]
        words = ("--executor", "dask", "--address", address, "--json")
        check(json.loads(run("sweep", sweep, "--out", tmp_path / "out", *words))["trials"])
    finally:
        for process in started:
            process.terminate()
            process.wait(20)


@pytest.fixture
def ray_cluster(monkeypatch):
    """Two machines of one core each, as far as Ray can tell: each has its own scheduler, object store and workers."""
    pytest.importorskip("ray", reason="pip install 'edgeforge[cluster]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(sweeping.__file__).parents[1]), prepend=os.pathsep)
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray") as place:  # a short path: it holds sockets
        monkeypatch.setenv("RAY_TMPDIR", place)
        cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def test_a_sweep_runs_on_a_ray_cluster_of_two_workers(run, sweep, tmp_path, ray_cluster):
    words = ("sweep", sweep, "--out", tmp_path / "out", "--executor", "ray", "--address")
    check(json.loads(run(*words, ray_cluster.address, "--json"))["trials"])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_a_ray_cluster_that_does_not_answer_is_named(run, sweep, tmp_path, address):
    pytest.importorskip("ray", reason="pip install 'edgeforge[cluster]'")
    with pytest.raises(Failed, match="no Ray cluster answers"):
        run("sweep", sweep, "--out", tmp_path / "out", "--executor", "ray", "--address", address)


def die(trial, out):
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_trials_whose_worker_died_are_named_and_run_with_the_next_call(run, sweep, tmp_path, monkeypatch):
    words = ("sweep", sweep, "--out", tmp_path / "out", "--json")
    with monkeypatch.context() as dying:
        dying.setattr(sweeping, "run_trial", die)
        lost = json.loads(run(*words))["trials"]
    assert [r["status"] for r in lost] == ["failed", "failed"] and "worker lost" in lost[0]["reason"]
    check(json.loads(run(*words))["trials"])
