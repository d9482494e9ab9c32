"""QDQ models keep their encodings: the integer graph has the file's scales and the file's weight codes."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from frontend_models import build, example
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edgeforge.errors import Unsupported
from edgeforge.frontend.onnx import from_onnx
from edgeforge.passes import optimize
from edgeforge.quantize.convert import convert
from edgeforge.quantize.keep import plan_from
from edgeforge.recipe import Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, simulate
from edgeforge.target import load_target

RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-127, 128, (6, 4, 3, 3)).astype(np.int8)
SCALES = np.linspace(0.002, 0.004, 6).astype(np.float32)
GEMM = RANDOM.integers(-127, 128, (10, 6)).astype(np.int8)
BIAS = RANDOM.integers(-500, 500, 6).astype(np.int32)


class Qdq:
    """A QDQ model written by hand: conv, relu, max pool, residual add, global pool, gemm."""

    def __init__(self, signed=False):
        self.nodes, self.weights, self.signed = [], {}, signed

    def constant(self, name, data):
        self.weights[name] = np.asarray(data)
        return name

    def pair(self, x, scale, zero, dtype=None):
        """QuantizeLinear and DequantizeLinear of an activation; gives the dequantized name."""
        dtype = dtype or (np.int8 if self.signed else np.uint8)
        zero = zero - 128 if self.signed else zero
        s, z = self.constant(f"{x}_s", np.float32(scale)), self.constant(f"{x}_z", dtype(zero))
        self.nodes.append(helper.make_node("QuantizeLinear", [x, s, z], [f"{x}_q"]))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{x}_q", s, z], [f"{x}_d"]))
        return f"{x}_d"

    def weight(self, name, codes, scale, zero=None, axis=0):
        inputs = [self.constant(f"{name}_quantized", codes), self.constant(f"{name}_s", np.float32(scale))]
        zero = np.zeros(np.shape(scale), codes.dtype) if zero is None else np.full(np.shape(scale), zero, codes.dtype)
        inputs.append(self.constant(f"{name}_z", zero))
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=axis))
        return name

    def op(self, op, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def save(self, path):
        infos = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 4, 8, 8]), ("y_d", [1, 10]))
        ]
        constants = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "qdq", infos[:1], infos[1:], constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return path


def written(path, signed=False, pooled=(0.02, 0), weight_zero=None, weights=CODES, bias_scale=None, relu_encoded=True):
    m = Qdq(signed)
    x = m.pair("x", 0.03, 120)
    w = m.weight("w", weights, SCALES, weight_zero)
    scale = np.float32(0.03) * SCALES if bias_scale is None else bias_scale
    b = m.weight("b", BIAS, scale)
    relu = m.op("Relu", [m.op("Conv", [x, w, b], "conv", pads=[1, 1, 1, 1])], "relu")
    relu = m.pair(relu, 0.02, 0) if relu_encoded else relu
    pool = m.pair(m.op("MaxPool", [relu], "pool", kernel_shape=[2, 2], strides=[2, 2]), *pooled)
    total = m.pair(m.op("Add", [pool, pool], "sum"), 0.04, 0)
    mean = m.pair(m.op("GlobalAveragePool", [total], "mean"), 0.03, 0)
    flat = m.pair(m.op("Flatten", [mean], "flat"), 0.03, 0)
    g = m.weight("g", GEMM, 0.004)
    m.pair(m.op("Gemm", [flat, g], "y", transB=1), 0.05, 128)
    return m.save(path)


def load(path):
    imported = from_onnx(path)
    return replace(imported, graph=optimize(imported.graph))


def kept(path, target="snapdragon-8-gen-3"):
    chosen = load_target(target)
    imported = load(path)
    return convert(imported.graph, plan_from(imported, Recipe(), chosen), chosen)


def real_output(graph, x):
    return dequantize_outputs(graph, simulate(graph, quantize_feeds(graph, {"x": x})))[graph.outputs[0]]


IMAGE = RANDOM.normal(size=(1, 4, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("signed", [False, True])
def test_encodings_and_weight_codes_of_the_file_are_kept(signed, tmp_path):
    path = written(tmp_path / "m.onnx", signed)
    graph = kept(path)
    encoded = {name: graph.type(name) for name in ("x", "relu", "pool", "sum", "mean", "flat", "y")}
    assert {kind.dtype for kind in encoded.values()} == {"u8"}
    assert (encoded["x"].q.scale, encoded["x"].q.zero) == (np.float32(0.03), 120)
    assert (encoded["y"].q.scale, encoded["y"].q.zero) == (np.float32(0.05), 128)
    assert np.array_equal(graph.values["w"].data, CODES)
    assert np.array_equal(graph.type("w").q.scale, SCALES)
    assert np.array_equal(graph.values["b"].data, BIAS)
    assert np.array_equal(graph.values["g"].data, GEMM)
    want = ort.InferenceSession(path).run(None, {"x": IMAGE})[0]
    assert np.abs(real_output(graph, IMAGE) - want).max() <= 0.05 + 1e-6, "more than one step of the output"


def test_an_encoding_that_only_one_of_a_group_has_is_shared(tmp_path):
    graph = kept(written(tmp_path / "m.onnx", relu_encoded=False))
    assert graph.type("relu").q == graph.type("pool").q


def refusals(path, target="snapdragon-8-gen-3"):
    with pytest.raises(Unsupported) as caught:
        kept(path, target)
    assert all("--requantize" in reason.remedy for reason in caught.value.reasons)
    return {reason.where: reason.why for reason in caught.value.reasons}


def test_all_conflicts_are_listed_per_tensor(tmp_path):
    lowest = CODES.copy()
    lowest[0, 0, 0, 0] = -128
    found = refusals(written(tmp_path / "m.onnx", pooled=(0.01, 3), weights=lowest, bias_scale=SCALES))
    assert set(found) >= {"w", "pool"}
    assert "code -128" in found["w"] and "shares one encoding with relu" in found["pool"]


def test_asymmetric_weights_and_foreign_bias_scales_are_conflicts(tmp_path):
    assert "asymmetric (zero point 3)" in refusals(written(tmp_path / "m.onnx", weight_zero=3))["w"]
    assert "s_x * s_w" in refusals(written(tmp_path / "m.onnx", bias_scale=SCALES))["b"]


def test_tensor_without_encoding_is_a_conflict(tmp_path):
    m = Qdq()
    x = m.pair("x", 0.03, 120)
    relu = m.op("Sigmoid", [x], "gate")
    m.pair(m.op("Flatten", [m.op("GlobalAveragePool", [relu], "mean")], "y"), 0.05, 0)
    m.nodes[-1].output[0] = "y_d"
    found = refusals(m.save(tmp_path / "m.onnx"))
    assert found == {"gate": "has no encoding in the file"}


def test_encoding_that_the_hardware_dictates_is_a_conflict(tmp_path):
    m = Qdq()
    gate = m.pair(m.op("Sigmoid", [m.pair("x", 2e-4, 30000, np.uint16)], "gate"), 2e-5, 0, np.uint16)
    m.pair(m.op("Flatten", [m.op("GlobalAveragePool", [gate], "mean")], "y"), 2e-5, 0, np.uint16)
    found = refusals(m.save(tmp_path / "m.onnx"))
    assert "writes scale 1/65536" in found["gate"]


def test_uint8_weights_around_128_are_signed_weights(tmp_path):
    m = Qdq()
    w = m.weight("w", (CODES.astype(np.int16) + 128).astype(np.uint8), SCALES, 128)
    conv = m.pair(m.op("Conv", [m.pair("x", 0.03, 120), w], "conv"), 0.05, 128)
    m.pair(m.op("Flatten", [m.pair(m.op("GlobalAveragePool", [conv], "mean"), 0.05, 128)], "y"), 0.05, 128)
    assert np.array_equal(kept(m.save(tmp_path / "m.onnx")).values["w"].data, CODES)


def test_transposed_matmul_weights_keep_codes_and_axis(tmp_path):
    m = Qdq()
    scale = np.linspace(0.01, 0.02, 10).astype(np.float32)
    w = m.weight("w", GEMM[:, :4].T.copy(), scale, axis=1)
    mean = m.pair(
        m.op("ReduceMean", [m.pair("x", 0.03, 120), m.constant("axes", [2, 3])], "mean", keepdims=0), 0.01, 128
    )
    m.pair(m.op("MatMul", [mean, w], "y"), 0.05, 128)
    graph = kept(m.save(tmp_path / "m.onnx"))
    value = next(v for v in graph.constants() if v.type.dtype == "i8")
    assert np.array_equal(value.data, GEMM[:, :4])
    assert np.array_equal(value.type.q.scale, scale) and value.type.q.axis == 0


class Samples(CalibrationDataReader):
    def __init__(self, name):
        self.rows = iter([{"x": example(name, seed=seed).numpy()} for seed in range(8)])

    def get_next(self):
        return next(self.rows, None)


@functools.cache
def quantized_by_ort(folder, name):
    plain, path = folder / f"{name}.onnx", folder / f"{name}-qdq.onnx"
    torch.onnx.export(
        build(name), (example(name),), plain, opset_version=18, dynamo=True, input_names=["x"], verbose=False
    )
    options = {"WeightSymmetric": True, "ActivationSymmetric": False}
    quantize_static(
        plain, path, Samples(name), quant_format=QuantFormat.QDQ, per_channel=True, extra_options=options,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


def test_model_quantized_by_onnx_runtime_is_kept(tmp_path):
    path = quantized_by_ort(tmp_path, "resnet")
    graph = kept(path)
    x = example("resnet", seed=3).numpy()
    want = ort.InferenceSession(path).run(None, {"x": x})[0]
    error = np.abs(real_output(graph, x) - want).max()
    assert error <= 3 * float(graph.type(graph.outputs[0]).q.scale), f"{error} against ONNX Runtime's integers"
