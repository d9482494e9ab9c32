"""The PT2E dialect: an integer graph as a torch module of quantize / float op / dequantize sandwiches
(``quantized_decomposed``), as ExecuTorch's partitioners expect it. Activations are signed int8 (codes - 128)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch import nn

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import BIAS, OPS, WEIGHT
from edgeforge.ir.types import Value

QD = torch.ops.quantized_decomposed
OFFSET = 128


class SignedModule(nn.Module):
    """An 8-bit integer graph with int8 inputs and outputs. Every use gets its own dequantize: a shared one makes the
    XNNPACK partitioner report dependency cycles."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph
        self.index = {value.name: i for i, value in enumerate(graph.constants())}
        for value in graph.constants():
            self.register_buffer(f"c{self.index[value.name]}", _constant(value))
            if value.type.q is not None and value.type.q.axis is not None:
                self.register_buffer(f"s{self.index[value.name]}", torch.from_numpy(value.type.q.scale.copy()))
                # The partitioner insists on a named tensor of zero points.
                zeros = torch.zeros(value.type.q.scale.shape, dtype=torch.int64)
                self.register_buffer(f"z{self.index[value.name]}", zeros)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes = dict(zip(self.graph.inputs, inputs, strict=True))
        for node in self.graph.nodes:
            operands = [self._real(node, i, codes) for i in range(len(node.inputs))]
            codes[node.output] = self._quantize(node.output, _compute(self.graph, node, operands))
        return tuple(codes[name] for name in self.graph.outputs)

    def _real(self, node: Node, i: int, codes: dict[str, torch.Tensor]) -> torch.Tensor:
        name = node.inputs[i]
        value = self.graph.values[name]
        stored = getattr(self, f"c{self.index[name]}") if value.const else codes[name]
        role = OPS[node.op].port(i).role
        if role == BIAS or value.type.q is None:
            return stored
        if role == WEIGHT:
            scale = getattr(self, f"s{self.index[name]}")
            low, high = (-8, 7) if value.type.dtype == "i4" and node.op == "linear" else (-7, 7)
            low, high = (low, high) if value.type.dtype == "i4" else (-127, 127)
            zero = getattr(self, f"z{self.index[name]}")
            return QD.dequantize_per_channel.default(stored, scale, zero, 0, low, high, torch.int8)
        q = value.type.q
        return QD.dequantize_per_tensor.default(stored, float(q.scale), q.zero - OFFSET, -128, 127, torch.int8)

    def _quantize(self, name: str, real: torch.Tensor) -> torch.Tensor:
        q = self.graph.type(name).q
        assert q is not None
        return QD.quantize_per_tensor.default(real, float(q.scale), q.zero - OFFSET, -128, 127, torch.int8)


def _constant(value: Value) -> torch.Tensor:
    """Weights stay int8 codes, biases become float32 (XNNPACK wants them so), activations are shifted to int8."""
    assert value.data is not None
    kind = value.type
    if kind.dtype == "i32":
        assert kind.q is not None
        return torch.from_numpy(kind.q.dequantize(value.data))
    if kind.dtype == "u8":
        return torch.from_numpy((value.data.astype(np.int16) - OFFSET).astype(np.int8))
    return torch.from_numpy(value.data.copy())


def _compute(graph: Graph, node: Node, operands: list[torch.Tensor]) -> torch.Tensor:
    """The float op, its fused clamp as relu / relu6 / hardtanh (the partitioner fuses no torch.clamp)."""
    plain = Node(node.op, node.inputs, node.output, {k: v for k, v in node.attrs.items() if k != "clamp"}, node.source)
    y = OPS[node.op].torch(torch, graph.view(plain), *operands)
    if "clamp" not in node.attrs:
        return y
    low, high = node.attrs["clamp"]
    if low == 0.0 and high == float("inf"):
        return nn.functional.relu(y)
    return nn.functional.relu6(y) if (low, high) == (0.0, 6.0) else nn.functional.hardtanh(y, low, high)


def example_inputs(graph: Graph) -> tuple[torch.Tensor, ...]:
    """Zero codes of every input, int8."""
    return tuple(torch.zeros(graph.type(name).shape, dtype=torch.int8) for name in graph.inputs)


def signed(codes: np.ndarray) -> Any:
    """uint8 codes as a contiguous int8 tensor (a channels-last one is silently misread)."""
    return torch.from_numpy(np.ascontiguousarray((codes.astype(np.int16) - OFFSET).astype(np.int8)))


__all__ = ["SignedModule", "example_inputs", "signed"]
