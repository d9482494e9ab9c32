"""ort_qnn: Qualcomm's HTP through ONNX Runtime's QNN execution provider; here on the emulator that comes with it.

The artifact is the QDQ model and what Qualcomm's compiler made of it: an EPContext model that names a context binary
for the target's chipset; several of each where one context cannot hold the weights."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgeforge.backends import HTP_EMULATOR, Artifact, Codes, Edit, Step, _htp, apart
from edgeforge.backends._child import in_batches, in_child, run_in_child, served
from edgeforge.backends._contexts import NOT_SHARED, split, too_large
from edgeforge.errors import BackendFailed, Reason
from edgeforge.ir.graph import Graph
from edgeforge.target import Target

MODEL, CONTEXT, SHARED = "model.onnx", "model_ctx.onnx", "shared"
WORKER = "edgeforge.backends._qnn_worker"

#: The one release whose libraries serve ONNX Runtime and ExecuTorch alike (QNN 2.49).
VERSION = "2.5.0"
#: QNN_DATATYPE_FLOAT_16 and QNN_DATATYPE_FLOAT_32.
FLOATS = (0x0216, 0x0232)
OPTIONS = {"htp_graph_finalization_optimization_mode": "3"}


class OrtQnn:
    name = "ort_qnn"
    numerics = ""
    source, timed, dynamic = HTP_EMULATOR, False, False
    summary = "context binary for the Hexagon NPU; runs on Qualcomm's HTP emulator (x86-64 Linux)"

    def missing(self) -> str:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return "Qualcomm's HTP compiler and emulator come for x86-64 Linux only -> export there"
        found = {}
        for package in ("onnxruntime", "onnxruntime-qnn"):
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                return f"{package} is not installed -> pip install 'edgeforge[qnn]'"
        if found["onnxruntime-qnn"] != VERSION:
            return (
                f"onnxruntime-qnn {found['onnxruntime-qnn']} is installed, {VERSION} is needed (the release that "
                f"ExecuTorch's QNN backend works with too) -> pip install onnxruntime-qnn=={VERSION}"
            )
        return ""

    def cannot_run(self) -> str:
        return self.missing()

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        parts = split(graph, target.context_bytes).values()
        return [reason for part in parts for reason in too_large(part, target)] + _htp.refusals(graph, target)

    def prepare(self, graph: Graph, target: Target) -> tuple[Graph, tuple[Edit, ...]]:
        """The graph in the forms that HTP computes in integers, and what was changed."""
        return _htp.prepare(graph, target)

    def compile(self, graph: Graph, target: Target, folder: Path) -> Artifact:
        """Into as many contexts as hold the graph's constants, ``folder/context1`` and so on where it is not one."""
        parts = split(graph, target.context_bytes)
        if len(parts) > 1:
            made = apart(self, parts, target, folder)
            return replace(made, notes=(*made.notes, f"to be run one after another: {', '.join(parts)}"))
        assert target.soc is not None
        prepared, edits = self.prepare(graph, target)
        files = write_model(prepared, folder)
        request = {"model": str(folder / MODEL), "context": str(folder / CONTEXT), "soc": target.soc.model}
        with tempfile.TemporaryDirectory(prefix="edgeforge-") as dump:
            in_child(self.name, WORKER, {"action": "compile", **request, "options": OPTIONS, "dump": dump})
            islands = float_islands(prepared, Path(dump))
        made = sorted(path.name for path in folder.iterdir() if path.name not in files)
        if CONTEXT not in made:
            raise BackendFailed(f"{self.name}: the compiler wrote no context binary, only {made}")
        options = {**OPTIONS, "soc_model": str(target.soc.model), "session.disable_cpu_ep_fallback": "1"}
        return Artifact(files=(*files, *made), options=options, edits=edits, islands=islands)

    def compile_together(self, graphs: Mapping[str, Graph], target: Target, folder: Path, shared: bool) -> Artifact:
        """``shared``: also ``shared/<part>_ctx.onnx`` on one context binary."""
        made = apart(self, graphs, target, folder)
        if not shared:
            return made
        if any(len(split(graph, target.context_bytes)) > 1 for graph in graphs.values()):
            return replace(made, notes=(*made.notes, NOT_SHARED))
        assert target.soc is not None
        place = folder / SHARED
        place.mkdir()
        models = {str(place / f"{part}_ctx.onnx"): str(folder / part / MODEL) for part in graphs}
        request = {"action": "share", "models": models, "soc": target.soc.model, "options": OPTIONS}
        in_child(self.name, WORKER, request)
        files = sorted(f"{SHARED}/{file.name}" for file in place.iterdir())
        return replace(made, files=(*made.files, *files), notes=(*made.notes, f"{SHARED}/ {_htp.NOT_RUN}"))

    def run(self, folder: Path, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        sizes = {name: graph.type(name).shape[0] for name in graph.inputs}
        with self.opened(folder, graph, target) as step:
            return in_batches(step, sizes, feeds)

    @contextmanager
    def opened(self, folder: Path, graph: Graph, target: Target, threads: int | None = None) -> Iterator[Step]:
        assert target.soc is not None
        request = {"action": "serve", "soc": target.soc.model, "options": OPTIONS}
        with ExitStack() as stack:
            steps = []
            for place, part in split(graph, target.context_bytes).items():
                model = {"model": str(folder / place / CONTEXT)}
                steps.append((part, stack.enter_context(served(self.name, WORKER, {**request, **model}))))

            def step(feeds: Codes) -> dict[str, np.ndarray]:
                known = dict(feeds)
                for part, run in steps:
                    known |= run({name: known[name] for name in part.inputs})
                return {name: known[name] for name in graph.outputs}

            yield step

    def evaluate(self, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        """Output codes of ``graph`` without an artifact: one session compiles and runs the QDQ model."""
        assert target.soc is not None
        with tempfile.TemporaryDirectory(prefix="edgeforge-") as folder:
            write_model(self.prepare(graph, target)[0], Path(folder))
            sizes = {name: graph.type(name).shape[0] for name in graph.inputs}
            model = {"model": f"{folder}/{MODEL}", "soc": target.soc.model, "options": OPTIONS, "sizes": sizes}
            return run_in_child(self.name, WORKER, {"action": "run", **model}, feeds)


def write_model(prepared: Graph, folder: Path) -> tuple[str, ...]:
    """The QDQ model of a prepared graph, as the QNN provider reads it; the names of its files in ``folder``."""
    from edgeforge.dialects.onnx import write_onnx

    return write_onnx(prepared, folder / MODEL, two_level=True)


def float_islands(graph: Graph, dump: Path) -> tuple[str, ...]:
    """Nodes that HTP computes in float: outputs of float type in the graphs that the compiler was given (JSON)."""
    found = set()
    for file in dump.glob("*.json"):
        tensors = json.loads(file.read_text()).get("graph", {}).get("tensors", {})
        found |= {name.partition("/")[0] for name, tensor in tensors.items() if tensor["data_type"] in FLOATS}
    return tuple(node.output for node in graph.nodes if node.output in found)


BACKEND = OrtQnn()
