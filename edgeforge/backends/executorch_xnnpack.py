"""executorch_xnnpack: a ``.pte`` for phone CPUs, int8 in and out, run here by the ExecuTorch runtime.

XNNPACK has no 16-bit integers, and no integer kernels for norms, softmax, products of activations and most functions:
these run in float between a dequantize and a quantize, and are listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from edgeforge.backends import HOST, Artifact, Codes, Edit, Step
from edgeforge.backends._child import in_batches
from edgeforge.backends._executorch import MODEL, method_in, no_transposed, wrong_executorch
from edgeforge.backends._log import new_log, redirected, telling_lines
from edgeforge.errors import BackendFailed, Reason
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import LAYERS, OPS
from edgeforge.ir.types import BITS, NUMPY, TensorType
from edgeforge.target import Target

#: Ops with arithmetic that XNNPACK has 8-bit kernels for.
INTEGER = {"conv2d", "linear", "add", "sub", "mul", "relu", "clip", "requantize", "reduce_mean"}


class ExecutorchXnnpack:
    name = "executorch_xnnpack"
    numerics = "xnnpack"
    source, timed, dynamic = HOST, True, True
    summary = "ExecuTorch program with XNNPACK's int8 kernels; what has none is a float island"

    def missing(self) -> str:
        return wrong_executorch()

    cannot_run = missing

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        """Graphs without any 8-bit layer (all would run in float), block-wise weights, transposed convolutions, 4-bit
        linears of an odd width."""
        layers = [node for node in graph.nodes if node.op in LAYERS]
        wide = all(graph.type(node.inputs[0]).dtype == "u16" for node in layers)
        reasons = []
        for node in layers:
            where, w = node.source or node.output, graph.type(node.inputs[1])
            assert w.q is not None
            if "dynamic" in node.attrs:
                continue
            if w.q.block is not None:
                reasons.append(Reason(where, node.op, "block-wise weights do not lower to XNNPACK", "export at w4a8"))
            elif node.op == "conv_transpose2d":
                reasons.append(no_transposed(node))
            elif node.op == "linear" and w.dtype == "i4" and w.shape[1] % 2:
                why = "XNNPACK computes 4-bit weights with an odd number of input features wrongly"
                reasons.append(Reason(where, node.op, why, "export at w8a8"))
            elif wide:
                why = "XNNPACK has no 16-bit integers, and no other layer reads 8-bit activations"
                reasons.append(Reason(where, node.op, why, f"export at w{BITS[w.dtype]}a8"))
        return reasons

    def compile(self, graph: Graph, target: Target, folder: Path) -> Artifact:
        return self.compile_together({"": graph}, target, folder, False)

    def compile_together(self, graphs: Mapping[str, Graph], target: Target, folder: Path, shared: bool) -> Artifact:
        """One program with a method of each graph's part; constants of equal bytes are in it once."""
        with _quiet(self.name):
            program = _lower({part or "forward": graph for part, graph in graphs.items()})
            with (folder / MODEL).open("wb") as stream:
                program.write_to_file(stream)
            del program
        for part, graph in graphs.items():
            # A graph can lower and then fail at load: run it once.
            first = {name: np.zeros(graph.type(name).shape, NUMPY[graph.type(name).dtype]) for name in graph.inputs}
            self.run(folder / part, graph, target, first)
        edits = tuple(dict.fromkeys(edit for graph in graphs.values() for edit in _edits(graph)))
        floats = tuple(dict.fromkeys(name for graph in graphs.values() for name in islands(graph)))
        return Artifact((MODEL,), edits=edits, islands=floats)

    def run(self, folder: Path, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        sizes = {name: graph.type(name).shape[0] for name in graph.inputs}
        with self.opened(folder, graph, target) as step:
            return in_batches(step, sizes, feeds)

    @contextmanager
    def opened(self, folder: Path, graph: Graph, target: Target, threads: int | None = None) -> Iterator[Step]:
        with _quiet(self.name):
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
            from executorch.runtime import Runtime

            if threads is not None:
                _unsafe_reset_threadpool(threads)
            # The program must outlive its method: the runtime keeps no reference.
            file, name = method_in(folder)
            program = Runtime.get().load_program(file)
            method = program.load_method(name)

        def step(piece: Codes) -> dict[str, np.ndarray]:
            # Not under `_quiet`: that takes longer than a small model, and benchmarks time this.
            try:
                results = method.execute([entering(graph.type(name), piece[name]) for name in graph.inputs])
            except RuntimeError as error:
                raise BackendFailed(f"{self.name}: {error}") from error
            named = zip(graph.outputs, results, strict=True)
            return {name: leaving(graph.type(name), y.numpy()) for name, y in named}

        yield step


def _lower(graphs: Mapping[str, Graph]) -> Any:
    """A program with a method for each graph."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from torch.export import export

    from edgeforge.dialects.pt2e import SignedModule, example_inputs, share_constants

    modules = {method: SignedModule(graph).eval() for method, graph in graphs.items()}
    share_constants(list(modules.values()))
    programs = {method: export(module, example_inputs(module), strict=False) for method, module in modules.items()}
    partitioners = {method: [XnnpackPartitioner()] for method in graphs}
    config = EdgeCompileConfig(_check_ir_validity=False)
    with _constants_once():
        edge = to_edge_transform_and_lower(programs, partitioner=partitioners, compile_config=config)
        return edge.to_executorch()


@contextmanager
def _constants_once() -> Iterator[None]:
    """ExecuTorch copies programs deeply, several times, with their constants, which nothing writes to: copies share
    them here, or a model of a billion parameters would take a dozen gigabytes."""
    import torch

    copy = torch.Tensor.__deepcopy__

    def shared(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        return tensor if type(tensor) is torch.Tensor else copy(tensor, memo)

    with patch.object(torch.Tensor, "__deepcopy__", shared):
        yield


def islands(graph: Graph) -> tuple[str, ...]:
    """Nodes that compute in float: without an 8-bit kernel, with a 16-bit value among their activations, or, of a
    graph with dynamic linears, all others."""
    return tuple(node.output for node in graph.nodes if _in_float(graph, node))


def _in_float(graph: Graph, node: Node) -> bool:
    if graph.level == "float":
        return "dynamic" not in node.attrs
    wide = any(graph.type(name).dtype == "u16" for name in (*node.inputs, node.output))
    pooled = node.op == "reduce_mean" and not (node.attrs["keepdims"] and tuple(node.attrs["axes"]) == (2, 3))
    return wide or pooled or (OPS[node.op].numerics != "move" and node.op not in INTEGER)


def _edits(graph: Graph) -> tuple[Edit, ...]:
    if graph.level == "float":
        return ()
    edits = [
        Edit("activations", "codes - 128, int8", "XNNPACK computes on signed codes; the real values are the same"),
        Edit("biases", "float32 constants", "XNNPACK takes its biases as floats"),
    ]
    if any(value.type.dtype == "u16" for value in graph.values.values()):
        what = "float32, neither rounded nor saturated; linears beside them round their input to int8, per token"
        edits.append(Edit("16-bit activations", what, "XNNPACK has no 16-bit integers"))
    for name in (*graph.inputs, *graph.outputs):
        if graph.type(name).dtype == "u16":
            why = "XNNPACK has no 16-bit integers; the caller applies the manifest's scale and zero point"
            edits.append(Edit(name, "float32 values instead of uint16 codes", why))
    return tuple(edits)


def entering(kind: TensorType, codes: np.ndarray) -> Any:
    """Codes as the program takes them: int8, float32 for 16-bit values, int64 for ids."""
    import torch

    from edgeforge.dialects.pt2e import signed

    if kind.dtype == "u8":
        return torch.from_numpy(signed(codes))
    return torch.from_numpy(np.ascontiguousarray(codes if kind.q is None else kind.q.dequantize(codes)))


def leaving(kind: TensorType, result: np.ndarray) -> np.ndarray:
    """The graph's codes of what the program returns (a copy: the runtime reuses its memory)."""
    from edgeforge.dialects.pt2e import unsigned

    if kind.dtype == "u8":
        return unsigned(result)
    return result.copy() if kind.q is None else kind.q.quantize(result, kind.dtype)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Python's and native code's chatter goes to a log, which stays when the runtime or the lowering fails. ExecuTorch
    prints through ``sys.stderr``, which need not be file descriptor 2 (notebooks, test runners)."""
    with new_log(name) as log:
        try:
            with log.open("a") as stream, redirected(log), redirect_stdout(stream), redirect_stderr(stream):
                yield
        except (RuntimeError, AssertionError) as error:
            raise BackendFailed(f"{name}: {error}; log: {log}\n{telling_lines(log)}") from error


BACKEND = ExecutorchXnnpack()
