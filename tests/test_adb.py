"""A phone on a cable: the real adb server and the real ExecuTorch runtime, a stand-in for the phone between them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Failed

adbutils = pytest.importorskip("adbutils", reason="pip install 'edgeforge[adb]'")
pytest.importorskip("executorch", reason="pip install 'edgeforge[executorch]'")

from adb_device import Phone  # noqa: E402

from edgeforge.bundle import load_bundle  # noqa: E402
from edgeforge.devices import adb, runners  # noqa: E402
from edgeforge.devices.store import RESULTS  # noqa: E402
from edgeforge.errors import BackendFailed  # noqa: E402
from edgeforge.target import load_target  # noqa: E402

SOURCE = Path(__file__).with_name("executor_runner.cpp")
LIBRARIES = ("", "_backend_xnnpack", "_kernels_optimized", "_kernels_quantized", "_threadpool")
#: An unpacked wheel of ExecuTorch for aarch64: with it, a cross compiler and qemu the Arm side is run as well.
ARM = os.environ.get("EDGEFORGE_AARCH64_EXECUTORCH", "")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from edgeforge.pipeline import export

    out = tmp_path_factory.mktemp("adb") / "digits"
    names = ("simulator", "executorch_xnnpack")
    export("digits", "snapdragon-8-gen-3", out, "embedded", backend_names=names)
    return out


@pytest.fixture(scope="module")
def for_the_npu(tmp_path_factory):
    """A bundle with the programs for Hexagon and for ONNX Runtime."""
    from edgeforge import backends
    from edgeforge.pipeline import export

    if why := backends.backend("executorch_qnn").missing():
        pytest.skip(why)
    out = tmp_path_factory.mktemp("adb") / "digits"
    export("digits", "snapdragon-8-gen-3", out, "embedded", backend_names=("executorch_qnn", "onnx_qdq"))
    return out


@pytest.fixture
def npu_bundle(for_the_npu, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_RESULTS", str(tmp_path / "results.sqlite"))
    return Path(shutil.copytree(for_the_npu, tmp_path / "npu"))


def script(folder: Path, name: str) -> Path:
    """tests/<name>.py as a program of that name."""
    program = folder / name
    program.write_text(f"#!{sys.executable}\n{Path(__file__).with_name(f'{name}.py').read_text()}")
    return program


@pytest.fixture
def libraries(tmp_path):
    """What of Qualcomm's libraries the emulator needs, and one that the NPU would load."""
    from edgeforge.backends.executorch_qnn import qnn_sdk

    made = tmp_path / "libraries"
    made.mkdir()
    with qnn_sdk() as environment:
        first, second = map(Path, environment["LD_LIBRARY_PATH"].split(":")[:2])
        for file in (first / "libQnnHtp.so", first / "libQnnSystem.so", *second.iterdir()):
            shutil.copy(file, made / file.name)
    (made / "libQnnHtpV75Skel.so").write_bytes(elf(0xA4))
    return made


def elf(machine: int) -> bytes:
    return b"\x7fELF\x01" + bytes(13) + machine.to_bytes(2, "little") + bytes(40)


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


@pytest.mark.parametrize("moment", ["num_executions 1;", "num_executions 8;", "sha256sum", "rm -rf"])
def test_a_phone_that_goes_away_in_the_middle(run, phone, bundle, runner, moment):
    phone.cut_at = moment
    with pytest.raises(Failed) as failed:
        run(*words(bundle, runner, "--serial", phone.serial))
    assert failed.value.code == 2 and "Traceback" not in failed.value.said and "->" in failed.value.said
    assert not list((bundle / RESULTS).glob("*.json"))


def test_a_file_that_arrives_damaged_is_not_run(phone, bundle, runner):
    phone.spoil = True
    with pytest.raises(BackendFailed, match="arrived damaged"):
        adb.bench(load_bundle(bundle), runner, phone.serial)
    assert not any("num_executions" in command for command in phone.commands)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo cannot open shared object >&2; exit 3", r"exit code 3(.|\n)*cannot open shared object"),
        ("kill -SEGV $$", "killed by signal 11"),
    ],
)
def test_a_runner_that_gives_up_is_quoted_and_one_that_crashes_is_told_from_it(phone, bundle, tmp_path, script, said):
    broken = tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(BackendFailed, match=said):
        adb.bench(load_bundle(bundle), broken, phone.serial)
    assert not list((phone.folder / "files" / "edgeforge").glob("run-*"))


def test_what_an_interrupted_run_left_is_removed_a_day_later(run, phone, bundle, runner):
    place = phone.folder / "files" / "edgeforge"
    for name, age in (("run-old", 3 * 86400), ("run-young", 60)):
        (place / name).mkdir(parents=True)
        os.utime(place / name, (time.time() - age,) * 2)
    run(*words(bundle, runner))
    assert [found.name for found in place.glob("run-*")] == ["run-young"]


def test_the_npu_program_runs_with_the_libraries_that_are_named(run, phone, npu_bundle, libraries, tmp_path):
    program = script(tmp_path, "qnn_executor_runner")
    asked = words(npu_bundle, program, "--libraries", libraries)
    (found,) = json.loads(run(*asked))["results"]
    assert found["artifact"] == "executorch_qnn" and found["notes"] == []
    assert found["golden"] == {"status": "identical", "identical": 1.0, "max_lsb": 0, "where": ""}
    assert len(found["latency_us"]) == 6 and min(found["latency_us"]) > 0 and found["conditions"]["threads"] is None
    (command,) = [command for command in phone.commands if "--model_path" in command]
    place = re.search(r"cd (\S+)", command)[1]
    assert f"LD_LIBRARY_PATH={place} ADSP_LIBRARY_PATH={place} " in command
    assert not list((phone.folder / "files" / "edgeforge").glob("run-*"))
    first = len(phone.pushed)
    run(*asked)
    assert not any(".part" in path for path in phone.pushed[first:])


def test_the_npu_program_is_refused_without_its_libraries(run, phone, npu_bundle, libraries, tmp_path):
    program = script(tmp_path, "qnn_executor_runner")
    with pytest.raises(Failed, match="--libraries"):
        run(*words(npu_bundle, program))
    (libraries / "libQnnHtpV75Stub.so").write_bytes(elf(0x28))
    with pytest.raises(Failed, match=r"V75Stub\.so is built for armeabi-v7a"):
        run(*words(npu_bundle, program, "--libraries", libraries))
    assert phone.pushed == []


def test_onnxruntime_perf_test_times_and_does_not_compare(run, phone, npu_bundle, tmp_path):
    program = script(tmp_path, "onnxruntime_perf_test")
    (found,) = json.loads(run(*words(npu_bundle, program)))["results"]
    assert found["artifact"] == "onnx_qdq" and found["flags"] == ["golden vectors not checked"]
    golden = found["golden"]
    assert golden["status"] == "not checked" and golden["where"] == "onnxruntime_perf_test keeps no outputs to compare"
    assert len(found["latency_us"]) == 6 and found["load_ms"] > 0 and found["peak_memory_mb"] > 10


@pytest.mark.parametrize(
    ("chip", "why"),
    [
        ("SM8550", "the bundle is for SM8650, the phone has SM8550"),
        ("", "the bundle is for SM8650, the phone does not say what it has"),
    ],
)
def test_a_phone_with_another_chip_or_none_is_refused_unless_that_is_asked_for(run, phone, bundle, runner, chip, why):
    phone.props |= {"ro.soc.model": chip, "ro.product.cpu.abilist": "x86_64,arm64-v8a"}
    with pytest.raises(Failed, match=f"{why} -> export with --target {chip or 'CHIP'}, .* --any-chip") as failed:
        run(*words(bundle, runner))
    assert failed.value.code == 2 and phone.pushed == [] and not (bundle / RESULTS).exists()
    (found,) = json.loads(run(*words(bundle, runner, "--any-chip")))["results"]
    assert found["conditions"]["other_chip"] == why and found["flags"] == [why]
    assert found["notes"] == ["the target's ABI is arm64-v8a, the phone's x86_64"]
    assert found["device"]["soc"] == chip and found["golden"]["status"] == "identical"


def test_a_bundle_for_no_chip_in_particular_runs_on_any_phone(phone):
    found = adb.read_phone(adbutils.AdbClient().device(phone.serial))
    assert adb.other_chip(found, load_target("arm64-xnnpack"), allowed=False) == ""
    assert adb.other_chip(found, load_target("snapdragon-8-gen-3"), allowed=False) == ""


def test_the_artifact_is_the_runners_or_the_one_that_is_named(run, phone, bundle, runner, tmp_path):
    with pytest.raises(Failed, match="no onnx_qdq program"):
        run(*words(bundle, script(tmp_path, "onnxruntime_perf_test")))
    with pytest.raises(Failed, match="no runner for ort_qnn"):
        run(*words(bundle, runner, "--backend", "ort_qnn"))
    with pytest.raises(Failed, match="one --backend"):
        run(*words(bundle, runner, "--backend", "onnx_qdq", "--backend", "executorch_xnnpack"))
    renamed = Path(shutil.copy(runner, tmp_path / "my_qnn_tool"))
    (found,) = json.loads(run(*words(bundle, renamed, "--backend", "executorch_xnnpack")))["results"]
    assert found["golden"]["status"] == "identical"


def test_a_program_for_another_machine_is_refused_before_it_is_pushed(run, phone, bundle, tmp_path):
    program = tmp_path / "runner"
    program.write_bytes(elf(0x28))
    with pytest.raises(Failed, match="built for armeabi-v7a"):
        run(*words(bundle, program))
    assert phone.pushed == []


def test_the_phone_is_named_when_there_are_several_or_none(run, phone, bundle, runner, tmp_path):
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
    assert runners.executor_times(log, 2) == ((2500.0,), None)
    with pytest.raises(BackendFailed, match="executor_runner"):
        runners.executor_times("hello", 0)


def test_logs_of_qnn_and_perf_test_are_cut_to_the_timed_inferences():
    log = "".join(f"1 inference took {ms}.0 ms, avg {ms}.0 ms\n" for ms in (9, 8, 1, 2)) + "4 inference took 20.0 ms\n"
    assert runners.qnn_times(log, 1, 1, 2) == (1000.0, 2000.0)
    with pytest.raises(BackendFailed, match="qnn_executor_runner"):
        runners.qnn_times(log, 1, 1, 3)
    table = "model,0.009,2000000,12,0\nmodel,1e-03,2000000,12,1\n"
    assert runners.perf_times(table, 1, 1) == ((1000.0,), 2.0)
    with pytest.raises(BackendFailed, match="onnxruntime_perf_test"):
        runners.perf_times(table, 1, 2)
