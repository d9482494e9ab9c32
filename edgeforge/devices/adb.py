"""A phone on a cable: push by content, run a runner that the user names, pull its outputs, leave nothing behind.

runners.py knows the runners. The adb server does the talking (adbutils is its client)."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgeforge.bundle import BackendRecord, Bundle, file_hash
from edgeforge.devices.golden import compare, expected
from edgeforge.devices.host import new_run_id, now
from edgeforge.devices.result import Conditions, Device, DeviceResult, Golden, Runtime
from edgeforge.devices.runners import ANSWER_S, Run, runner_for, shell
from edgeforge.devices.store import bundle_hash
from edgeforge.errors import BackendFailed, InvalidInput, MissingDependency
from edgeforge.target import Target, plain

#: Pushed files are kept here by their hash; each run has a folder of its own, removed at its end.
PLACE = "/data/local/tmp/edgeforge"
MACHINES = {0xB7: "arm64-v8a", 0x28: "armeabi-v7a", 0x3E: "x86_64", 0x03: "x86", 0xA4: "hexagon"}


@dataclass(frozen=True)
class Phone:
    """What `getprop` says. ``soc``: the chip's part number (SM8650), "" before Android 12. ``source``: by how it is
    connected, and whether it is an emulator."""

    serial: str
    name: str
    os: str
    soc: str
    abis: tuple[str, ...]
    source: Literal["device-usb", "emulated", "loopback"]


def bench(
    bundle: Bundle,
    runner: Path,
    serial: str | None = None,
    threads: int = 1,
    repeats: int = 50,
    warmup: int = 5,
    say: Callable[[str], None] = lambda line: None,
    artifact: str | None = None,
    libraries: Path | None = None,
    any_chip: bool = False,
) -> DeviceResult:
    """Run an artifact on a phone: the one named, or the one that the runner takes. ``libraries``: a folder of shared
    libraries that the runner finds beside it. ``threads``: not of the NPU. ``any_chip``: also where the phone has
    another chip than the bundle is for, or does not name it; the record's conditions say so.

    Raises InvalidInput for a bundle, a runner or a phone that do not fit, BackendFailed for what fails on the way."""
    if not runner.is_file():
        raise InvalidInput(f"--runner {runner} is no file -> a runner built for the phone")
    kind, shared = runner_for(runner, artifact), _shared(libraries)
    record = built(bundle, kind.artifact)
    if kind.on_npu and not shared:
        raise InvalidInput(
            f"{kind.artifact} needs Qualcomm's libraries -> --libraries FOLDER with libQnnHtp.so and more"
        )
    with reported():
        device, phone, unlike = connected(bundle.target, serial, any_chip, say)
        for file, machines in ((runner, phone.abis), *((file, (*phone.abis, "hexagon")) for file in shared)):
            if why := wrong_machine(file, machines):
                raise InvalidInput(why)
        # What a run left whose phone went away before its end; a younger folder may be another run's that goes on.
        device.shell2(f"find {PLACE} -maxdepth 1 -name 'run-*' -mtime +0 -exec rm -rf {{}} +", timeout=ANSWER_S)
        run_id = new_run_id()
        folder = f"{PLACE}/run-{run_id}"
        try:
            program = push(device, runner, PLACE, say)
            shell(device, f"mkdir -p {folder} && chmod 755 {program}")
            for file in (*(bundle.path / name for name in record.files), *shared):
                # A copy: ONNX Runtime refuses weights that a link leads out of the model's folder.
                shell(device, f"cp {push(device, file, PLACE, say)} {folder}/{shlex.quote(file.name)}")
            found = f"LD_LIBRARY_PATH={folder} ADSP_LIBRARY_PATH={folder} " if shared else ""
            before = _thermal(device)
            say(f"{warmup} + {repeats} inferences of {kind.artifact}")
            measured = kind.run(Run(device, folder, found + program, bundle, threads, warmup, repeats))
            after = _thermal(device)
            used = None if kind.on_npu else threads
            conditions = Conditions(
                threads=used, thermal_before=before, thermal_after=after, other_chip=unlike, **_battery(device)
            )
        finally:
            device.shell2(f"rm -rf {folder}", timeout=ANSWER_S)
    exported = {f"exported with {tool}": bundle.manifest.tools.get(tool, "") for tool in kind.tools}
    if measured.outputs is None:
        golden = Golden(status="not checked", where=measured.unchecked)
    else:
        golden = compare(expected(bundle, kind.artifact), measured.outputs, bool(record.islands))
    return DeviceResult(
        source=phone.source,
        run_id=run_id,
        created=now(),
        bundle_sha256=bundle_hash(bundle.path),
        artifact=kind.artifact,
        device=Device(name=phone.name, os=f"Android {phone.os}", soc=phone.soc),
        runtime=Runtime(name=kind.summary, versions={"runner sha256": file_hash(runner), **exported}),
        conditions=conditions,
        latency_us=measured.latency_us,
        load_ms=measured.load_ms,
        peak_memory_mb=measured.peak_memory_mb,
        golden=golden,
        notes=_abi_note(phone, bundle.target),
    )


def built(bundle: Bundle, artifact: str) -> BackendRecord:
    """The record of an artifact that a phone can run. Raises InvalidInput."""
    if bundle.prefill is not None:
        raise InvalidInput(f"{bundle.path} holds two graphs with state between them -> bench --on host")
    record = bundle.manifest.backends.get(artifact)
    if record is None or record.status != "built":
        raise InvalidInput(f"{bundle.path} has no {artifact} program -> export with --backend {artifact}")
    return record


def connected(target: Target, serial: str | None, any_chip: bool, say: Callable[[str], None]) -> tuple[Any, Phone, str]:
    """The phone that is meant: adb's, what it says of itself, and how its chip is not the target's."""
    device = _device(serial)
    phone = read_phone(device)
    unlike = other_chip(phone, target, any_chip)
    say(f"{phone.name}, Android {phone.os}, {phone.soc or 'unknown chip'}, {phone.serial}")
    return device, phone, unlike


def _shared(libraries: Path | None) -> list[Path]:
    """The files of the folder; raises InvalidInput when it is none."""
    if libraries is None:
        return []
    if not libraries.is_dir():
        raise InvalidInput(f"--libraries {libraries} is no folder -> a folder of shared libraries for the phone")
    return sorted(file for file in libraries.iterdir() if file.is_file())


def _abi_note(phone: Phone, target: Target) -> tuple[str, ...]:
    same = target.abi == phone.abis[0]
    return () if same else (f"the target's ABI is {target.abi}, the phone's {phone.abis[0]}",)


def other_chip(phone: Phone, target: Target, allowed: bool) -> str:
    """How the phone's chip is not the target's, or "". Raises InvalidInput for that unless it is ``allowed``: figures
    of one chip must not pass for those of another."""
    if target.soc is None:
        return ""
    known = {plain(name) for name in (target.name, target.soc.name, *target.aliases)}
    if plain(phone.soc) in known:
        return ""
    found = f"has {phone.soc}" if phone.soc else "does not say what it has"
    why = f"the bundle is for {target.soc.name}, the phone {found}"
    if not allowed:
        remedy = f"export with --target {phone.soc or 'CHIP'}, or run it all the same with --any-chip"
        raise InvalidInput(f"{why} -> {remedy}")
    return why


def wrong_machine(file: Path, machines: Sequence[str]) -> str:
    """Why ``file`` cannot run on a phone with these machines (ABIs), or "". Scripts have no machine."""
    with file.open("rb") as stream:
        head = stream.read(20)
    if head[:4] != b"\x7fELF":
        return ""
    machine = int.from_bytes(head[18:20], "little")
    built = MACHINES.get(machine, f"machine {machine}")
    if built in machines:
        return ""
    return f"{file} is built for {built}, the phone runs {', '.join(machines)} -> build it anew"


def read_phone(device: Any) -> Phone:
    props = dict(re.findall(r"^\[(.+?)\]: \[(.*)\]$", shell(device, "getprop"), re.MULTILINE))

    def prop(*names: str) -> str:
        found = next((props[name] for name in names if props.get(name)), "")
        return re.sub(r"[<>\x00-\x1f\x7f-\x9f]", " ", found)[:200]

    source: Literal["device-usb", "emulated", "loopback"] = "device-usb"
    if device.serial.startswith("emulator-") or "1" in (prop("ro.kernel.qemu"), prop("ro.boot.qemu")):
        source = "emulated"
    elif _on_this_machine(device.serial):
        source = "loopback"
    return Phone(
        device.serial,
        f"{prop('ro.product.manufacturer')} {prop('ro.product.model')}".strip(),
        prop("ro.build.version.release"),
        prop("ro.soc.model"),
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


def push(device: Any, file: Path, place: str, say: Callable[[str], None]) -> str:
    """The path of ``file`` in a folder of the phone, pushed unless it is there: whole, under its content's hash."""
    sha256 = file_hash(file)
    path = f"{place}/{sha256[:32]}"
    if device.shell2(f"sha256sum {path}", timeout=ANSWER_S).output.startswith(sha256):
        return path
    say(f"pushing {file.name}: {file.stat().st_size / 1e6:.2f} MB")
    shell(device, f"mkdir -p {place}")
    device.sync.push(file, f"{path}.part")
    if not shell(device, f"sha256sum {path}.part").startswith(sha256):
        raise BackendFailed(f"{file.name} arrived damaged on {device.serial} -> run again, perhaps with another cable")
    shell(device, f"mv {path}.part {path}")
    return path


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
def reported() -> Iterator[None]:
    """Failures of adb as ours."""
    try:
        import adbutils
    except ImportError:
        raise MissingDependency("adbutils is not installed -> pip install 'edgeforge[adb]'") from None
    try:
        yield
    except (adbutils.AdbError, OSError, EOFError, ValueError) as error:
        raise BackendFailed(f"adb: {error or type(error).__name__} -> check the cable and run this again") from None
