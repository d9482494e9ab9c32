"""executorch_xnnpack: a ``.pte`` for phone CPUs, int8 in and out, run here by the ExecuTorch runtime."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge.backends import Artifact, Codes, Edit
from edgeforge.errors import BackendFailed, Reason
from edgeforge.ir.graph import Graph
from edgeforge.target import Target

MODEL = "model.pte"
VERSION = "1.5.1"


class ExecutorchXnnpack:
    name = "executorch_xnnpack"
    numerics = "xnnpack"
    summary = "ExecuTorch program with XNNPACK's int8 kernels"

    def missing(self) -> str:
        try:
            found = importlib.metadata.version("executorch")
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        return (
            ""
            if found == VERSION
            else f"executorch {VERSION} is needed, found {found} -> pip install 'edgeforge[executorch]'"
        )

    cannot_run = missing

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        """XNNPACK has 8-bit activations and per-channel weights only."""
        reasons = []
        for node in graph.nodes:
            where = node.source or node.output
            wide = {graph.type(name).dtype for name in (*node.inputs, node.output)} & {"u16", "i64"}
            if wide:
                reasons.append(
                    Reason(where, node.op, f"{', '.join(wide)} tensors do not lower to XNNPACK", "export at w8a8")
                )
            if any((q := graph.type(name).q) is not None and q.block for name in node.inputs):
                reasons.append(Reason(where, node.op, "block-wise weights do not lower to XNNPACK", "export at w4a8"))
        return reasons

    def compile(self, graph: Graph, target: Target, folder: Path) -> Artifact:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from torch.export import export

        from edgeforge.dialects.pt2e import SignedModule, example_inputs

        program = export(SignedModule(graph).eval(), example_inputs(graph), strict=False)
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
        )
        calls = [str(n.target) for n in edge.exported_program().graph_module.graph.nodes if n.op == "call_function"]
        islands = tuple(c for c in calls if "getitem" not in c and "executorch_call_delegate" not in c)
        (folder / MODEL).write_bytes(edge.to_executorch().buffer)
        # A graph can lower and then fail at load: run it once.
        self.run(folder, graph, target, {n: np.zeros(graph.type(n).shape, np.uint8) for n in graph.inputs})
        edits = (
            Edit("activations", "codes - 128, int8", "XNNPACK computes on signed codes; the real values are the same"),
            Edit("biases", "float32 constants", "XNNPACK takes its biases as floats"),
        )
        return Artifact((MODEL,), edits=edits, islands=islands)

    def run(self, folder: Path, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        from executorch.runtime import Runtime

        from edgeforge.dialects.pt2e import OFFSET, signed

        try:
            # The program must outlive its method: the runtime keeps no reference.
            program = Runtime.get().load_program((folder / MODEL).read_bytes())
            method = program.load_method("forward")
        except RuntimeError as error:
            raise BackendFailed(f"executorch_xnnpack: {folder / MODEL} does not load: {error}") from None
        count = len(next(iter(feeds.values())))
        rows: list[list[Any]] = []
        for i in range(count):
            results = method.execute([signed(feeds[name][i : i + 1]) for name in graph.inputs])
            rows.append([(r.numpy().astype(np.int16) + OFFSET).astype(np.uint8) for r in results])
        return {name: np.concatenate([row[k] for row in rows]) for k, name in enumerate(graph.outputs)}


BACKEND = ExecutorchXnnpack()
