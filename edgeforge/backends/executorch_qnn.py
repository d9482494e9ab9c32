"""executorch_qnn: a ``.pte`` whose QNN delegate holds a context binary for the target's Hexagon; here on the emulator.

Codes in and codes out, as ort_qnn. ExecuTorch looks for Qualcomm's SDK; the libraries that onnxruntime-qnn brings serve
as well, from a folder of links that lives as long as the child process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge.backends import HTP_EMULATOR, Artifact, Codes, Edit, Step, _htp, apart
from edgeforge.backends._child import in_child, run_in_child, save_arrays, served
from edgeforge.backends._contexts import NOT_SHARED, constant_bytes, too_large
from edgeforge.backends._executorch import MODEL, method_in, no_transposed, wrong_executorch
from edgeforge.backends.ort_qnn import BACKEND as ORT_QNN
from edgeforge.errors import Reason
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.text import print_graph, tensors
from edgeforge.sim.evaluate import check_feeds
from edgeforge.target import Target

SHARED = "model_shared.pte"
WORKER = "edgeforge.backends._executorch_qnn_worker"


class ExecutorchQnn:
    name = "executorch_qnn"
    numerics = ""
    source, timed, dynamic = HTP_EMULATOR, False, False
    summary = "ExecuTorch program with a context binary for the Hexagon NPU; runs on Qualcomm's HTP emulator"

    def missing(self) -> str:
        return wrong_executorch() or ORT_QNN.missing()

    cannot_run = missing

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        transposed = [no_transposed(node) for node in graph.nodes if node.op == "conv_transpose2d"]
        return too_large(graph, target) + _htp.refusals(graph, target) + transposed

    def prepare(self, graph: Graph, target: Target) -> tuple[Graph, tuple[Edit, ...]]:
        """The graph in the forms that ExecuTorch's lowering and HTP take, and what was changed."""
        prepared, edits = _htp.prepare(graph, target)
        ids = [name for name in graph.inputs if graph.type(name).q is None]
        why = "HTP has no 64-bit integers"
        edits += tuple(Edit(name, "the program takes int32 ids", why) for name in ids)
        prepared, padded = _htp.rewritten(prepared, (_pads,))
        return prepared, edits + padded

    def compile(self, graph: Graph, target: Target, folder: Path) -> Artifact:
        return self.compile_together({"": graph}, target, folder, False)

    def compile_together(self, graphs: Mapping[str, Graph], target: Target, folder: Path, shared: bool) -> Artifact:
        """One program with a method of each graph's part, all in one context; a program each where that cannot hold
        them. ``shared``: another that holds their weights once."""
        most = target.context_bytes
        if len(graphs) > 1 and most is not None and sum(map(constant_bytes, graphs.values())) > most:
            made = apart(self, graphs, target, folder)
            return replace(made, notes=(*made.notes, NOT_SHARED)) if shared else made
        assert target.soc is not None
        forms = {part: self.prepare(graph, target) for part, graph in graphs.items()}
        programs = {MODEL: False, SHARED: True} if shared else {MODEL: False}
        with tempfile.TemporaryDirectory(prefix="edgeforge-") as place, qnn_sdk() as environment:
            files = {}
            for part, (prepared, _) in forms.items():
                named = {"graph": f"{place}/{part}.txt", "arrays": f"{place}/{part}.npz"}
                Path(named["graph"]).write_text(print_graph(prepared))
                save_arrays(named["arrays"], tensors(prepared))
                files[part or "forward"] = named
            request = {"action": "compile", "soc": target.soc.name, "graphs": files}
            for name, once in programs.items():
                pte = {"pte": str(folder / name), "shared": once}
                in_child(self.name, WORKER, {**request, **pte}, environment)
        edits = tuple(dict.fromkeys(edit for _, edits in forms.values() for edit in edits))
        notes = (f"{SHARED} {_htp.NOT_RUN}",) if shared else ()
        return Artifact(tuple(programs), options={"soc_model": target.soc.name}, edits=edits, notes=notes)

    def run(self, folder: Path, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        check_feeds(graph, feeds)  # the runtime answers a wrong dtype with a segmentation fault
        sizes = {name: graph.type(name).shape[0] for name in graph.inputs}
        request = {"action": "run", "sizes": sizes, **_program(folder, graph)}
        with qnn_sdk() as environment:
            return run_in_child(self.name, WORKER, request, feeds, environment)

    @contextmanager
    def opened(self, folder: Path, graph: Graph, target: Target, threads: int | None = None) -> Iterator[Step]:
        request = {"action": "serve", **_program(folder, graph)}
        with qnn_sdk() as environment, served(self.name, WORKER, request, environment) as answer:

            def step(feeds: Codes) -> Mapping[str, np.ndarray]:
                check_feeds(graph, feeds)
                return answer(feeds)

            yield step


def _program(folder: Path, graph: Graph) -> dict[str, Any]:
    file, method = method_in(folder)
    return {"pte": str(file), "method": method, "inputs": list(graph.inputs), "results": list(graph.outputs)}


def _pads(e: _htp.Editor, node: Node) -> None:
    """Convolutions with uneven pads, and padded averages: torch pads so with an operation of its own."""
    pads = node.attrs.get("pads", (0, 0, 0, 0))
    if (node.op == "conv2d" and pads[:2] != pads[2:]) or (node.op == "avg_pool" and any(pads)):
        _htp.pad_apart(e, node, "each operation needs an encoded result")
    else:
        e.put(node)


@contextmanager
def qnn_sdk() -> Iterator[dict[str, str]]:
    """An environment in which ExecuTorch finds a QNN SDK: a folder of links to onnxruntime-qnn's libraries."""
    spec = importlib.util.find_spec("onnxruntime_qnn")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    with tempfile.TemporaryDirectory(prefix="edgeforge-qnn-") as root:
        libraries = Path(root) / "lib" / "x86_64-linux-clang"
        libraries.mkdir(parents=True)
        for library in (*package.glob("libQnn*.so"), package / "libHtpPrepare.so"):
            (libraries / library.name).symlink_to(library)
        paths = (str(libraries), f"{package}.libs", os.environ.get("LD_LIBRARY_PATH", ""))
        yield {**os.environ, "QNN_SDK_ROOT": root, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}


BACKEND = ExecutorchQnn()
