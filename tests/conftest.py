"""What several files of tests use: the command line in this process, and one small bundle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgeforge import cli


class Failed(Exception):
    """The command's exit code and what it said."""

    def __init__(self, code: int, said: str):
        self.code, self.said = code, said
        super().__init__(said)


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
