"""tosa: a TOSA flatbuffer, run by Arm's reference model. Both come with the package ``tosa-tools``; its Python parts are
not used (and want other versions of what EdgeForge needs)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgeforge.backends import Artifact, Codes, Step
from edgeforge.backends._child import TIMEOUT_S, in_batches
from edgeforge.backends._log import new_log, telling_lines
from edgeforge.dialects.tosa import from_stored, refusal, to_stored, to_tosa
from edgeforge.errors import BackendFailed, Reason
from edgeforge.ir.graph import Graph
from edgeforge.quantize.convert import with_profile
from edgeforge.target import Target

MODEL = "model.tosa"
PLACE = "EDGEFORGE_TOSA"
#: What is used of the package: compiler of flatbuffers, their schema, and the model.
FLATC, SCHEMA, RUNNER = "flatc", "tosa.fbs", "tosa_reference_model"


def tools() -> Path | None:
    """The folder that holds `FLATC`, `SCHEMA` and `RUNNER`: the one that EDGEFORGE_TOSA names, or the installed
    package's."""
    places = [Path(os.environ[PLACE])] if PLACE in os.environ else []
    for package in importlib.metadata.distributions(name="tosa-tools"):
        places.append(Path(str(package.locate_file("bin"))))
    if found := shutil.which(RUNNER):
        places.append(Path(found).parent)
    complete = (place for place in places if all((place / name).is_file() for name in (FLATC, SCHEMA, RUNNER)))
    return next(complete, None)


class Tosa:
    name = "tosa"
    numerics = "tosa"
    emulated = False
    summary = "TOSA 1.0 flatbuffer, run by Arm's reference model"

    def missing(self) -> str:
        if tools() is not None:
            return ""
        install = f"pip install --no-deps --target DIR tosa-tools==2026.8.0 and set {PLACE}=DIR/bin"
        return f"flatc, tosa.fbs and tosa_reference_model of tosa-tools are not found -> {install}"

    cannot_run = missing

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        rounded = with_profile(graph, self.numerics)
        reasons = []
        for node in rounded.nodes:
            if why := refusal(rounded.view(node)):
                remedy = "run it elsewhere, or express it by ops that TOSA has, at 8 bits"
                reasons.append(Reason(node.source or node.output, node.op, why, remedy))
        return reasons

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
        log = new_log(self.name)
        with log.open("ab") as stream:
            command = [str(_tool(tool)), *arguments]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=TIMEOUT_S)
        if done.returncode:
            lines = telling_lines(log)
            raise BackendFailed(f"{self.name}: {tool} failed (exit code {done.returncode}); log: {log}\n{lines}")
        log.unlink()


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
