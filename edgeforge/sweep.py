"""Many exports and validations: models x targets x precisions x methods, in processes here or on a Dask or Ray cluster.

Each trial is a folder ``<out>/<name>/`` with its bundle, its log and ``trial.json``, written last: what has one is not
run again. The folder is the shared store: workers on other machines must see it under the same path."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from pydantic import Field

from edgeforge.backends._log import telling_lines
from edgeforge.errors import InvalidInput, MissingDependency
from edgeforge.target import Closed, load_target, read_yaml

LOG, TRIAL, BUNDLE = "log.txt", "trial.json", "bundle"


class Sweep(Closed):
    """A sweep file. methods: name -> recipe entries (``a.b=value``), as `export --set` takes them. ``backends``: all of
    the target's when empty. ``workers``: processes here."""

    models: tuple[str, ...]
    targets: tuple[str, ...]
    precisions: tuple[str, ...] = ("w8a8",)
    methods: dict[str, tuple[str, ...]] = Field(default_factory=lambda: {"default": ()})
    calibration: str = "embedded"
    backends: tuple[str, ...] = ()
    workers: int = 1


class Trial(Closed):
    """One point of a sweep; ``name``: of its folder."""

    model: str
    target: str
    precision: str
    method: str
    settings: tuple[str, ...]
    calibration: str
    backends: tuple[str, ...]

    @property
    def name(self) -> str:
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]
        parts = (Path(self.model).stem, self.target, self.precision, self.method, digest)
        return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts)

    def ended(self, status: str, reason: str = "") -> dict[str, Any]:
        """What ``trial.json`` holds; "reason" only with one."""
        about = {**self.model_dump(mode="json"), "name": self.name, "status": status, "artifacts": []}
        return {**about, "reason": reason} if reason else about

    def commands(self, bundle: str) -> list[list[str]]:
        export = ["export", self.model, "--target", self.target, "--precision", self.precision, "--out", bundle]
        export += ["--calibration", self.calibration]
        export += [word for setting in self.settings for word in ("--set", setting)]
        export += [word for backend in self.backends for word in ("--backend", backend)]
        return [export, ["validate", bundle, "--json"]]


def trials(sweep: Sweep) -> list[Trial]:
    """Every combination. Raises InvalidInput for targets that are not known."""
    for target in sweep.targets:
        load_target(target)
    points = itertools.product(sweep.models, sweep.targets, sweep.precisions, sweep.methods.items())
    return [
        Trial(model=model, target=target, precision=precision, method=method, settings=settings,
              calibration=sweep.calibration, backends=sweep.backends)
        for model, target, precision, (method, settings) in points
    ]  # fmt: skip


def run_trial(trial: Trial, out: str) -> dict[str, Any]:
    """Export and validate in child processes; what they say goes to the trial's log. Returns what ``trial.json`` holds:
    a failure is a result."""
    folder = Path(out) / trial.name
    folder.mkdir(parents=True, exist_ok=True)
    made = trial.ended("done")
    with (folder / LOG).open("w") as log:
        for words in trial.commands(str(folder / BUNDLE)):
            command = [sys.executable, "-m", "edgeforge.cli", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
            log.write(done.stdout)
            log.flush()
            if done.returncode == 2 or done.returncode < 0:
                made |= {"status": "failed", "reason": telling_lines(folder / LOG, 3).strip()}
                break
            if words[0] == "validate":
                made["artifacts"] = json.loads(done.stdout)["artifacts"]
                made["bounds_missed"] = done.returncode == 1
    part = folder / f".{TRIAL}.{os.getpid()}"
    part.write_text(json.dumps(made, indent=1) + "\n")
    part.replace(folder / TRIAL)
    return made


def run(
    file: Path,
    out: Path,
    executor: str = "processes",
    address: str | None = None,
    retry: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run what has no result yet; results in the order of the sweep. retry: also run what failed before.

    Raises InvalidInput for a sweep that cannot be read, MissingDependency without the executor's package."""
    sweep = read_yaml(file, Sweep)
    found = {trial.name: trial for trial in trials(sweep)}
    results = {name: json.loads(done.read_text()) for name in found if (done := out / name / TRIAL).is_file()}
    kept = {name for name, result in results.items() if not (retry and result["status"] == "failed")}
    say(f"{len(found)} trials, {len(kept)} of them done before")
    with _pool(executor, address, sweep.workers) as pool:
        place = str(out.resolve())
        waiting = {pool.submit(run_trial, trial, place): name for name, trial in found.items() if name not in kept}
        for finished in as_completed(waiting):
            name = waiting[finished]
            if (lost := finished.exception()) is None:
                results[name] = finished.result()
            else:  # no trial.json was written: the next run tries the trial again
                why = (str(lost).strip().splitlines() or [type(lost).__name__])[-1]
                results[name] = found[name].ended("failed", f"worker lost: {why}")
            say(f"{name}: {results[name]['status']}")
    return [results[name] for name in found]


@contextlib.contextmanager
def _pool(executor: str, address: str | None, workers: int) -> Iterator[Executor]:
    if executor == "processes":
        with ProcessPoolExecutor(max(workers, 1)) as pool:
            yield pool
        return
    clusters = {"dask": _dask, "ray": _ray}
    if executor not in clusters or address is None:
        raise InvalidInput(f"--executor {executor} -> processes, or dask or ray with --address of a cluster")
    with clusters[executor](address) as pool:
        yield pool


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError:
        raise MissingDependency("distributed is not installed -> pip install 'edgeforge[cluster]'") from None
    try:
        client = Client(address, timeout=10)
    except OSError as error:
        raise InvalidInput(f"no Dask scheduler answers at {address}: {error} -> dask scheduler") from None
    with client, client.get_executor() as pool:
        yield pool


@contextlib.contextmanager
def _ray(address: str) -> Iterator[Executor]:
    try:
        import ray
    except ImportError:
        raise MissingDependency("ray is not installed -> pip install 'edgeforge[cluster]'") from None

    class Pool(Executor):
        """Each call a task of one core; Ray repeats it elsewhere when its machine goes away."""

        def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
            return ray.remote(work).remote(*arguments, **named).future()

    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself tries for minutes
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"no Ray cluster answers at {address}: {error} -> ray start --head") from None
    try:
        yield Pool()
    finally:
        ray.shutdown()


def rows(results: list[dict[str, Any]]) -> list[list[Any]]:
    """One line per trial and artifact, for a table."""
    found = []
    for r in results:
        about = [r["model"], r["target"], r["precision"], r["method"]]
        if r["status"] != "done":
            found.append([*about, "failed", None, None, None, r["reason"][:80]])
        for a in r["artifacts"]:
            how = a["source"] if a["ran"] else f"not run: {a['reason']}"[:80]
            metric = (a["metric"] or {}).get("value")
            found.append([*about, a["backend"], a["identical"], a["sqnr_db"], metric, how])
    return found
