"""Lowering to a ``.pte`` with a QNN delegate, for the child process of executorch_qnn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from executorch.backends.qualcomm._passes import (
    AnnotateQuantAttrs,
    ConvertLinearToConv2d,
    FuseConsecutiveCast,
    RemoveRedundancy,
    TagQuantIO,
)
from executorch.backends.qualcomm._passes.qnn_pass_manager import get_qnn_pass_manager_cls
from executorch.backends.qualcomm.builders.node_visitor import dq_ops, q_ops
from executorch.backends.qualcomm.builders.utils import deduce_dtype
from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset, QnnExecuTorchBackendType
from executorch.backends.qualcomm.utils.constants import (
    QCOM_PASS_ACTIVATE_KEY,
    QCOM_PASS_ARGS_KWARGS_DEFAULTS_KEY,
    QCOM_QUANT_ATTRS,
    QCOM_QUANTIZED_IO,
)
from executorch.backends.qualcomm.utils.utils import (
    generate_htp_compiler_spec,
    generate_qnn_executorch_compiler_spec,
    to_edge_transform_and_lower_to_qnn,
)
from executorch.exir import ExecutorchBackendConfig
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.pass_base import ExportPass, PassResult
from executorch.exir.passes import MemoryPlanningPass

import edgeforge.ops  # noqa: F401 (registers the op table)
from edgeforge.backends._child import load_arrays
from edgeforge.dialects.pt2e import UnsignedModule, example_inputs
from edgeforge.ir.text import parse_graph

PASSES = get_qnn_pass_manager_cls(QnnExecuTorchBackendType.kHtpBackend)
_PREPROCESS = PASSES.get_preprocess_passes

#: First bytes of a QNN context in a delegate, before an 8-byte clock and the context's 8-byte size (little endian).
CONTEXT = bytes.fromhex("cdab7856")


def compile_program(request: Mapping[str, Any]) -> None:
    """A program with a method for each graph, all in one context binary."""
    modules, inputs, blocks = {}, {}, False
    for method, files in request["graphs"].items():
        graph = parse_graph(Path(files["graph"]).read_text(), load_arrays(files["arrays"]))
        module = UnsignedModule(graph).eval()
        inputs[method] = example_inputs(module)
        # Exported here: the lowering's own export traces with Dynamo, which takes no numbers from attributes.
        modules[method] = torch.export.export(module, inputs[method], strict=False).module(check_guards=False)
        blocks |= any(value.type.q is not None and value.type.q.block is not None for value in graph.constants())
    options = generate_htp_compiler_spec(use_fp16=False, use_weight_sharing=request["shared"])
    soc = getattr(QcomChipset, request["soc"])
    specs = {
        method: generate_qnn_executorch_compiler_spec(soc_model=soc, backend_options=options) for method in modules
    }
    PASSES.get_preprocess_passes = classmethod(_preprocess_passes)  # type: ignore[method-assign]
    edge = to_edge_transform_and_lower_to_qnn(modules, inputs, specs, **_passes(blocks))
    lowered = {method: edge.exported_program(method).graph_module for method in modules}
    calls = [str(n.target) for made in lowered.values() for n in made.graph.nodes if n.op == "call_function"]
    outside = [call for call in calls if "getitem" not in call and "executorch_call_delegate" not in call]
    if outside:
        # With integer inputs and outputs, the runtime aborts on these.
        raise RuntimeError(f"unsupported by QNN's partitioner: {', '.join(sorted(set(outside)))}")
    planning: dict[str, Any] = {method: _IntegerPlanning(made) for method, made in lowered.items()}
    program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    Path(request["pte"]).write_bytes(reproducible(program.buffer))


class SeparateRequantize(ExportPass):
    """q -> dq -> q' -> dq'   =>   q -> dq -> convert -> q' -> dq'

    ExecuTorch notes a requantize beside the producer, by the reader's name. Of several in a row it then keeps the last
    only, none behind a sigmoid, none in front of a graph output, and wherever a later pass renames readers (it inserts
    reshapes around each linear) they get each other's. As operations of their own all stay where they are."""

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        for node in list(graph_module.graph.nodes):
            if node.target in q_ops and node.args[0].target in dq_ops:
                real = node.args[0]
                with graph_module.graph.inserting_before(node):
                    made = graph_module.graph.call_function(exir_ops.edge.aten._to_copy.default, (real,))
                made.meta = dict(real.meta)
                node.replace_input_with(real, made)
        graph_module.recompile()
        return PassResult(graph_module, True)


def _passes(blocks: bool) -> dict[str, Any]:
    """ExecuTorch's passes, with the one that marks graph inputs and outputs as integers, and ours.

    blocks: linears become 1x1 convolutions, for HTP creates no fully connected layer with block-wise weights and more
    outputs than inputs (seen from 320 outputs on, QNN 2.49)."""
    job, order = PASSES.get_capture_program_passes(), PASSES.get_passes_dependency_for_capture_program()
    job[TagQuantIO][QCOM_PASS_ACTIVATE_KEY] = True
    job[ConvertLinearToConv2d][QCOM_PASS_ACTIVATE_KEY] = blocks
    job[TagQuantIO][QCOM_PASS_ARGS_KWARGS_DEFAULTS_KEY]["get_quant_io_dtype_fn"] = _boundary_dtype
    job[SeparateRequantize] = {QCOM_PASS_ACTIVATE_KEY: True, QCOM_PASS_ARGS_KWARGS_DEFAULTS_KEY: {}}
    order[AnnotateQuantAttrs] = [*order[AnnotateQuantAttrs], SeparateRequantize]
    order[SeparateRequantize] = [RemoveRedundancy]
    return {"passes_job": job, "dep_table": order}


def _preprocess_passes(manager: type[Any], *args: Any, **options: Any) -> list[Any]:
    """ExecuTorch's own, without the one that merges conversions in a row as if they were casts."""
    return [chosen for chosen in _PREPROCESS(*args, **options) if chosen is not FuseConsecutiveCast]


def _boundary_dtype(node: torch.fx.Node) -> torch.dtype | None:
    """The integer dtype of a graph input or output, by the encoding that the passes found for it."""
    encoding = node.meta.get(QCOM_QUANT_ATTRS)
    constant = node.op == "placeholder" and not node.name.startswith("inputs_")
    boundary = node.op == "placeholder" or any(user.op == "output" for user in node.users)
    return deduce_dtype(None, encoding) if encoding and boundary and not constant else None


class _IntegerPlanning(MemoryPlanningPass):
    """Gives the program's inputs and outputs their integer dtypes just before memory is planned. ExecuTorch's own pass
    for that comes earlier and runs the float module on integers again, which fails for means, norms and pools."""

    def __init__(self, lowered: torch.fx.GraphModule):
        super().__init__()
        self.inputs = {n.name: n.meta.get(QCOM_QUANTIZED_IO) for n in lowered.graph.nodes if n.op == "placeholder"}
        self.outputs = [x.meta.get(QCOM_QUANTIZED_IO) for x in lowered.graph.output_node().args[0]]

    def run(self, graph_module: torch.fx.GraphModule, *args: Any, **options: Any) -> Any:
        for node in graph_module.graph.nodes:
            if node.op == "placeholder" and self.inputs.get(node.name) is not None:
                node.meta["spec"].scalar_type = self.inputs[node.name]
            if node.op == "output":
                for result, dtype in zip(node.args[0], self.outputs, strict=True):
                    if dtype is not None:
                        result.meta["spec"].scalar_type = dtype
        return super().run(graph_module, *args, **options)


def reproducible(program: bytes) -> bytes:
    """``program`` with the clock of every QNN context replaced by a hash of everything else."""
    data, clocks = bytearray(program), []
    at = data.find(CONTEXT)
    while at >= 0:
        size = int.from_bytes(data[at + 12 : at + 20], "little")
        if 0 < size <= len(data) - at:
            clocks.append(at + 4)
            data[at + 4 : at + 12] = bytes(8)
        at = data.find(CONTEXT, at + 4)
    digest = hashlib.sha256(data).digest()
    for number, clock in enumerate(clocks):
        data[clock : clock + 8] = hashlib.sha256(digest + bytes([number])).digest()[:8]
    return bytes(data)
