"""An export that was stopped goes on, and makes the bundle that it would have made at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeforge.bundle import load_bundle
from edgeforge.errors import InvalidInput
from edgeforge.steps import resumable

MODEL = Path(__file__).parents[1] / "models" / "tinylm"


def made(steps, text: str = "codes", calls: list[str] | None = None):
    """A step that writes a file and a folder."""

    def make():
        (steps.folder / "graph.txt").write_text(text)
        (steps.folder / "deep" / "er").mkdir(parents=True)
        (steps.folder / "deep" / "er" / "weights").write_bytes(b"\1\2")
        if calls is not None:
            calls.append(text)
        return {"note": [1, 0.1]}

    return steps("graphs", make, "graph.txt", "deep")


def stopped(out: Path, key: str, work) -> None:
    with pytest.raises(KeyboardInterrupt), resumable(out, key, lambda line: None) as steps:
        work(steps)
        raise KeyboardInterrupt


def test_a_finished_step_is_taken_over_once_and_then_forgotten(tmp_path):
    out, calls, said = tmp_path / "out", [], []
    stopped(out, "key", lambda steps: made(steps, "first", calls))
    assert not out.exists()
    with resumable(out, "key", said.append) as steps:
        assert made(steps, "second", calls) == {"note": [1, 0.1]}
    assert calls == ["first"] and said == ["graphs: taken over from an interrupted export"]
    assert (out / "graph.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_files_that_are_not_those_of_the_step_are_made_again(damage, tmp_path):
    out, calls = tmp_path / "out", []
    stopped(out, "key", lambda steps: made(steps, "first", calls))
    (folder,) = tmp_path.glob(".out.*.part/bundle")
    if damage == "changed":
        (folder / "deep" / "er" / "weights").write_bytes(b"\1\3")
    elif damage == "missing":
        (folder / "graph.txt").unlink()
    else:
        (folder / "deep" / "left").write_text("half")
    with resumable(out, "key", lambda line: None) as steps:
        made(steps, "second", calls)
    assert calls == ["first", "second"] and (out / "graph.txt").read_text() == "second"
    assert not (out / "deep" / "left").exists()


def test_a_step_that_was_stopped_inside_counts_for_nothing(tmp_path):
    def half(steps):
        def make():
            (steps.folder / "graph.txt").write_text("half")
            raise KeyboardInterrupt

        steps("graphs", make, "graph.txt", "deep")

    stopped(tmp_path / "out", "key", half)
    with resumable(tmp_path / "out", "key", lambda line: None) as steps:
        made(steps)
    assert (tmp_path / "out" / "graph.txt").read_text() == "codes"


def test_another_key_starts_over_and_a_refusal_leaves_nothing(tmp_path):
    out, calls = tmp_path / "out", []
    stopped(out, "key", lambda steps: made(steps, "first", calls))
    with pytest.raises(InvalidInput), resumable(out, "other", lambda line: None) as steps:
        made(steps, "second", calls)
        raise InvalidInput("no")
    assert calls == ["first", "second"] and not list(tmp_path.iterdir())


def command(out: Path) -> list[str]:
    settings = ("language.context=48", "language.chunk=16", "calibration.samples=1", "calibration.method=minmax")
    words = ["export", str(MODEL), "--target", "x86-host", "--calibration", "random", "--out", str(out)]
    words += [word for name in ("simulator", "onnx_qdq") for word in ("--backend", name)]
    return [sys.executable, "-m", "edgeforge.cli", *words, *(word for s in settings for word in ("--set", s))]


def test_an_export_that_was_killed_goes_on_to_the_same_bundle(tmp_path):
    first = subprocess.Popen(command(tmp_path / "out"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*.part/done/graphs.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    again = subprocess.run(command(tmp_path / "out"), capture_output=True, text=True, check=True)
    assert "graphs: taken over from an interrupted export" in again.stderr and "calibration:" not in again.stderr
    fresh = subprocess.run(command(tmp_path / "fresh"), capture_output=True, text=True, check=True)
    assert "taken over" not in fresh.stderr and "calibration:" in fresh.stderr
    files = [
        {f.relative_to(b): f.read_bytes() for f in b.rglob("*") if f.is_file()}
        for b in (tmp_path / "out", tmp_path / "fresh")
    ]
    assert files[0] == files[1] and len(files[0]) > 8
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["language"]["greedy"]
    assert load_bundle(tmp_path / "out").manifest.backends["onnx_qdq"].status == "built"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]
