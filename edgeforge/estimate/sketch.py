"""ONNX models by their shapes alone, for the estimator: every operator has a cost class here, also those that EdgeForge
cannot lower. What the vendor's compiler folds is folded: batch norm, casts, activation functions and norms that are
written out as arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper, shape_inference

from edgeforge.errors import InvalidInput
from edgeforge.estimate.program import Layer, Program, Shape

SAME = ("Identity", "Dropout", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
REDUCES = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "GlobalAveragePool", "GlobalMaxPool")
OPS = {
    "Relu": "relu", "LeakyRelu": "leaky_relu", "PRelu": "prelu", "Clip": "clip", "Add": "add", "Sub": "sub",
    "Mul": "mul", "Div": "div", "Sum": "add", "Max": "add", "Min": "add", "Where": "add", "Neg": "neg",
    "Reciprocal": "reciprocal", "Softmax": "softmax", "LogSoftmax": "softmax", "LayerNormalization": "layer_norm",
    "RMSNormalization": "rms_norm", "InstanceNormalization": "instance_norm", "GroupNormalization": "group_norm",
    "LpNormalization": "l2_norm", "BatchNormalization": "batch_norm", "MaxPool": "max_pool", "AveragePool": "avg_pool",
    "Resize": "resize", "Upsample": "resize", "ArgMax": "argmax", "TopK": "argmax", "Concat": "concat",
    "Slice": "slice", "Split": "slice", "Pad": "pad", "Gather": "gather", "GatherND": "gather",
    "GatherElements": "gather", "ScatterND": "gather", "ScatterElements": "gather", "Expand": "expand",
    "Tile": "expand", "DepthToSpace": "depth_to_space", "SpaceToDepth": "space_to_depth", "Transpose": "transpose",
    "Conv": "conv2d", "ConvTranspose": "conv_transpose", "Gemm": "linear", "MatMul": "matmul",
    "GridSample": "roi_align", "RoiAlign": "roi_align", "Sigmoid": "sigmoid", "Tanh": "tanh", "Gelu": "gelu",
    "HardSwish": "hardswish",
    "HardSigmoid": "hardsigmoid", "Erf": "erf", "Exp": "exp", "Sqrt": "sqrt", "Pow": "pow", "Softplus": "softplus",
    "Elu": "elu", "Mish": "mish", "Abs": "add", "Log": "log", "Sin": "sin", "Cos": "cos",
    **dict.fromkeys(RESHAPES, "reshape"),
    **dict.fromkeys(REDUCES, "reduce_mean"), "ReduceSum": "reduce_sum", "ReduceL2": "reduce_sum",
}  # fmt: skip
#: What may stand between a value and the factor or addend that is made of it: x * sigmoid(x), (x - mean(x)) / ...
ELEMENTWISE = (
    "Mul", "Div", "Add", "Sub", "Erf", "Sigmoid", "Tanh", "Softplus", "Exp", "Pow", "Sqrt", "Clip", "Relu",
    "HardSigmoid", "Abs", "Reciprocal",
)  # fmt: skip
#: Constants with more elements are weights; shape inference reads smaller ones.
WEIGHTS = 4096


def from_onnx(path: Path) -> Program:
    """The layers of an ONNX file. Raises InvalidInput on a damaged file and on shapes that are not fixed."""
    try:
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            if math.prod(tensor.dims) > WEIGHTS:
                tensor.ClearField("raw_data")
        model = shape_inference.infer_shapes(model, data_prop=True)
    except (DecodeError, OSError, ValueError, RuntimeError, shape_inference.InferenceError) as error:
        first = next(iter(str(error).strip().splitlines()), repr(error))
        raise InvalidInput(f"{path.name} cannot be read ({first}) -> export it again") from None
    return _Sketch(model.graph, path.stem).program()


class _Sketch:
    def __init__(self, graph: onnx.GraphProto, name: str):
        self.graph, self.name = graph, name
        self.dims: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.constants = set(self.dims)
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.HasField("shape"):
                self.dims.setdefault(value.name, tuple(d.dim_value for d in value.type.tensor_type.shape.dim))
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(value.name for value in graph.output)
        self.makers = {name: node for node in graph.node for name in node.output}
        self.alias: dict[str, str] = {}
        self.made: dict[str, Layer] = {}

    def program(self) -> Program:
        inputs = tuple(value.name for value in self.graph.input if value.name not in self.constants)
        for node in self.graph.node:
            self.node(node)
        outputs = tuple(dict.fromkeys(self.at(value.name) for value in self.graph.output))
        outputs = tuple(name for name in outputs if name not in self.constants)
        layers = tuple(self.made.values())
        named = [*inputs, *(name for layer in layers for name in (*layer.inputs, layer.output))]
        return Program(self.name, inputs, layers, outputs, {name: self.shape(name) for name in named})

    def at(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def shape(self, name: str) -> Shape:
        found = self.dims.get(name)
        if found is None or not all(found):
            where = f"input {name}" if name not in self.makers else f"{self.makers[name].op_type} {name}"
            raise InvalidInput(f"{self.name}: {where}: its shape is not fixed -> export with fixed shapes")
        return found

    def node(self, node: onnx.NodeProto) -> None:
        given = [name for name in node.input if name]
        active = [self.at(name) for name in given if self.at(name) not in self.constants]
        if node.op_type in ("Shape", "Size", "Constant", "ConstantOfShape", "Range", "IsNaN") or not active:
            self.constants.update(node.output)
            self.remember(node)
        elif node.op_type in SAME or self.folds(node, active):
            self.alias[node.output[0]] = active[0]
        elif len(active) == 2 and (root := self.common_root(node)):
            self.written_out(node, *root)
        else:
            for output in [name for name in node.output if name and (self.readers[name] or len(node.output) == 1)]:
                self.made[output] = self.layer(node, active, output)

    def remember(self, node: onnx.NodeProto) -> None:
        """Shapes of constants, which shape inference leaves out."""
        for attribute in node.attribute:
            if attribute.name == "value" and node.op_type == "Constant":
                self.dims[node.output[0]] = tuple(numpy_helper.to_array(attribute.t).shape)

    def folds(self, node: onnx.NodeProto, active: list[str]) -> bool:
        """Batch norm into the convolution before it; a constant factor into the function before it."""
        maker = self.made.get(active[0])
        if maker is None or (self.readers[node.input[0]] > 1 and node.op_type != "Where"):
            return False
        if node.op_type == "Where":  # torch guards softmax against rows without any entry
            return self.makers.get(node.input[0], node).op_type == "IsNaN"
        if node.op_type == "BatchNormalization":
            return maker.op in ("conv2d", "conv3d", "conv_transpose", "linear")
        return node.op_type in ("Mul", "Div") and len(active) == 1 and maker.op in ("curve", "layer_norm")

    def common_root(self, node: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]] | None:
        """The value that both operands of ``node`` are computed from, element by element, and the nodes between."""
        if node.op_type not in ("Mul", "Div", "Sub", "Add"):
            return None
        starts = [self.chain(name) for name in node.input]
        for name in starts[0]:
            if name in starts[1] and (starts[0][name] or starts[1][name]):
                return name, [*starts[0][name], *starts[1][name]]
        return None

    def chain(self, name: str) -> dict[str, list[onnx.NodeProto]]:
        """Values upstream of ``name`` along operators of one activation, and the nodes passed on the way."""
        found: dict[str, list[onnx.NodeProto]] = {self.at(name): []}
        passed: list[onnx.NodeProto] = []
        while len(passed) < 6:
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in (*ELEMENTWISE, "ReduceMean", *SAME) or self.readers[name] > 1:
                break
            active = [part for part in maker.input if part and self.at(part) not in self.constants]
            if len(active) != 1:
                break
            passed = [*passed, maker]
            name = active[0]
            found.setdefault(self.at(name), passed)
        return found

    def written_out(self, node: onnx.NodeProto, root: str, between: list[onnx.NodeProto]) -> None:
        """One layer in place of ``between`` and ``node``: a norm if it averages, else a function of one value."""
        for name in (name for part in between for name in part.output):
            self.made.pop(name, None)
        averages = any(part.op_type in REDUCES for part in between)
        if averages and node.op_type == "Sub":
            self.alias[node.output[0]] = root  # x - mean(x): the norm that follows reads x
            return
        op, output = "layer_norm" if averages else "curve", node.output[0]
        self.made[output] = Layer(op, (root,), output, source=node.name)

    def layer(self, node: onnx.NodeProto, active: list[str], output: str) -> Layer:
        op = OPS.get(node.op_type, "exotic")
        attrs = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        weights = sum(math.prod(self.dims.get(name, ())) for name in node.input if self.at(name) in self.constants)
        shape, source = self.shape(output), node.name
        if op in ("conv2d", "conv_transpose"):
            kernel = self.shape(node.input[1])
            groups, dims = attrs.get("group", 1), len(kernel) - 2
            fan_in = kernel[1] if op == "conv2d" else kernel[0] // groups
            made = {
                "kernel": kernel[2:], "stride": attrs.get("strides", [1] * dims), "fan_in": fan_in,
                "dilation": attrs.get("dilations", [1] * dims), "groups": groups,
            }  # fmt: skip
            area = math.prod(shape) if op == "conv2d" else math.prod(self.shape(active[0])) // fan_in * kernel[1]
            op = "conv3d" if dims == 3 and op == "conv2d" else op
            return Layer(op, tuple(active), output, weights, area * fan_in * math.prod(kernel[2:]), made, source)
        if op in ("linear", "matmul"):
            fan_in = self.shape(active[0])[-2 if attrs.get("transA") else -1]
            op = "linear" if len(active) == 1 else "matmul"
            made = {"fan_in": fan_in}
            return Layer(op, tuple(active), output, weights, math.prod(shape) * fan_in, made, source)
        made = {}
        if op == "pad":
            made["mode"] = attrs.get("mode", b"constant").decode()
        elif op == "transpose":
            made["perm"] = tuple(attrs.get("perm", range(len(shape))[::-1]))
        elif op in ("max_pool", "avg_pool"):
            kernel = tuple(attrs["kernel_shape"])
            made |= {"kernel": kernel, "stride": tuple(attrs.get("strides", (1,) * len(kernel)))}
        return Layer(op, tuple(active), output, weights, 0, made, source)
