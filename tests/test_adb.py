"""A phone on a cable: the real adb server and the real ExecuTorch runtime, a stand-in for the phone between them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import Failed

adbutils = pytest.importorskip("adbutils", reason="pip install 'edgeforge[adb]'")
pytest.importorskip("executorch", reason="pip install 'edgeforge[executorch]'")

from adb_device import Phone  # noqa: E402

from edgeforge.bundle import load_bundle  # noqa: E402
from edgeforge.devices import adb  # noqa: E402
from edgeforge.devices.store import RESULTS  # noqa: E402
from edgeforge.errors import BackendFailed  # noqa: E402

SOURCE = Path(__file__).with_name("executor_runner.cpp")
LIBRARIES = ("", "_backend_xnnpack", "_kernels_optimized", "_kernels_quantized", "_threadpool")
#: An unpacked wheel of ExecuTorch for aarch64: with it, a cross compiler and qemu the Arm side is run as well.
ARM = os.environ.get("EDGEFORGE_AARCH64_EXECUTORCH", "")


@pytest.fixture(scope="module")
def server():
    """An adb server of our own, on a free port."""
    try:
        program = adbutils.adb_path()
    except (OSError, RuntimeError):
        pytest.skip("no adb program")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    patched = pytest.MonkeyPatch()
    patched.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    subprocess.run([program, "-P", str(port), "start-server"], check=True, capture_output=True, timeout=60)
    yield port
    subprocess.run([program, "-P", str(port), "kill-server"], check=False, capture_output=True, timeout=60)
    patched.undo()


@pytest.fixture
def phone(server, tmp_path):
    (tmp_path / "phone").mkdir()
    made = Phone(tmp_path / "phone")
    client = adbutils.AdbClient()
    assert "connected to" in client.connect(made.serial, timeout=10)
    client.wait_for(made.serial, timeout=10)
    yield made
    client.disconnect(made.serial)
    made.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from edgeforge.pipeline import export

    out = tmp_path_factory.mktemp("adb") / "digits"
    names = ("simulator", "executorch_xnnpack")
    export("digits", "snapdragon-8-gen-3", out, "embedded", backend_names=names)
    return out


@pytest.fixture
def bundle(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_RESULTS", str(tmp_path / "results.sqlite"))
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def build(compiler: str, package: Path, out: Path) -> Path:
    """The runner, compiled against the libraries of an ExecuTorch wheel."""
    include, lib = package / "include", package / "lib"
    options = ["-w", "-O1", "-std=c++17", "-DC10_USING_CUSTOM_GENERATED_MACROS", f"-I{include}"]
    options += [f"-I{include}/executorch/runtime/core/portable_type/c10", f"-L{lib}", f"-Wl,-rpath,{lib}"]
    libraries = ["-Wl,--no-as-needed", *(f"-lexecutorch{name}" for name in LIBRARIES)]
    subprocess.run([compiler, *options, SOURCE, "-o", out, *libraries], check=True)
    return out


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    package = Path(importlib.util.find_spec("executorch").submodule_search_locations[0])
    return build("g++", package, tmp_path_factory.mktemp("runner") / "executor_runner")


def words(bundle, runner, *more):
    return ("bench", bundle, "--on", "adb", "--runner", runner, "--repeats", 6, "--warmup", 2, "--json", *more)


def test_a_phone_computes_the_golden_integers_and_is_left_clean(run, phone, bundle, runner):
    phone.thermal = 0
    (found,) = json.loads(run(*words(bundle, runner, "--serial", phone.serial)))["results"]
    assert found["golden"] == {"status": "identical", "identical": 1.0, "max_lsb": 0, "where": ""}
    assert found["device"] == {"name": "Acme Phone 1", "os": "Android 15", "soc": "SM8650"}
    assert found["source"] == "loopback"  # whatever is connected through this machine's own address is no phone
    assert len(found["latency_us"]) == 6 and found["load_ms"] > 0
    c = found["conditions"]
    assert (c["battery_percent"], c["charging"], c["thermal_before"], c["thermal_after"]) == (81, True, 0, 0)
    left = [f.name for f in (phone.folder / "files" / "edgeforge").iterdir()]
    assert len(left) == 2 and all(len(name) == 32 for name in left)  # the model and the runner, by content
    assert len(list((bundle / RESULTS).glob("*.json"))) == 1
    assert json.loads(run("results", "--devices", "--json"))["results"] == []


@pytest.mark.skipif(not ARM, reason="EDGEFORGE_AARCH64_EXECUTORCH names no unpacked wheel")
def test_arm_code_computes_the_same_integers_under_qemu(run, phone, bundle, tmp_path):
    program = build("aarch64-linux-gnu-g++", Path(ARM) / "executorch", tmp_path / "executor_runner")
    phone.props["ro.product.cpu.abilist"] = "arm64-v8a"
    phone.emulator = "qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu cortex-a76"
    (found,) = json.loads(run(*words(bundle, program)))["results"]
    assert found["golden"]["status"] == "identical" and found["source"] == "loopback"


def test_what_is_there_is_not_pushed_again(run, phone, bundle, runner):
    run(*words(bundle, runner))
    first = list(phone.pushed)
    run(*words(bundle, runner))
    again = phone.pushed[len(first) :]
    assert sum(".part" in path for path in first) == 2 and not any(".part" in path for path in again)


def test_a_hot_phone_is_flagged(run, phone, bundle, runner):
    phone.thermal = 4
    (found,) = json.loads(run(*words(bundle, runner)))["results"]
    assert found["flags"] == ["throttled: thermal status 4"]


def test_a_phone_that_goes_away_in_the_middle(run, phone, bundle, runner):
    phone.cut_at = "num_executions 1;"
    with pytest.raises(Failed) as failed:
        run(*words(bundle, runner, "--serial", phone.serial))
    assert failed.value.code == 2 and "Traceback" not in failed.value.said and "->" in failed.value.said
    assert not list((bundle / RESULTS).glob("*.json"))


def test_a_file_that_arrives_damaged_is_not_run(phone, bundle, runner):
    phone.spoil = True
    with pytest.raises(BackendFailed, match="arrived damaged"):
        adb.bench(load_bundle(bundle), runner, phone.serial)
    assert not any("num_executions" in command for command in phone.commands)


def test_a_runner_that_fails_is_quoted(phone, bundle, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot open shared object >&2\nexit 3\n")
    with pytest.raises(BackendFailed, match="exit code 3"):
        adb.bench(load_bundle(bundle), broken, phone.serial)
    assert not list((phone.folder / "files" / "edgeforge").glob("run-*"))


def test_a_program_for_another_machine_is_refused_before_it_is_pushed(run, phone, bundle, tmp_path):
    elf = tmp_path / "runner"
    elf.write_bytes(b"\x7fELF\x01" + bytes(13) + (0x28).to_bytes(2, "little") + bytes(40))
    with pytest.raises(Failed, match="built for armeabi-v7a"):
        run(*words(bundle, elf))
    assert phone.pushed == []


def test_the_phone_is_named_when_there_are_several_or_none(run, phone, server, bundle, runner, tmp_path):
    with pytest.raises(Failed, match="not connected"):
        run(*words(bundle, runner, "--serial", "R5CT"))
    (tmp_path / "other").mkdir()
    other = Phone(tmp_path / "other")
    client = adbutils.AdbClient()
    client.connect(other.serial, timeout=10)
    client.wait_for(other.serial, timeout=10)
    with pytest.raises(Failed, match="2 phones are ready"):
        run(*words(bundle, runner))
    client.disconnect(other.serial)
    other.close()
    client.disconnect(phone.serial)
    with pytest.raises(Failed, match="connect a phone"):
        run(*words(bundle, runner))


@pytest.mark.parametrize(
    ("serial", "props", "source"),
    [
        ("R5CT1234", {}, "device-usb"), ("192.168.1.20:5555", {}, "device-usb"), ("emulator-5554", {}, "emulated"),
        ("R5CT1234", {"ro.boot.qemu": "1"}, "emulated"), ("localhost:5555", {}, "loopback"),
        ("[::1]:5555", {}, "loopback"),
    ],
)  # fmt: skip
def test_only_phones_count_as_phones(serial, props, source):
    class Device:
        """A device as adbutils gives it, as far as `read_phone` asks."""

        def __init__(self) -> None:
            self.serial = serial

        def shell2(self, command: str, timeout: float = 0):
            listed = "".join(
                f"[{name}]: [{value}]\n" for name, value in {"ro.product.model": "<b>X</b>", **props}.items()
            )
            return adbutils.ShellReturn(command=command, returncode=0, output=listed)

    found = adb.read_phone(Device())
    assert found.source == source and found.name == "b X /b"


def test_a_runner_that_logs_only_the_sum_gives_one_sample():
    log = "I 00:00:00.1 executor_runner.cpp:430] Model executed successfully 10 time(s) in 25.000000 ms."
    assert adb.timings(log, 2) == ((2500.0,), None)
    with pytest.raises(BackendFailed, match="executor_runner"):
        adb.timings("hello", 0)
