"""The ONNX dialect: integer Graph -> QDQ model. Codes in, codes out; every node becomes

    DequantizeLinear (one per use) -> the op's ``onnx`` column in float -> QuantizeLinear

so that a runtime with integer kernels fuses each sandwich to one of them. Opset 23 (RMSNormalization); integer weights
as int8 or packed int4 initializers. The bytes are deterministic; node and tensor names are the graph's value names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgeforge import __version__
from edgeforge.ir.fixed import channel_scale, clamp_codes
from edgeforge.ir.graph import Graph, Node, NodeView
from edgeforge.ir.op import OPS
from edgeforge.ir.types import RANGE, QParams, TensorType, pack_int4

OPSET = 23
#: Newest IR version that ONNX Runtime 1.32 and QNN 2.49 were tried with; opset 23 came with it.
IR_VERSION = 11
#: Bytes of constants from which on those of LARGE bytes go to a file beside the model: a protobuf message holds at most
#: 2 GiB, and is copied several times on its way.
APART, LARGE = 1 << 28, 1 << 20
#: Where such constants begin in their file: on a page, as ONNX asks for, so that they can be mapped.
PAGE = 4096
#: Rows that are transposed at a time.
ROWS = 64

ELEMENT = {
    "f32": TensorProto.FLOAT,
    "i64": TensorProto.INT64,
    "i32": TensorProto.INT32,
    "u16": TensorProto.UINT16,
    "u8": TensorProto.UINT8,
    "i8": TensorProto.INT8,
    "i4": TensorProto.INT4,
}


class _Emitter:
    """The ``g`` of the op table's ``onnx`` column. ``g(op_type, *names, **attributes)`` adds a float op and returns its
    result's name; a name of the graph among the inputs is dequantized first, once per node."""

    def __init__(self, graph: Graph, two_level: bool, apart: IO[bytes] | None):
        self.graph, self.two_level, self.apart = graph, two_level, apart
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.node: Node = graph.nodes[0]
        self.real: dict[str, str] = {}
        self.count = 0

    def emit(self, node: Node) -> None:
        """The sandwich of one node."""
        self.node, self.real, self.count = node, {}, 0
        n = self.graph.view(node)
        if n.out.q is None:
            result = OPS[node.op].onnx(self, n, *node.inputs)
            self.add("Identity", [result], node.output, node.output)
            return
        result = self.resolve(OPS[node.op].onnx(self, n, *node.inputs))
        if self.nodes[-1].op_type != "DequantizeLinear":
            self.nodes[-1].name = node.output
        self.quantize(result, node.output, n.out, f"{node.output}/out")

    def __call__(self, op_type: str, *names: str, **attributes: Any) -> str:
        result = self.fresh(op_type)
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in attributes.items()}
        return self.add(op_type, [self.resolve(name) if name else "" for name in names], result, result, **plain)

    def add(self, op_type: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> str:
        made = helper.make_node(op_type, list(inputs), [output], name=name, doc_string=self.node.source, **attributes)
        self.nodes.append(made)
        return output

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{self.node.output}/{kind}.{self.count}"

    # ------------------------------------------------------------------------------------- names of the graph -> floats

    def resolve(self, name: str) -> str:
        """The float tensor of a graph value for the node at hand; other names (floats, indices) stay."""
        value = self.graph.values.get(name)
        if value is None or value.type.q is None:
            if value is not None and value.data is not None:
                self.initialize(name, "i64", value.data)
            return name
        if name not in self.real:
            if value.data is not None:
                self.initialize(name, value.type.dtype, value.data)
            self.real[name] = self.dequantize(name, name, value.type)
        return self.real[name]

    def dequantize(self, codes: str, value: str, kind: TensorType, axis: int | None = None) -> str:
        """DequantizeLinear of the tensor ``codes`` under the encoding of ``value``; ``axis`` where it was moved."""
        assert kind.q is not None
        attributes: dict[str, int] = {}
        if kind.q.block is not None:
            attributes = {"axis": 1 if axis is None else axis, "block_size": kind.q.block}
        elif kind.q.axis is not None:
            attributes = {"axis": kind.q.axis if axis is None else axis}
        scale = self.encoding(codes, kind.dtype, kind.q)
        result = f"{self.node.output}/in.{len(self.real)}"
        return self.add("DequantizeLinear", [codes, *scale], result, result, **attributes)

    def quantize(self, real: str, output: str, kind: TensorType, name: str) -> str:
        assert kind.q is not None
        return self.add("QuantizeLinear", [real, *self.encoding(output, kind.dtype, kind.q)], output, name)

    def encoding(self, value: str, dtype: str, q: QParams) -> list[str]:
        """Initializers ``<value>/scale`` and ``<value>/zero``."""
        names = [f"{value}/scale", f"{value}/zero"]
        self.initialize(names[0], "f32", q.scale)
        self.initialize(names[1], dtype, np.full(q.scale.shape, q.zero))
        return names

    def initialize(self, name: str, dtype: str, data: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = self.stored(name, dtype, np.asarray(data))
        return name

    def stored(self, name: str, dtype: str, data: np.ndarray) -> onnx.TensorProto:
        """The initializer; large ones go to the file for them, if there is one."""
        if dtype == "i4":
            array = np.frombuffer(pack_int4(data), np.uint8)
        else:
            array = np.ascontiguousarray(data, helper.tensor_dtype_to_np_dtype(ELEMENT[dtype]))
        made = TensorProto(name=name, data_type=ELEMENT[dtype], dims=data.shape)
        if self.apart is None or array.nbytes < LARGE:
            made.raw_data = array.tobytes()
            return made
        self.apart.write(bytes(-self.apart.tell() % PAGE))
        place = {"location": Path(self.apart.name).name, "offset": self.apart.tell(), "length": array.nbytes}
        self.apart.write(array.data)
        made.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            made.external_data.add(key=key, value=str(value))
        return made

    # ------------------------------------------------------------------------------------- words of the onnx column

    def ints(self, numbers: Sequence[int]) -> str:
        """An int64 constant."""
        return self.initialize(self.fresh("ints"), "i64", np.array(list(numbers), np.int64))

    def scalar(self, number: float) -> str:
        """A float32 constant."""
        return self.initialize(self.fresh("scalar"), "f32", np.float32(number))

    def clamp(self, n: NodeView, name: str) -> str:
        """The fused activation: nothing where the output's encoding saturates there anyway; else behind a sandwich of
        its own, which gives the same codes (no runtime keeps a fused clamp under a free zero point)."""
        low, high = clamp_codes(n)
        if low != RANGE[n.out.dtype][0]:
            name = self.limit(n, "Max", self.recoded(n, name), low)
        if high != RANGE[n.out.dtype][1]:
            name = self.limit(n, "Min", self.recoded(n, name), high)
        return name

    def limit(self, n: NodeView, kind: str, name: str, code: int) -> str:
        """Max or Min with a code of the output's encoding. Hexagon's compiler merges a Relu or Clip with the op before
        it, and then rounds otherwise or drops the Clip; these it leaves alone."""
        assert n.out.q is not None
        codes, result = self.fresh(f"{kind}.code"), self.fresh(kind)
        self.initialize(codes, n.out.dtype, np.array([code]))
        self.add("DequantizeLinear", [codes, *self.encoding(codes, n.out.dtype, n.out.q)], result, result)
        return self(kind, name, result)

    def recoded(self, n: NodeView, name: str) -> str:
        """``name`` through Quantize and Dequantize under the output's encoding."""
        codes = self.fresh("codes")
        self.quantize(name, codes, n.out, f"{codes}/out")
        result = self.fresh("real")
        return self.add("DequantizeLinear", [codes, f"{codes}/scale", f"{codes}/zero"], result, result)

    def linear(self, n: NodeView, x: str, w: str, b: str | None) -> str:
        """Gemm for [N, I]; for higher ranks and block-wise weights MatMul with weights stored [I, O], then Add."""
        q, kind, data = n.q(1), n.type(1), n.data(1)
        assert data is not None
        if len(n.shape(0)) == 2 and q.block is None:
            return self("Gemm", x, w, *([] if b is None else [b]), transB=1)
        self.resolve(x)
        if q.block is not None and self.two_level:
            self.real[w] = self.two_levels(w, q, data)
        else:
            q = q if q.block is None else QParams(q.scale.T, 0, axis=0, block=q.block)
            stored = self.initialize(f"{w}/transposed", kind.dtype, transposed(data))
            moved = TensorType(kind.shape[::-1], kind.dtype, q)
            self.real[w] = self.dequantize(stored, w, moved, axis=0 if q.block is not None else 1)
        y = self("MatMul", x, w)
        return y if b is None else self("Add", y, b)

    def permuted(self, n: NodeView, w: str, perm: Sequence[int]) -> str:
        """The weights of a node, stored with their axes permuted."""
        kind, data = n.type(1), n.data(1)
        assert data is not None
        stored = self.initialize(f"{w}/permuted", kind.dtype, data.transpose(perm))
        self.real[w] = self.dequantize(stored, w, kind, axis=list(perm).index(0))
        return w

    def two_levels(self, w: str, q: QParams, codes: np.ndarray) -> str:
        """Block-wise weights [O, I] as Qualcomm's provider reads its two-level encoding: real weights [I, O], quantized
        by scales that are dequantized multiples of the channel's."""
        step = channel_scale(q).astype(np.float32)
        multiples = np.rint(q.scale / step[:, None])
        scales = (multiples * step[:, None]).astype(np.float32)
        self.initialize(f"{w}/real", "f32", (codes * np.repeat(scales, q.block or 1, axis=1)).T)
        self.initialize(f"{w}/multiples", "u8", multiples.T)
        self.initialize(f"{w}/step", "f32", step)
        self.initialize(f"{w}/step_zero", "u8", np.zeros(len(step)))
        self.initialize(f"{w}/scales", "f32", scales.T)
        self.initialize(f"{w}/zeros", "i4", np.zeros(scales.T.shape, np.int8))
        joined, narrow, real = (self.fresh(name) for name in ("scales", "codes", "weights"))
        blocks = {"axis": 0, "block_size": q.block}
        self.add("DequantizeLinear", [f"{w}/multiples", f"{w}/step", f"{w}/step_zero"], joined, joined, axis=1)
        self.add("QuantizeLinear", [f"{w}/real", joined, f"{w}/zeros"], narrow, narrow, **blocks)
        return self.add("DequantizeLinear", [narrow, f"{w}/scales", f"{w}/zeros"], real, real, **blocks)


def transposed(codes: np.ndarray) -> np.ndarray:
    """[I, O] of codes [O, I], contiguous; some rows at a time, whose lines stay in the cache."""
    made = np.empty(codes.shape[::-1], codes.dtype)
    for at in range(0, len(codes), ROWS):
        made[:, at : at + ROWS] = codes[at : at + ROWS].T
    return made


def to_onnx(graph: Graph, two_level: bool = False, apart: IO[bytes] | None = None) -> onnx.ModelProto:
    """The QDQ model of an integer graph: uint8/uint16 codes (and int64 indices) in, codes out, fixed shapes.

    two_level: block-wise weights in the form of `_Emitter.two_levels` (as float32) instead of int4 and block scales.
    apart: an empty file, to lie beside the model, for its large constants."""
    assert graph.level == "integer", graph.level
    emitter = _Emitter(graph, two_level, apart)
    for node in graph.nodes:
        emitter.emit(node)
    made = helper.make_graph(
        emitter.nodes,
        graph.name,
        [_port(name, graph.type(name)) for name in graph.inputs],
        [_port(name, graph.type(name)) for name in graph.outputs],
        list(emitter.initializers.values()),
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        made, opset_imports=opset, ir_version=IR_VERSION, producer_name="edgeforge", producer_version=__version__
    )
    helper.set_model_props(model, {"edgeforge.graph": graph.hash()})
    return model


def _port(name: str, kind: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENT[kind.dtype], kind.shape)


def write_onnx(graph: Graph, path: Path, two_level: bool = False) -> tuple[str, ...]:
    """Write and check the model of `to_onnx`; returns the names of the files written (``<name>.data`` holds the large
    constants of a large model). Raises onnx.checker.ValidationError when the dialect breaks a rule."""
    files = (path.name,)
    if sum(value.type.nbytes for value in graph.constants()) < APART:
        model = to_onnx(graph, two_level)
    else:
        files = (path.name, f"{path.name}.data")
        with (path.parent / files[1]).open("wb") as apart:
            model = to_onnx(graph, two_level, apart)
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path, full_check=True)
    return files
