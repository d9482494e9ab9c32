"""This host: every artifact that runs here, timed in a process of its own on pinned cores."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeforge import backends
from edgeforge.backends._child import in_child, load_arrays
from edgeforge.bundle import Bundle
from edgeforge.devices.golden import compare, expected
from edgeforge.devices.result import Conditions, Device, DeviceResult, Runtime
from edgeforge.devices.store import bundle_hash
from edgeforge.errors import BackendFailed, InvalidInput, MissingDependency

WORKER = "edgeforge.devices._host_worker"
#: Packages whose versions say what ran.
VERSIONS = {
    "onnx_qdq": ("onnxruntime",),
    "executorch_xnnpack": ("executorch",),
    "ort_qnn": ("onnxruntime", "onnxruntime-qnn"),
    "executorch_qnn": ("executorch", "onnxruntime-qnn"),
    "simulator": ("edgeforge", "numpy", "torch"),
}
NO_TIME = "an emulator's time says nothing about the NPU: only its integers are recorded"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"


def cpu_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def bench(
    bundle: Bundle,
    only: Sequence[str] = (),
    threads: int = 1,
    repeats: int = 50,
    warmup: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> list[DeviceResult]:
    """One result per built artifact (and graph of a language model) that runs here.

    Raises InvalidInput when none does."""
    about = {
        "run_id": new_run_id(),
        "created": now(),
        "bundle_sha256": bundle_hash(bundle.path),
        "device": Device(name=f"{cpu_name()}, {os.cpu_count()} cores", os=f"{platform.system()} {platform.release()}"),
        "conditions": Conditions(threads=threads),
    }
    results = []
    for name, record in bundle.manifest.backends.items():
        if only and name not in only:
            continue
        chosen = backends.backend(name)
        if reason := record.reason if record.status != "built" else chosen.cannot_run():
            say(f"{name}: not run ({reason})")
            continue
        for part in bundle.parts:
            say(f"{name} {part.part}".rstrip() + f": {warmup} + {repeats} inferences on {threads} thread(s)")
            try:
                results.append(_one(part, name, about, threads, repeats, warmup))
            except (BackendFailed, MissingDependency) as error:
                say(f"{name}: failed: {error}")
    if not results:
        raise InvalidInput(f"{bundle.path}: no artifact ran here -> edgeforge doctor says what is missing")
    return results


def _one(bundle: Bundle, name: str, about: dict[str, Any], threads: int, repeats: int, warmup: int) -> DeviceResult:
    chosen = backends.backend(name)
    source = "host" if chosen.source == backends.HOST else "emulated"
    made: dict[str, Any] = {"source": source, "artifact": name, "part": bundle.part}
    made["runtime"] = Runtime(name=chosen.summary, versions=_versions(name))
    if chosen.timed:
        with tempfile.TemporaryDirectory(prefix="edgeforge-") as folder:
            outputs, figures = Path(folder) / "outputs.npz", Path(folder) / "figures.json"
            request = {
                "bundle": str(bundle.path), "part": bundle.part, "backend": name, "threads": threads,
                "repeats": repeats, "warmup": warmup,
                "outputs": str(outputs), "figures": str(figures),
            }  # fmt: skip
            in_child(name, WORKER, request)
            got, measured = load_arrays(str(outputs)), json.loads(figures.read_text())
        made |= measured | _speed(bundle.part, measured["latency_us"])
    else:
        got = chosen.run(bundle.artifact(name), bundle.graph, bundle.target, bundle.golden_part("input"))
        made["notes"] = (NO_TIME,)
    islands = bool(bundle.manifest.backends[name].islands)
    return DeviceResult(**about, **made, golden=compare(expected(bundle, name), got, islands))


def _speed(part: str, latency_us: Sequence[float]) -> dict[str, float]:
    """What a reader of the text waits for, by medians: tokens per second of decode steps, or the time until a prompt
    of one chunk is read, whose last logits give the first token."""
    median_us = statistics.median(latency_us)
    if part == "decode":
        return {"tokens_per_second": 1e6 / median_us}
    return {"first_token_ms": median_us / 1e3} if part == "prefill" else {}


def _versions(name: str) -> dict[str, str]:
    found = {}
    for package in VERSIONS.get(name, ()):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
