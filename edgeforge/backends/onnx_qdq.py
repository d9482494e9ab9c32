"""onnx_qdq: a QDQ model for ONNX Runtime's CPU kernels (and for any other reader of ONNX)."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge.backends import HOST, Artifact, Codes, Step
from edgeforge.backends._child import in_batches
from edgeforge.errors import Reason
from edgeforge.ir.graph import Graph
from edgeforge.target import Target

MODEL = "model.onnx"

#: Session options without which ONNX Runtime computes something else: it would quantize 16-bit activations to int8,
#: and let 16-bit partial sums saturate on x86 CPUs without VNNI.
OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "1", "session.x64quantprecision": "1"}


class OnnxQdq:
    name = "onnx_qdq"
    numerics = "ort-cpu"
    source, timed, dynamic = HOST, True, False
    summary = "QDQ model, opset 23, run by ONNX Runtime on the CPU"

    def missing(self) -> str:
        return ""

    def cannot_run(self) -> str:
        try:
            importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError:
            return "onnxruntime is not installed -> pip install 'edgeforge[onnx]'"
        return ""

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        return []

    def compile(self, graph: Graph, target: Target, folder: Path) -> Artifact:
        from edgeforge.dialects.onnx import write_onnx

        return Artifact(files=write_onnx(graph, folder / MODEL), options=OPTIONS)

    def run(self, folder: Path, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        sizes = {name: graph.type(name).shape[0] for name in graph.inputs}
        with self.opened(folder, graph, target) as step:
            return in_batches(step, sizes, feeds)

    @contextmanager
    def opened(self, folder: Path, graph: Graph, target: Target, threads: int | None = None) -> Iterator[Step]:
        session, outputs = self.session(folder / MODEL, threads), list(graph.outputs)
        yield lambda feeds: dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))

    def session(self, model: Path, threads: int | None = None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or min(4, os.cpu_count() or 1)
        for key, value in OPTIONS.items():
            options.add_session_config_entry(key, value)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


BACKEND = OnnxQdq()
