"""The PT2E dialect: an integer graph as a torch module of dequantize / float op / quantize sandwiches
(``quantized_decomposed``), as ExecuTorch's partitioners expect it. Every use of a value gets a dequantize of its own: a
shared one makes XNNPACK's partitioner report dependency cycles, and QNN's give only the first user its encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch import nn

from edgeforge.ir.fixed import clamp_codes
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import BIAS, OPS, WEIGHT
from edgeforge.ir.types import RANGE, TensorType, Value

QD = torch.ops.quantized_decomposed
#: XNNPACK computes on signed codes: uint8 codes - 128. 16-bit tables are kept so too.
OFFSET, OFFSET_16 = 1 << 7, 1 << 15

#: quant_min, quant_max and dtype of a tensor's codes, as the dialect declares them.
Codes = tuple[int, int, torch.dtype]


class _Module(nn.Module):
    """The walk that both variants share; they differ in how values are stored between nodes."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph, self.users = graph, graph.users()
        self.index = {value.name: i for i, value in enumerate(graph.constants())}
        for value in graph.constants():
            i, q = self.index[value.name], value.type.q
            self.register_buffer(f"c{i}", self.stored(value))
            if q is not None and q.axis is not None:
                self.register_buffer(f"s{i}", torch.from_numpy(q.scale.copy()))
                # Partitioners insist on a tensor of zero points.
                self.register_buffer(f"z{i}", torch.zeros(q.scale.shape, dtype=torch.int64))

    def stored(self, value: Value) -> torch.Tensor:
        """The buffer that holds a constant."""
        raise AssertionError("of the variants")

    def codes(self, kind: TensorType) -> Codes | None:
        """How codes of ``kind`` are declared; None where the value stays float."""
        raise AssertionError("of the variants")

    def walk(self, known: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for node in self.graph.nodes:
            known[node.output] = self.compute(node, known)
        return known

    def compute(self, node: Node, known: dict[str, torch.Tensor]) -> torch.Tensor:
        operands = [self.real(node, i, known) for i in range(len(node.inputs))]
        if self.dynamic(node):
            operands[0] = _per_token(operands[0])
        return self.quantize(node.output, self.clamp(node, _plain(self.graph, node, operands)))

    def dynamic(self, node: Node) -> bool:
        """Whether a node rounds its input as it comes."""
        return "dynamic" in node.attrs

    def real(self, node: Node, i: int, known: dict[str, torch.Tensor]) -> torch.Tensor:
        """Input ``i`` of a node as the float op reads it."""
        name, role = node.inputs[i], OPS[node.op].port(i).role
        value = self.graph.values[name]
        stored = getattr(self, f"c{self.index[name]}") if value.const else known[name]
        if value.type.q is None or stored.dtype == torch.float32:
            return stored
        return self.per_channel(node, value, stored) if role in (WEIGHT, BIAS) else self.dequantize(stored, value.type)

    def per_channel(self, node: Node, value: Value, stored: torch.Tensor) -> torch.Tensor:
        """Weights (and biases as codes)."""
        i, kind = self.index[value.name], value.type
        assert kind.q is not None
        low, high = self.weight_range(node, kind)
        if kind.q.block is not None:
            return _blockwise(stored, getattr(self, f"s{i}"), getattr(self, f"z{i}"), kind.q.block, low, high)
        if kind.q.axis is None:
            return QD.dequantize_per_tensor.default(stored, float(kind.q.scale), 0, low, high, stored.dtype)
        scale, zero = getattr(self, f"s{i}"), getattr(self, f"z{i}")
        return QD.dequantize_per_channel.default(stored, scale, zero, 0, low, high, stored.dtype)

    def weight_range(self, node: Node, kind: TensorType) -> tuple[int, int]:
        return RANGE[kind.dtype]

    def dequantize(self, codes: torch.Tensor, kind: TensorType) -> torch.Tensor:
        declared = self.codes(kind)
        assert declared is not None and kind.q is not None
        zero = kind.q.zero + declared[0]
        return QD.dequantize_per_tensor.default(codes, float(kind.q.scale), zero, *declared)

    def quantize(self, name: str, real: torch.Tensor) -> torch.Tensor:
        kind = self.graph.type(name)
        declared = self.codes(kind)
        if declared is None:
            return real
        assert kind.q is not None
        return QD.quantize_per_tensor.default(real, float(kind.q.scale), kind.q.zero + declared[0], *declared)

    def clamp(self, node: Node, y: torch.Tensor) -> torch.Tensor:
        """The fused activation as relu / relu6 / hardtanh: partitioners fuse no torch.clamp."""
        if "clamp" not in node.attrs:
            return y
        low, high = node.attrs["clamp"]
        if low == 0.0 and high == float("inf"):
            return nn.functional.relu(y)
        return nn.functional.relu6(y) if (low, high) == (0.0, 6.0) else nn.functional.hardtanh(y, low, high)


class SignedModule(_Module):
    """For XNNPACK: 8-bit activations as int8 (codes - 128), inputs and outputs too, biases as floats. It has no 16-bit
    integers: such values stay float, unrounded, from the node that makes them to those that read them. A linear that
    reads or makes them keeps its integer weights and rounds its input to int8 as it comes, a range per token; of other
    layers the weights are floats."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        known = self.walk(dict(zip(self.graph.inputs, inputs, strict=True)))
        return tuple(known[name] for name in self.graph.outputs)

    def compute(self, node: Node, known: dict[str, torch.Tensor]) -> torch.Tensor:
        if node.op != "gather":
            return super().compute(node, known)
        # Rows of codes: the runtime's embedding takes any dtype, and no dequantize is left outside the delegates.
        rows = _plain(self.graph, node, [getattr(self, f"c{self.index[node.inputs[0]]}"), known[node.inputs[1]]])
        if rows.dtype != torch.int16:
            return rows
        q = self.graph.type(node.output).q
        assert q is not None
        return (rows.to(torch.float32) + float(OFFSET_16 - q.zero)) * float(q.scale)

    def dynamic(self, node: Node) -> bool:
        return super().dynamic(node) or (node.op == "linear" and self.wide(node))

    def wide(self, node: Node) -> bool:
        """Whether a node reads or makes 16-bit activations."""
        return any(self.graph.type(name).dtype == "u16" for name in (node.inputs[0], node.output))

    def codes(self, kind: TensorType) -> Codes | None:
        return (-128, 127, torch.int8) if kind.dtype == "u8" else None

    def weight_range(self, node: Node, kind: TensorType) -> tuple[int, int]:
        """A linear declared -8..7 is packed to int4; a convolution declared so fails at load."""
        return (-8, 7) if kind.dtype == "i4" and node.op == "linear" else RANGE[kind.dtype]

    def stored(self, value: Value) -> torch.Tensor:
        assert value.data is not None
        kind, users = value.type, self.users[value.name]
        if kind.dtype == "u8":
            return torch.from_numpy(signed(value.data))
        if kind.dtype == "u16" and all(node.op == "gather" for node in users):
            return torch.from_numpy((value.data.astype(np.int32) - OFFSET_16).astype(np.int16))
        floats = any(self.wide(node) and node.op != "linear" for node in users)
        if kind.dtype in ("i32", "u16") or (floats and kind.dtype in ("i8", "i4")):
            assert kind.q is not None
            return torch.from_numpy(kind.q.dequantize(value.data))
        return torch.from_numpy(value.data.copy())


class UnsignedModule(_Module):
    """For QNN: uint8 / uint16 activations, int32 biases. Inputs and outputs are floats behind a quantize and in front
    of a dequantize, which the lowering strips; ids are int32."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        real = dict(zip(self.graph.inputs, inputs, strict=True))
        known = self.walk({name: self.quantize(name, x) for name, x in real.items()})
        return tuple(self.dequantize(known[name], self.graph.type(name)) for name in self.graph.outputs)

    def codes(self, kind: TensorType) -> Codes | None:
        return {"u8": (0, 255, torch.uint8), "u16": (0, 65535, torch.uint16)}.get(kind.dtype)

    def stored(self, value: Value) -> torch.Tensor:
        assert value.data is not None
        return torch.from_numpy(value.data.copy())

    def clamp(self, node: Node, y: torch.Tensor) -> torch.Tensor:
        """Nothing where the output's encoding saturates there anyway; else behind a sandwich of its own (HTP's compiler
        takes no operation without an encoded result)."""
        view = self.graph.view(node)
        if "clamp" not in node.attrs or clamp_codes(view) == RANGE[view.out.dtype]:
            return y
        return super().clamp(node, self.dequantize(self.quantize(node.output, y), view.out))


def _blockwise(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, block: int, low: int, high: int
) -> torch.Tensor:
    """4-bit codes [O, I] with a scale per ``block`` inputs."""
    import torchao.quantization.quant_primitives  # noqa: F401 (registers torch.ops.torchao)

    affine = torch.ops.torchao.dequantize_affine.default
    return affine(codes, [1, block], scale, zero, torch.int8, low, high, output_dtype=torch.float32)


def _per_token(x: torch.Tensor) -> torch.Tensor:
    """int8 codes and back, with a range for each row."""
    scale, zero = QD.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = QD.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
    return QD.dequantize_per_token.default(codes, scale, zero, -128, 127, torch.int8, torch.float32)


def _plain(graph: Graph, node: Node, operands: list[torch.Tensor]) -> torch.Tensor:
    """The float op without what the dialect says apart: a fused clamp, and inputs rounded as they come."""
    attrs = {k: v for k, v in node.attrs.items() if k not in ("clamp", "dynamic")}
    plain = Node(node.op, node.inputs, node.output, attrs, node.source)
    return OPS[node.op].torch(torch, graph.view(plain), *operands)


def signed(codes: np.ndarray) -> np.ndarray:
    """uint8 codes as contiguous int8 (a channels-last tensor is silently misread)."""
    return np.ascontiguousarray((codes.astype(np.int16) - OFFSET).astype(np.int8))


def unsigned(codes: np.ndarray) -> np.ndarray:
    """Inverse of `signed`."""
    return (codes.astype(np.int16) + OFFSET).astype(np.uint8)


def share_constants(modules: Sequence[_Module]) -> None:
    """Constants that the modules' graphs hold under one name become one tensor where their bytes are equal."""
    first, *others = modules
    for module in others:
        for name, i in module.index.items():
            own, known = f"c{i}", f"c{first.index.get(name, -1)}"
            if hasattr(first, known) and torch.equal(getattr(first, known), getattr(module, own)):
                setattr(module, own, getattr(first, known))


def example_inputs(module: _Module) -> tuple[torch.Tensor, ...]:
    """Zeros of every input in the dtype that the module takes."""
    ids, taken = (torch.int64, torch.int8) if isinstance(module, SignedModule) else (torch.int32, torch.float32)
    made = []
    for name in module.graph.inputs:
        kind = module.graph.type(name)
        dtype = {"i64": ids, "u8": taken}.get(kind.dtype, torch.float32)
        made.append(torch.zeros(kind.shape, dtype=dtype))
    return tuple(made)


__all__: list[Any] = ["SignedModule", "UnsignedModule", "example_inputs", "signed", "unsigned"]
