"""What several files of tests use: the command line in this process, and one small bundle."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from adb_device import Phone

from edgeforge import cli


class Failed(Exception):
    """The command's exit code and what it said."""

    def __init__(self, code: int, said: str):
        self.code, self.said = code, said
        super().__init__(said)


def another_network(file: Path) -> None:
    """Change some of the largest weights of an ONNX model."""
    from onnx import load, numpy_helper, save

    model = load(file)
    weight = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    changed = numpy_helper.to_array(weight).copy()
    changed[0] = 127
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    save(model, file)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; gives stdout, raises Failed for any other exit code than 0."""

    def command(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["edgeforge", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, said = capsys.readouterr()
        if done.value.code:
            raise Failed(done.value.code, said)
        return out

    return command


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A bundle of the digits model for two backends."""
    from edgeforge.pipeline import export

    out = tmp_path_factory.mktemp("bundles") / "digits"
    export("digits", "snapdragon-8-gen-3", out, "embedded", backend_names=("simulator", "onnx_qdq"))
    return out


@pytest.fixture(scope="module")
def adb_server():
    """An adb server of our own, on a free port."""
    adbutils = pytest.importorskip("adbutils", reason="pip install 'edgeforge[adb]'")
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
def phone(adb_server, tmp_path):
    """A phone on that server's cable: a stand-in that speaks adb's wire protocol."""
    import adbutils

    (tmp_path / "phone").mkdir()
    made = Phone(tmp_path / "phone")
    client = adbutils.AdbClient()
    assert "connected to" in client.connect(made.serial, timeout=10)
    client.wait_for(made.serial, timeout=10)
    yield made
    client.disconnect(made.serial)
    made.close()
