"""The demo app on a phone: its benchmark activity is started by an intent, runs an artifact and writes the record.

    push -> am start -n PACKAGE/.BenchmarkActivity --es request NAME -> progress -> result.json -> check -> clean up

android_demo/README.md describes the files. The record is not believed: the outputs that the app leaves are compared
here once more."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeforge.bundle import Bundle
from edgeforge.devices import adb
from edgeforge.devices.golden import compare, expected
from edgeforge.devices.host import new_run_id
from edgeforge.devices.result import MAX_BYTES, DeviceResult, parse_result
from edgeforge.devices.runners import ANSWER_S, joined, read_codes, samples, shell, tail
from edgeforge.devices.store import bundle_hash
from edgeforge.errors import BackendFailed, InvalidInput
from edgeforge.ir.types import NUMPY

PACKAGE, ARTIFACT = "org.edgeforge.demo", "onnx_qdq"
ACTIVITY = f"{PACKAGE}/.BenchmarkActivity"
#: What the app and adb both may read and write; the app makes it.
HOME = f"/sdcard/Android/data/{PACKAGE}/files"


@dataclass(frozen=True)
class Patience:
    """Between two looks at the app, and its longest silence; in seconds."""

    poll_s: float = 0.5
    silence_s: float = 600


def bench(
    bundle: Bundle,
    serial: str | None = None,
    threads: int = 1,
    repeats: int = 50,
    warmup: int = 5,
    say: Callable[[str], None] = lambda line: None,
    any_chip: bool = False,
    patience: Patience = Patience(),
) -> DeviceResult:
    """Run the bundle's ONNX model in the app. Arguments and errors: those of `adb.bench`."""
    record = adb.built(bundle, ARTIFACT)
    if wide := [name for name in bundle.graph.inputs if bundle.graph.type(name).dtype == "u16"]:
        raise InvalidInput(f"{wide[0]}: ONNX Runtime's Java interface takes no 16-bit inputs -> another --runner")
    with adb.reported():
        device, phone, unlike = adb.connected(bundle.target, serial, any_chip, say)
        _check_installed(device)
        old = f"find {HOME}/requests {HOME}/results -mindepth 1 -maxdepth 1 -mtime +0"
        device.shell2(f"{old} -exec rm -rf {{}} +", timeout=ANSWER_S)  # of runs whose phone went away
        run_id, wanted = new_run_id(), expected(bundle, ARTIFACT)
        asked, made = f"{HOME}/requests/{run_id}", f"{HOME}/results/{run_id}"
        try:
            shell(device, f"mkdir -p {asked}")
            for name in record.files:
                kept = adb.push(device, bundle.path / name, f"{HOME}/content", say)
                shell(device, f"cp {kept} {asked}/{(bundle.path / name).name}")
            for name, data in _request(bundle, run_id, wanted, threads, repeats, warmup).items():
                device.sync.push(data, f"{asked}/{name}")
            say(f"{warmup} + {repeats} inferences of {ARTIFACT} in {PACKAGE}")
            _start(device, f"--es request {run_id}")
            _await(device, made, say, patience)
            text, outputs = _result(device, made), _outputs(device, made, bundle)
        finally:
            device.shell2(f"am force-stop {PACKAGE}; rm -rf {asked} {made}", timeout=ANSWER_S)
    found = parse_result(text, f"{phone.serial}:{made}/result.json")
    if (found.run_id, found.bundle_sha256, found.artifact) != (run_id, bundle_hash(bundle.path), ARTIFACT):
        raise BackendFailed(f"the app's result is of another run, {found.run_id} -> install the app of this EdgeForge")
    if phone.source == "device-usb" and found.source not in ("device-app", "emulated"):
        raise BackendFailed(f"the app calls its result {found.source!r} -> install the app of this EdgeForge")
    golden = compare(wanted, outputs, bool(record.islands))
    if golden.status != found.golden.status:
        raise BackendFailed(
            f"the app says that golden vectors are {found.golden.status!r}, its outputs are {golden.status!r}"
            " -> install the app of this EdgeForge"
        )
    document = found.document() | {
        "source": found.source if phone.source == "device-usb" else phone.source,
        "golden": golden.model_dump(),
    }
    document["conditions"] |= {"other_chip": unlike}
    document["runtime"]["versions"] |= {"exported with onnx": bundle.manifest.tools.get("onnx", "")}
    return DeviceResult.model_validate(document)


def _check_installed(device: Any) -> None:
    """Raises InvalidInput without the app. Its folder appears when it first starts."""
    if "package:" not in device.shell2(f"pm path {PACKAGE}", timeout=ANSWER_S).output:
        raise InvalidInput(f"{PACKAGE} is not installed on {device.serial} -> android_demo/README.md")
    if device.shell2(f"ls -d {HOME}", timeout=ANSWER_S).returncode:
        _start(device, "")
        shell(device, f"for i in 1 2 3 4 5 6 7 8 9 10; do ls -d {HOME} && break; sleep 1; done; ls -d {HOME}")


def _start(device: Any, extras: str) -> None:
    """Start the activity anew. `am` reports its failures in words, with exit code 0."""
    said = shell(device, f"am start -W -S -n {ACTIVITY} {extras}".rstrip())
    if "Error" in said:
        raise BackendFailed(f"{device.serial} does not start {ACTIVITY}\n{tail(said)}")


def _request(
    bundle: Bundle, run_id: str, wanted: Mapping[str, np.ndarray], threads: int, repeats: int, warmup: int
) -> dict[str, bytes]:
    """The files of a request, by name."""
    graph, record = bundle.graph, bundle.manifest.backends[ARTIFACT]
    asked = samples(graph, bundle.golden_part("input"), graph.inputs)
    hoped = samples(graph, wanted, graph.outputs)
    lines = {
        "run_id": run_id, "bundle_sha256": bundle_hash(bundle.path), "artifact": ARTIFACT, "model": "model.onnx",
        "threads": threads, "warmup": warmup, "repeats": repeats, "samples": len(asked),
        "islands": str(bool(record.islands)).lower(), "inputs": len(graph.inputs), "outputs": len(graph.outputs),
    }  # fmt: skip
    lines |= {f"session.{key}": value for key, value in record.options.items()}
    for kind, names in (("input", graph.inputs), ("output", graph.outputs)):
        for i, name in enumerate(names):
            port = graph.type(name)
            shape = ",".join(map(str, port.shape))
            lines |= {f"{kind}.{i}.name": name, f"{kind}.{i}.dtype": port.dtype, f"{kind}.{i}.shape": shape}
    text = "".join(f"{_escaped(key)}={_escaped(str(value))}\n" for key, value in lines.items())
    files = {"request.properties": text.encode()}
    for kind, found in (("in", asked), ("want", hoped)):
        files |= {f"{kind}-{s}-{i}.bin": a.tobytes() for s, arrays in enumerate(found) for i, a in enumerate(arrays)}
    return files


def _escaped(text: str) -> str:
    """As java.util.Properties reads it."""
    units = text.encode("utf-16-be")
    codes = [int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2)]
    return "".join(chr(c) if c < 128 and (chr(c).isalnum() or chr(c) in "._-,") else f"\\u{c:04x}" for c in codes)


def _await(device: Any, made: str, say: Callable[[str], None], patience: Patience) -> None:
    """Until there is a result. Raises BackendFailed when the app fails, ends, or makes no progress."""
    seen, deadline = "", time.monotonic() + patience.silence_s
    while time.monotonic() < deadline:
        runs = device.shell2(f"pidof {PACKAGE}", timeout=ANSWER_S).returncode == 0
        there = device.shell2(f"ls {made}", timeout=ANSWER_S).output.split()
        if "result.json" in there:
            return
        if "error.txt" in there:
            raise BackendFailed(f"{PACKAGE} failed:\n{tail(shell(device, f'cat {made}/error.txt'))}")
        if not runs:
            raise BackendFailed(f"{PACKAGE} ended without a result -> adb -s {device.serial} logcat says why")
        progress = shell(device, f"cat {made}/progress.txt") if "progress.txt" in there else ""
        if progress != seen:
            seen, deadline = progress, time.monotonic() + patience.silence_s
            say(progress)
        time.sleep(patience.poll_s)
    raise BackendFailed(
        f"{PACKAGE} made no progress for {patience.silence_s:g} s (last: {seen or 'none'}) -> run again"
    )


def _result(device: Any, made: str) -> bytes:
    size = device.sync.stat(f"{made}/result.json").size
    if size > MAX_BYTES:
        raise BackendFailed(f"the app's result has {size / 1e6:.0f} MB -> this is no device result")
    return device.sync.read_bytes(f"{made}/result.json")


def _outputs(device: Any, made: str, bundle: Bundle) -> dict[str, np.ndarray]:
    """What the app's runtime computed for the golden inputs."""
    graph = bundle.graph
    count = len(samples(graph, bundle.golden_part("input"), graph.inputs))
    found: list[Sequence[np.ndarray]] = []
    for s in range(count):
        kinds = [graph.type(name) for name in graph.outputs]
        files = [f"{made}/out-{s}-{i}.bin" for i in range(len(kinds))]
        found.append([read_codes(device, f, k, NUMPY[k.dtype]) for f, k in zip(files, kinds, strict=True)])
    return joined(graph, found)
