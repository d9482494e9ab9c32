"""A phone on a cable: push by content, run a runner that the user names, pull its outputs, leave nothing behind.

The runner is a program with the options of ExecuTorch's executor_runner (--model_path, --inputs, --output_file,
--num_executions, --cpu_threads), built for the phone; qnn_executor_runner is not one of these. The adb server does the
talking (adbutils is its client)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge.backends.executorch_xnnpack import entering, leaving
from edgeforge.bundle import Bundle, file_hash
from edgeforge.devices.golden import compare, expected
from edgeforge.devices.host import new_run_id, now
from edgeforge.devices.result import Conditions, Device, DeviceResult, Runtime
from edgeforge.devices.store import bundle_hash
from edgeforge.errors import BackendFailed, InvalidInput, MissingDependency
from edgeforge.ir.types import NUMPY

#: Pushed files are kept here by their hash; each run has a folder of its own, removed at its end.
PLACE = "/data/local/tmp/edgeforge"
ARTIFACT = "executorch_xnnpack"
MACHINES = {0xB7: "arm64-v8a", 0x28: "armeabi-v7a", 0x3E: "x86_64", 0x03: "x86"}
#: Longest silence of the phone, in seconds: while a runner works, and otherwise.
RUN_S, ANSWER_S = 600, 30


@dataclass(frozen=True)
class Phone:
    """What `getprop` says. ``source``: by how it is connected, and whether it is an emulator."""

    serial: str
    name: str
    os: str
    soc: str
    abis: tuple[str, ...]
    source: str


def bench(
    bundle: Bundle,
    runner: Path,
    serial: str | None = None,
    threads: int = 1,
    repeats: int = 50,
    warmup: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> DeviceResult:
    """Run the XNNPACK program on a phone.

    Raises InvalidInput for a bundle, a runner or a phone that do not fit, BackendFailed for what fails on the way."""
    if bundle.prefill is not None:
        raise InvalidInput(f"{bundle.path} holds two graphs with state between them -> bench --on host")
    record = bundle.manifest.backends.get(ARTIFACT)
    if record is None or record.status != "built":
        raise InvalidInput(f"{bundle.path} has no {ARTIFACT} program -> export with --backend {ARTIFACT}")
    if not runner.is_file():
        raise InvalidInput(f"--runner {runner} is no file -> an executor_runner built for the phone")
    with _reported():
        device = _device(serial)
        phone = read_phone(device)
        if why := wrong_machine(runner, phone.abis):
            raise InvalidInput(why)
        say(f"{phone.name}, Android {phone.os}, {phone.soc or 'unknown chip'}, {phone.serial}")
        model = _push(device, bundle.artifact(ARTIFACT) / "model.pte", say)
        program = _push(device, runner, say)
        run_id = new_run_id()
        folder = f"{PLACE}/run-{run_id}"
        try:
            _shell(device, f"mkdir -p {folder} && chmod 755 {program}")
            before = _thermal(device)
            command = f"{program} --model_path {model} --cpu_threads {threads} --output_file out --inputs "
            outputs = _golden_run(device, bundle, folder, command)
            say(f"{warmup} + {repeats} inferences on {threads} thread(s)")
            log = _shell(
                device, f"cd {folder} && {command}{_names(bundle, 0)} --num_executions {warmup + repeats}", RUN_S
            )
            after = _thermal(device)
            conditions = Conditions(threads=threads, thermal_before=before, thermal_after=after, **_battery(device))
        finally:
            device.shell2(f"rm -rf {folder}", timeout=ANSWER_S)
    samples, load_ms = timings(log, warmup)
    exported = bundle.manifest.tools.get("executorch", "")
    versions = {"runner sha256": file_hash(runner), "exported with executorch": exported}
    return DeviceResult(
        source=phone.source,
        run_id=run_id,
        created=now(),
        bundle_sha256=bundle_hash(bundle.path),
        artifact=ARTIFACT,
        device=Device(name=phone.name, os=f"Android {phone.os}", soc=phone.soc),
        runtime=Runtime(name="ExecuTorch runner, XNNPACK", versions=versions),
        conditions=conditions,
        latency_us=samples,
        load_ms=load_ms,
        golden=compare(expected(bundle, ARTIFACT), outputs, bool(record.islands)),
    )


def timings(log: str, warmup: int) -> tuple[tuple[float, ...], float | None]:
    """Microseconds of every timed inference, and milliseconds of loading, from a runner's log. An older runner logs
    the sum alone: then there is one sample, the mean. Raises BackendFailed when there is no time in it."""
    each = [float(ms) * 1e3 for ms in re.findall(r"Iteration \d+ of \d+: ([\d.]+) ms", log)]
    loaded = re.search(r"Model loaded in ([\d.]+) ms", log)
    load_ms = float(loaded[1]) if loaded else None
    if len(each) > warmup:
        return tuple(each[warmup:]), load_ms
    whole = re.search(r"executed successfully (\d+) time\(s\) in ([\d.]+) ms", log)
    if whole is None or int(whole[1]) == 0:
        raise BackendFailed(f"the runner said nothing about time -> is it an executor_runner?\n{_tail(log)}")
    return (float(whole[2]) * 1e3 / int(whole[1]),), load_ms


def wrong_machine(runner: Path, abis: Sequence[str]) -> str:
    """Why ``runner`` cannot run on a phone with these ABIs, or "". Scripts have no machine."""
    with runner.open("rb") as stream:
        head = stream.read(20)
    if head[:4] != b"\x7fELF":
        return ""
    machine = int.from_bytes(head[18:20], "little")
    built = MACHINES.get(machine, f"machine {machine}")
    return "" if built in abis else f"{runner} is built for {built}, the phone runs {', '.join(abis)} -> build it anew"


def read_phone(device: Any) -> Phone:
    props = dict(re.findall(r"^\[(.+?)\]: \[(.*)\]$", _shell(device, "getprop"), re.MULTILINE))

    def prop(*names: str) -> str:
        found = next((props[name] for name in names if props.get(name)), "")
        return re.sub(r"[<>\x00-\x1f\x7f-\x9f]", " ", found)[:200]

    source = "device-usb"
    if device.serial.startswith("emulator-") or "1" in (prop("ro.kernel.qemu"), prop("ro.boot.qemu")):
        source = "emulated"
    elif _on_this_machine(device.serial):
        source = "loopback"
    return Phone(
        device.serial,
        f"{prop('ro.product.manufacturer')} {prop('ro.product.model')}".strip(),
        prop("ro.build.version.release"),
        prop("ro.soc.model", "ro.board.platform"),
        tuple(prop("ro.product.cpu.abilist", "ro.product.cpu.abi").split(",")),
        source,
    )


def _on_this_machine(serial: str) -> bool:
    """Whether a serial is an address of this very machine: what runs there is no phone."""
    host = serial.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _device(serial: str | None) -> Any:
    """The phone that is meant. Raises InvalidInput when that is not one."""
    import adbutils

    known = {info.serial: info.state for info in adbutils.AdbClient().list()}
    ready = [name for name, state in known.items() if state == "device"]
    listed = ", ".join(f"{name} ({state})" for name, state in known.items()) or "none"
    if serial is None and len(ready) == 1:
        serial = ready[0]
    if serial is None:
        remedy = "name one with --serial" if ready else "connect a phone and allow USB debugging on its screen"
        raise InvalidInput(f"{len(ready)} phones are ready; adb lists {listed} -> {remedy}")
    if known.get(serial) != "device":
        state = known.get(serial, "not connected")
        raise InvalidInput(f"{serial} is {state}; adb lists {listed} -> allow USB debugging on it")
    return adbutils.AdbClient().device(serial)


def _push(device: Any, file: Path, say: Callable[[str], None]) -> str:
    """The path of ``file`` on the phone, pushed unless it is there: whole, under the name of its content."""
    sha256 = file_hash(file)
    path = f"{PLACE}/{sha256[:32]}"
    if device.shell2(f"sha256sum {path}", timeout=ANSWER_S).output.startswith(sha256):
        return path
    say(f"pushing {file.name}: {file.stat().st_size / 1e6:.2f} MB")
    _shell(device, f"mkdir -p {PLACE}")
    device.sync.push(file, f"{path}.part")
    if not _shell(device, f"sha256sum {path}.part").startswith(sha256):
        raise BackendFailed(f"{file.name} arrived damaged on {device.serial} -> run again, perhaps with another cable")
    _shell(device, f"mv {path}.part {path}")
    return path


def _names(bundle: Bundle, sample: int) -> str:
    return ",".join(f"in{sample}-{i}.bin" for i in range(len(bundle.graph.inputs)))


def _golden_run(device: Any, bundle: Bundle, folder: str, command: str) -> dict[str, np.ndarray]:
    """The phone's output codes for every golden sample, each in a run of its own."""
    graph, codes = bundle.graph, bundle.golden_part("input")
    sizes = {name: graph.type(name).shape[0] for name in graph.inputs}
    counts = {name: len(codes[name]) // sizes[name] for name in graph.inputs}
    found: dict[str, list[np.ndarray]] = {name: [] for name in graph.outputs}
    for sample in range(max(counts.values())):
        for i, name in enumerate(graph.inputs):
            at = min(sample, counts[name] - 1) * sizes[name]
            piece = entering(graph.type(name), codes[name][at : at + sizes[name]])
            device.sync.push(piece.numpy().tobytes(), f"{folder}/in{sample}-{i}.bin")
        _shell(device, f"cd {folder} && {command}{_names(bundle, sample)} --num_executions 1", RUN_S)
        for i, name in enumerate(graph.outputs):
            found[name].append(_output(device, f"{folder}/out-{i}.bin", graph.type(name)))
    return {name: np.concatenate(pieces) for name, pieces in found.items()}


def _output(device: Any, path: str, kind: Any) -> np.ndarray:
    dtype = {"u8": np.dtype(np.int8), "u16": np.dtype(np.float32)}.get(kind.dtype, NUMPY[kind.dtype])
    data = device.sync.read_bytes(path)
    if len(data) != kind.size * dtype.itemsize:
        want = kind.size * dtype.itemsize
        raise BackendFailed(
            f"the runner wrote {len(data)} bytes to {path}, not {want} -> is the program this bundle's?"
        )
    return leaving(kind, np.frombuffer(data, dtype).reshape(kind.shape))


def _shell(device: Any, command: str, timeout_s: float = ANSWER_S) -> str:
    """Output of a command on the phone. Raises BackendFailed when it fails there."""
    done = device.shell2(command, timeout=timeout_s)
    if done.returncode:
        raise BackendFailed(f"{device.serial}: exit code {done.returncode} of: {command[:200]}\n{_tail(done.output)}")
    return done.output


def _tail(text: str) -> str:
    return "\n".join(f"    {line[:300]}" for line in text.splitlines()[-6:])


def _thermal(device: Any) -> int | None:
    found = re.search(r"Thermal Status: ([0-6])", device.shell2("dumpsys thermalservice", timeout=ANSWER_S).output)
    return int(found[1]) if found else None


def _battery(device: Any) -> Mapping[str, Any]:
    text = device.shell2("dumpsys battery", timeout=ANSWER_S).output
    level = re.search(r"^\s*level: (\d+)", text, re.MULTILINE)
    powered = re.findall(r"powered: (true|false)", text)
    return {
        "battery_percent": min(float(level[1]), 100) if level else None,
        "charging": "true" in powered if powered else None,
    }


@contextmanager
def _reported() -> Iterator[None]:
    """Failures of adb as ours."""
    try:
        import adbutils
    except ImportError:
        raise MissingDependency("adbutils is not installed -> pip install 'edgeforge[adb]'") from None
    try:
        yield
    except (adbutils.AdbError, OSError, EOFError, ValueError) as error:
        raise BackendFailed(f"adb: {error or type(error).__name__} -> check the cable and run this again") from None
