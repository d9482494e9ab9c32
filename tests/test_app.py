"""The demo app's benchmark by intent: the real adb server, a stand-in for phone and `am`, and the app's own Java code
where a JDK and ONNX Runtime's jar are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Failed, another_network

pytest.importorskip("adbutils", reason="pip install 'edgeforge[adb]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgeforge[onnx]'")

from edgeforge.bundle import load_bundle
from edgeforge.devices import app
from edgeforge.devices.result import parse_result
from edgeforge.errors import BackendFailed

DEMO = Path(__file__).parents[1] / "android_demo"
#: ONNX Runtime's jar for desktops (com.microsoft.onnxruntime:onnxruntime): with it the app's Java runs the model.
JAR = os.environ.get("EDGEFORGE_ONNXRUNTIME_JAR", "")
QUICK = app.Patience(poll_s=0.05, silence_s=20)


def compiled(place: Path, sources: list[Path], path: str = "") -> Path:
    """Java sources as classes, as an app's tools compile them: Java 8, every warning an error."""
    if shutil.which("javac") is None or not DEMO.is_dir():
        pytest.skip("no JDK, or tests run without a checkout")
    options = ["--release", "8", "-Xlint:all,-try,-options", "-Werror", "-d", place]
    subprocess.run(["javac", *options, *(["-cp", path] if path else []), *sources], check=True)
    return place


@pytest.fixture(scope="module", params=["python", "java"])
def program(request, tmp_path_factory):
    """What runs when the app is started: tests/benchmark_app.py, or the app's own code on this machine's JVM."""
    if request.param == "python":
        return f"{sys.executable} {Path(__file__).with_name('benchmark_app.py')}"
    if not JAR:
        pytest.skip("EDGEFORGE_ONNXRUNTIME_JAR names no jar")
    sources = [*DEMO.glob("core/**/*.java"), *DEMO.glob("host/**/*.java")]
    classes = compiled(tmp_path_factory.mktemp("classes"), sources, JAR)
    return f"java -cp {classes}:{JAR} org.edgeforge.demo.host.Main"


@pytest.fixture
def bundle(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_RESULTS", str(tmp_path / "results.sqlite"))
    return Path(shutil.copytree(digits, tmp_path / "bundle"))


def install(phone, program: str) -> None:
    """pm, am and pidof of a phone on which the app is installed; its arguments: its folder, the request's name."""
    home, running = phone.local(app.HOME), phone.folder / "running"
    start = f"touch {running}; ({program} {home} $8; rm -f {running}) >{phone.folder}/app.log 2>&1 &"
    phone.install("pm", "echo package:/data/app/base.apk\n")
    phone.install("pidof", f"cat {running}\n")
    phone.install("am", f'echo "Starting: Intent {{ cmp=$5 }}"\nmkdir -p {home}\nif [ -n "$8" ]; then {start} fi\n')


def script(folder: Path, text: str) -> str:
    """A program in place of the app."""
    (folder / "program").write_text(text)
    return f"sh {folder / 'program'}"


def left(phone) -> list[str]:
    """Files in the app's folder but for those kept by content."""
    home = phone.local(app.HOME)
    return [str(f.relative_to(home)) for f in home.rglob("*") if f.is_file() and f.parent.name != "content"]


def test_the_app_computes_the_golden_integers_and_is_left_clean(run, phone, bundle, program):
    install(phone, program)
    asked = ("bench", bundle, "--on", "adb", "--runner", "app", "--repeats", 7, "--warmup", 2, "--json")
    (found,) = json.loads(run(*asked))["results"]
    assert found["golden"] == {"status": "identical", "identical": 1.0, "max_lsb": 0, "where": ""}
    assert found["source"] == "loopback" and found["artifact"] == "onnx_qdq" and found["flags"] == []
    assert len(found["latency_us"]) == 7 and min(found["latency_us"]) > 0 and found["load_ms"] > 0
    assert found["runtime"]["versions"]["exported with onnx"]
    assert left(phone) == []
    first = len(phone.pushed)
    run(*asked)
    assert not any(".part" in path for path in phone.pushed[first:])  # the model was there
    assert len(list((bundle / "results").glob("*.json"))) == 2


def test_integers_that_depart_are_found_here_whatever_the_app_says(phone, bundle, program, tmp_path):
    """An app that runs another model: its own comparison fails, and so does ours; one that lies about it is refused."""
    opened = load_bundle(bundle)
    another_network(opened.artifact("onnx_qdq") / "model.onnx")
    install(phone, program)
    found = app.bench(opened, repeats=2, warmup=0, patience=QUICK)
    assert found.golden.status == "differs" and found.flags == ("golden vectors differ",)
    assert "instead of" in found.golden.where
    lie = "cp -r requests/$2 requests/other; {program} . other; sed -i s/differs/identical/ results/other/result.json"
    install(phone, script(tmp_path, f"cd $1; {lie}; mv results/other results/$2".replace("{program}", program)))
    with pytest.raises(BackendFailed, match="the app says that golden vectors are 'identical', its outputs are 'diff"):
        app.bench(opened, repeats=2, warmup=0, patience=QUICK)


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("mkdir -p $1/results/$2; echo OrtException: no >$1/results/$2/error.txt; sleep 1", "OrtException: no"),
        ("true", "ended without a result"),
        ("sleep 5", "made no progress for 1.5 s"),
        ("mkdir -p $1/results/$2; echo {} >$1/results/$2/result.json", "No such file"),
    ],
)
def test_an_app_that_fails_ends_or_hangs_is_told_apart(phone, bundle, tmp_path, does, why):
    install(phone, script(tmp_path, does))
    with pytest.raises(BackendFailed, match=why):
        app.bench(load_bundle(bundle), patience=app.Patience(poll_s=0.05, silence_s=1.5))
    assert left(phone) == []


def test_without_the_app_or_its_artifact_the_remedy_is_named(run, phone, bundle):
    phone.install("pm", "exit 1\n")
    asked = ("bench", bundle, "--on", "adb", "--runner", "app")
    with pytest.raises(Failed, match="is not installed on"):
        run(*asked)
    with pytest.raises(Failed, match="the app runs onnx_qdq"):
        run(*asked, "--backend", "simulator")
    phone.props["ro.soc.model"] = ""
    with pytest.raises(Failed, match="--any-chip"):
        run(*asked)
    assert phone.pushed == []


def test_an_activity_that_does_not_start_is_quoted(phone, bundle):
    install(phone, "true")
    phone.install("am", "echo 'Error: Activity class does not exist.'\n")
    with pytest.raises(BackendFailed, match="Activity class does not exist"):
        app.bench(load_bundle(bundle), patience=QUICK)


def test_the_core_of_the_app_writes_results_that_are_read_here(tmp_path):
    """Compiled without Android and without a runtime; an engine of the test gives known outputs, one of them wrong."""
    sources = [f for f in DEMO.glob("core/**/*.java") if f.name != "OrtEngine.java"]
    classes = compiled(tmp_path / "classes", [*sources, Path(__file__).with_name("CoreTest.java")])
    done = subprocess.run(["java", "-ea", "-cp", classes, "CoreTest", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = parse_result((tmp_path / "results" / "good" / "result.json").read_bytes(), "good")
    assert found.source == "device-app" and found.device.name == 'b "Phone" é  /b' and found.conditions.charging is None
    assert found.golden.model_dump() == {
        "status": "differs", "identical": 11 / 12, "max_lsb": 3, "where": "y[3, 1]: 65533 instead of 65530",
    }  # fmt: skip
    assert len(found.latency_us) == 4 and found.flags == ("golden vectors differ", "throttled: thermal status 2")
    assert not list((tmp_path / "results").rglob(".*"))
    for name, why in (("absent", "NoSuchFile"), ("short", "has 1 bytes, x 4"), ("path", "letters, digits")):
        assert why in (tmp_path / "results" / name / "error.txt").read_text()
