"""ONNX models (float or QDQ) -> float Graph and the encodings they carry. Nodes are translated one by one
(`onnx_ops.TABLE`); what depends on constants alone is evaluated by onnx.reference here and now."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, checker, helper, inliner, numpy_helper, reference, shape_inference

from edgeforge.errors import InvalidInput
from edgeforge.frontend import Imported, onnx_layers
from edgeforge.frontend.builder import Act, Builder, Const, Refused, clean
from edgeforge.frontend.onnx_ops import TABLE, OnnxNode
from edgeforge.ir.types import QParams, TensorType

assert onnx_layers  # importing it fills the rest of TABLE

#: Constants that a model computes may not be larger (a damaged file can ask for any size).
LARGEST = 2**28

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_IDS = (TensorProto.INT32, TensorProto.INT64)
_CODES = {
    TensorProto.UINT8: "uint8", TensorProto.INT8: "int8", TensorProto.UINT16: "uint16", TensorProto.INT16: "int16",
    TensorProto.UINT4: "uint4", TensorProto.INT4: "int4", TensorProto.INT32: "int32",
}  # fmt: skip

#: Signed codes shifted by half their range are unsigned codes: same scale, same real numbers.
SHIFT = {"int8": ("u8", 128), "int16": ("u16", 32768), "uint8": ("u8", 0), "uint16": ("u16", 0)}

#: Shifts that make constant codes signed, as weights are.
SIGNED = {"int8": ("i8", 0), "uint8": ("i8", -128), "int4": ("i4", 0), "uint4": ("i4", -8), "int32": ("i32", 0)}

#: What reading or evaluating a damaged node raises.
_MALFORMED = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, MemoryError,
    RuntimeError, UnicodeDecodeError,
)  # fmt: skip


def from_onnx(path: str | Path, name: str | None = None) -> Imported:
    """The float graph of an ONNX file, and for QDQ models the encodings of its tensors.

    Raises InvalidInput on a damaged file, external data outside the model's folder, dynamic shapes and NaN weights;
    Unsupported with one reason per node that has no meaning in the op table."""
    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
        _load_external(model, path.resolve().parent)
        model = inliner.inline_local_functions(model) if model.functions else model
        _require_text(model.graph)
        for value in model.graph.output:
            value.type.tensor_type.shape.SetInParent()  # the checker insists on one; nobody needs it
        checker.check_model(model)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}") from None
    except (DecodeError, checker.ValidationError, *_MALFORMED) as error:
        first = next(iter(str(error).strip().splitlines()), repr(error))
        raise InvalidInput(f"{path.name} is not an ONNX model or is damaged ({first}) -> export it again") from None
    return _Importer(model, name or path.stem).run()


def _require_text(graph: onnx.GraphProto) -> None:
    """protobuf gives names that are not UTF-8 as bytes."""
    names: list[Any] = [value.name for part in (graph.initializer, graph.input, graph.output) for value in part]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute)]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name is not UTF-8")


def _load_external(model: onnx.ModelProto, folder: Path) -> None:
    """Read external tensors; they may lie in the model's folder only."""
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = (folder / entries.get("location", "")).resolve()
        if not file.is_relative_to(folder) or not file.is_file():
            why = "is missing" if file.is_relative_to(folder) else "lies outside the model's folder"
            raise InvalidInput(
                f"{tensor.name}: external data {entries.get('location')!r} {why} -> put it beside the model"
            )
        offset = int(entries.get("offset", 0))
        with file.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(int(entries["length"])) if "length" in entries else stream.read()
        if offset < 0 or ("length" in entries and len(data) != int(entries["length"])):
            raise InvalidInput(f"{tensor.name}: {file.name} is too short -> copy the file again")
        del tensor.external_data[:]
        tensor.raw_data, tensor.data_location = data, TensorProto.DEFAULT


@dataclass(frozen=True)
class Codes:
    """What QuantizeLinear gives: an activation and the encoding it is rounded to (None: an input of codes)."""

    act: Act
    kind: TensorType | None
    dtype: str


class _Importer:
    def __init__(self, model: onnx.ModelProto, name: str):
        self.model, self.graph, self.g = model, model.graph, Builder(name)
        self.shapes: dict[str, tuple[int, ...]] | None = None
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.env: dict[str, Any] = {"": None}

    def run(self) -> Imported:
        for tensor in self.graph.initializer:
            try:
                self.env[tensor.name] = _constant(numpy_helper.to_array(tensor), tensor.name)
            except _MALFORMED as error:
                raise InvalidInput(
                    f"{self.g.name}: weights {tensor.name!r} are damaged ({error}) -> export again"
                ) from None
        for value in self.graph.input:
            if value.name not in self.env:
                self.env[value.name] = self.input(value)
        for node in self.graph.node:
            self.g.where = _source(node)
            results = self.results(node)
            for output, result in zip(node.output, results, strict=False):
                self.env[output] = result
        self.g.where = ""
        missing = [value.name for value in self.graph.output if value.name not in self.env]
        if missing:
            raise InvalidInput(
                f"{self.g.name}: outputs {', '.join(missing)} are never computed -> export the model again"
            )
        outputs = [self.env[value.name] for value in self.graph.output]
        graph = self.g.finish([result.act if isinstance(result, Codes) else result for result in outputs])
        return Imported(graph, {name: kind for name, kind in self.g.encodings.items() if name in graph.values})

    def input(self, value: onnx.ValueInfoProto) -> Act | Codes:
        kind = value.type.tensor_type
        sizes = []
        for axis, size in enumerate(kind.shape.dim):
            if size.WhichOneof("value") != "dim_value" or size.dim_value < 1:
                label = size.dim_param or "unknown"
                raise InvalidInput(
                    f"{self.g.name}: input {value.name}: dimension {axis} is dynamic ({label}) "
                    "-> export with fixed shapes, or python -m onnxruntime.tools.make_dynamic_shape_fixed"
                )
            sizes.append(size.dim_value)
        if not kind.HasField("shape"):
            raise InvalidInput(f"{self.g.name}: input {value.name} has no shape -> export with fixed shapes")
        if kind.elem_type in _FLOATS or kind.elem_type in _IDS:
            return self.g.input(value.name, sizes, "f32" if kind.elem_type in _FLOATS else "i64")
        if kind.elem_type not in _CODES:
            raise InvalidInput(
                f"{self.g.name}: input {value.name} has element type {kind.elem_type} -> use float or int64 inputs"
            )
        return Codes(self.g.input(value.name, sizes, "f32"), None, _CODES[kind.elem_type])

    def results(self, node: onnx.NodeProto) -> Sequence[Any]:
        """What the node's outputs are; nodes that cannot be imported are noted and give poison."""
        try:
            return self.translate(node)
        except Refused as refused:
            self.g.refuse(node.op_type, refused.why, refused.remedy)
        except _MALFORMED as error:
            self.g.refuse(node.op_type, f"is malformed ({error})", "export the model again")
        return [self.poison(name) for name in node.output]

    def poison(self, name: str) -> Act | None:
        """Stands for an output of a refused node, where onnx can tell its shape."""
        if self.shapes is None:
            self.shapes = _shapes(self.model)
        shape = self.shapes.get(name)
        return None if shape is None else self.g.poison(shape)

    def translate(self, node: onnx.NodeProto) -> Sequence[Any]:
        inputs = [self.env.get(name) for name in node.input]
        if any(name and value is None for name, value in zip(node.input, inputs, strict=True)):
            return [None] * len(node.output)  # follows a refused node
        attrs = _attributes(node)
        if node.op_type == "QuantizeLinear" and isinstance(inputs[0], Act):
            return [self.quantize(attrs, *inputs)]
        if node.op_type == "DequantizeLinear":
            return [self.dequantize(node, attrs, *inputs)]
        if any(isinstance(value, Codes) for value in inputs):
            raise Refused(
                "computes on integer codes", "use a QDQ model (QuantizeLinear, DequantizeLinear around float ops)"
            )
        if node.op_type in ("Shape", "Size") and isinstance(inputs[0], Act):
            shape = np.array(inputs[0].shape[attrs.get("start", 0) : attrs.get("end")], np.int64)
            return [Const(shape if node.op_type == "Shape" else np.array(math.prod(inputs[0].shape)), node.output[0])]
        if not any(isinstance(value, Act) for value in inputs):
            return self.evaluate(node, inputs)
        handler = TABLE.get(node.op_type)
        if handler is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
            raise Refused(
                "has no meaning in the op table",
                "replace it, or add edgeforge/ops/<op>.py and a row in frontend/onnx_ops.py",
            )
        before = len(self.g.nodes)
        made = handler(self.g, OnnxNode(node.op_type, attrs, len(node.output), self.opsets.get("", 1)), *inputs)
        if isinstance(made, Act) and len(self.g.nodes) > before:
            made = self.g.rename(made, node.output[0])
        return made if isinstance(made, list) else [made]

    def evaluate(self, node: onnx.NodeProto, inputs: Sequence[Any]) -> list[Const]:
        """A node without activations, by onnx.reference."""
        if node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range"):
            numbers = [abs(float(x)) for x in np.asarray(inputs[-1 if node.op_type != "Range" else 1].data).reshape(-1)]
            if math.prod(max(number, 1.0) for number in numbers) > LARGEST:
                raise Refused("makes a constant of more than 2**28 elements", "store less, or export again")
        feeds = {name: value.data for name, value in zip(node.input, inputs, strict=True) if name}
        versions = dict(self.opsets)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            # onnx.reference knows these from 19 on (same meaning); ONNX Runtime's own domain has the 16-bit ones.
            versions[""] = max(versions.get("", 1), 21)
            node = helper.make_node(node.op_type, node.input, node.output, **_attributes(node))
        opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        infos = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(data.dtype), data.shape)
            for name, data in feeds.items()
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        model = helper.make_model(helper.make_graph([node], "constant", infos, outputs), opset_imports=opsets)
        values = iter(reference.ReferenceEvaluator(model).run(None, feeds))
        return [_constant(np.asarray(next(values)), name) if name else None for name in node.output]

    def quantize(self, attrs: dict[str, Any], x: Act, scale: Const, zero: Const | None = None) -> Codes:
        dtype = "uint8" if zero is None else zero.data.dtype.name
        return Codes(x, _encoding(x.shape, dtype, scale, zero, attrs), dtype)

    def dequantize(
        self, node: onnx.NodeProto, attrs: dict[str, Any], x: Any, scale: Const, zero: Const | None = None
    ) -> Any:
        if isinstance(x, Act):
            raise Refused("dequantizes a float", "export the model again")
        if isinstance(x, Const):
            made = self.evaluate(node, [x, scale, zero][: len(node.input)])[0]
            kind = _weight_encoding(x.shape, x.data, scale, zero, attrs)
            return Const(made.data, x.name.removesuffix("_quantized"), kind)
        kind = _encoding(x.act.shape, x.dtype, scale, zero, attrs)
        if x.kind is not None and (x.kind.q != kind.q or x.kind.dtype != kind.dtype):
            raise Refused("dequantizes with another scale than the tensor was quantized with", "export the model again")
        act, known = x.act, self.g.encodings.get(x.act.name)
        if known is not None and (known.q != kind.q or known.dtype != kind.dtype):
            act = self.g.rename(self.g.emit("requantize", act), node.output[0])
        self.g.encodings[act.name] = kind
        return act


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of intermediate values as far as onnx can tell them."""
    try:
        graph = shape_inference.infer_shapes(model).graph
    except (shape_inference.InferenceError, *_MALFORMED):
        return {}
    found = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.value_info}
    return {name: tuple(sizes) for name, sizes in found.items() if sizes and min(sizes) > 0}


def _constant(data: np.ndarray, name: str) -> Const:
    """Floats of any width as float32; integers keep their dtype (4-bit ones are ml_dtypes')."""
    wide = data.dtype.kind == "f" or data.dtype.name == "bfloat16"
    return Const(data.astype(np.float32) if wide else data, name)


def _encoding(
    shape: tuple[int, ...], dtype: str, scale: Const, zero: Const | None, attrs: dict[str, Any]
) -> TensorType:
    """The encoding of an activation as unsigned codes; q None where it is per channel."""
    if isinstance(scale, Act) or isinstance(zero, Act) or dtype not in SHIFT:
        raise Refused(f"encodes with computed scales or as {dtype}", "use constant scales, 8 or 16 bits")
    kind, shift = SHIFT[dtype]
    if scale.data.size != 1:
        return TensorType(shape, kind)
    zero_point = 0 if zero is None else int(np.asarray(zero.data).reshape(-1)[0])
    return TensorType(shape, kind, QParams(np.float32(scale.data.reshape(())), zero_point + shift))


def _weight_encoding(
    shape: tuple[int, ...], codes: np.ndarray, scale: Const, zero: Const | None, attrs: dict[str, Any]
) -> TensorType:
    """The encoding of a constant as signed codes (16-bit ones unsigned, as activations); q None where it has blocks,
    or a zero point per channel."""
    dtype = codes.dtype.name
    kind, shift = SIGNED.get(dtype) or SHIFT.get(dtype) or ("i8", 0)
    zeros = np.zeros(1, np.int64) if zero is None else np.unique(zero.data.astype(np.int64))
    if attrs.get("block_size", 0) or zeros.size != 1 or scale.data.ndim > 1:
        return TensorType(shape, kind)
    if scale.data.size == 1:
        return TensorType(shape, kind, QParams(np.float32(scale.data.reshape(())), int(zeros[0]) + shift))
    axis = attrs.get("axis", 1) % max(len(shape), 1)
    return TensorType(shape, kind, QParams(scale.data.astype(np.float32), int(zeros[0]) + shift, axis))


def _source(node: onnx.NodeProto) -> str:
    """The module a node comes from (torch's exporter notes it), else the node's name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                break
            return clean(str(scopes[-2])) if len(scopes) > 1 and scopes[-2] else ""
    return clean(node.name or next(iter(node.output), "") or node.op_type)
