"""tosa: a TOSA flatbuffer, made and run by the programs of Arm's package ``tosa-tools``. Its Python parts are not used:
they want other versions of what EdgeForge needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgeforge.backends import Artifact, Codes, Step
from edgeforge.backends._child import TIMEOUT_S, in_batches
from edgeforge.backends._log import new_log, telling_lines
from edgeforge.dialects.tosa import from_stored, refusals, to_stored, to_tosa
from edgeforge.errors import BackendFailed, Reason
from edgeforge.ir.graph import Graph
from edgeforge.quantize.convert import with_profile
from edgeforge.target import Target

MODEL = "model.tosa"
VERSION = "2026.8.0"
PLACE = "EDGEFORGE_TOSA"
#: What is used of the package: compiler of flatbuffers, their schema, and the model.
FLATC, SCHEMA, RUNNER = "flatc", "tosa.fbs", "tosa_reference_model"


def tools() -> Path | None:
    """The folder that holds `FLATC`, `SCHEMA` and `RUNNER`: the one that EDGEFORGE_TOSA names, or the package's."""
    places = [Path(os.environ[PLACE])] if PLACE in os.environ else []
    for package in importlib.metadata.distributions(name="tosa-tools"):
        places.append(Path(str(package.locate_file("bin"))))
    complete = (place for place in places if all((place / name).is_file() for name in (FLATC, SCHEMA, RUNNER)))
    return next(complete, None)


class Tosa:
    name = "tosa"
    numerics = "tosa"
    source, timed, dynamic = "emulated (Arm's reference model)", False, False
    summary = "TOSA 1.0 flatbuffer, run by Arm's reference model"

    def missing(self) -> str:
        if tools() is not None:
            return ""
        install = f"pip install --no-deps --target DIR tosa-tools=={VERSION}; set PYTHONPATH=DIR, or {PLACE}=DIR/bin"
        return f"the reference model of TOSA is not found -> {install}"

    cannot_run = missing

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        return refusals(with_profile(graph, self.numerics))

    def compile(self, graph: Graph, target: Target, folder: Path) -> Artifact:
        with tempfile.TemporaryDirectory(prefix="edgeforge-") as place:
            source = Path(place) / Path(MODEL).with_suffix(".json")
            source.write_text(json.dumps(to_tosa(with_profile(graph, self.numerics))))
            self.call(FLATC, ["--binary", "-o", str(folder), str(_tool(SCHEMA)), str(source)])
        return Artifact((MODEL,))

    def run(self, folder: Path, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        sizes = {name: graph.type(name).shape[0] for name in graph.inputs}
        with self.opened(folder, graph, target) as step:
            return in_batches(step, sizes, feeds)

    @contextmanager
    def opened(self, folder: Path, graph: Graph, target: Target, threads: int | None = None) -> Iterator[Step]:
        """The model reads its files anew for every run."""
        with tempfile.TemporaryDirectory(prefix="edgeforge-") as place:
            files = {name: f"{i}.npy" for i, name in enumerate((*graph.inputs, *graph.outputs))}
            description = Path(place) / "desc.json"
            description.write_text(json.dumps(_description(folder / MODEL, graph, files)))

            def step(feeds: Codes) -> dict[str, np.ndarray]:
                for name in graph.inputs:
                    np.save(Path(place) / files[name], to_stored(feeds[name], graph.type(name).dtype))
                self.call(RUNNER, ["--operator_fbs", str(_tool(SCHEMA)), "--test_desc", str(description)])
                results = {name: np.load(Path(place) / files[name]) for name in graph.outputs}
                return {name: from_stored(stored, graph.type(name).dtype) for name, stored in results.items()}

            yield step

    def call(self, tool: str, arguments: Sequence[str]) -> None:
        """Run a tool of the package. Raises BackendFailed with the telling lines of its log."""
        command = [str(_tool(tool)), *arguments]
        with new_log(self.name) as log, log.open("ab") as stream:
            try:
                code = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=TIMEOUT_S
                ).returncode
            except subprocess.TimeoutExpired:
                raise BackendFailed(f"{self.name}: no result of {tool} after {TIMEOUT_S} s; log: {log}") from None
            if code:
                lines = telling_lines(log)
                raise BackendFailed(f"{self.name}: {tool} failed (exit code {code}); log: {log}\n{lines}")


def _tool(name: str) -> Path:
    folder = tools()
    assert folder is not None, "`missing` is asked first"
    return folder / name


def _description(model: Path, graph: Graph, files: dict[str, str]) -> dict[str, object]:
    """What the reference model reads: its graph, and the .npy file of every input and output."""
    return {
        "tosa_file": str(model.resolve()),
        "ifm_name": list(graph.inputs),
        "ifm_file": [files[name] for name in graph.inputs],
        "ofm_name": list(graph.outputs),
        "ofm_file": [files[name] for name in graph.outputs],
        "expected_failure": False,
    }


BACKEND = Tosa()
