"""Transposed convolution and resizing: imports, integers against torch, Hexagon's rules and forms, work."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgeforge.backends import _htp
from edgeforge.conformance.cases import make_case
from edgeforge.errors import Unsupported
from edgeforge.frontend.onnx import from_onnx
from edgeforge.frontend.torch import from_module
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import OPS
from edgeforge.ir.types import QParams, TensorType, Value
from edgeforge.passes import optimize
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import run_float, simulate
from edgeforge.sim.fast import Fast
from edgeforge.sim.reference import Reference
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")
ROWS = ("conv_transpose2d", "resize_nearest", "resize_bilinear")


@pytest.mark.parametrize(
    "module",
    [
        nn.ConvTranspose2d(3, 4, 3, 2, 1, 1),
        nn.ConvTranspose2d(3, 4, (2, 3), (2, 1), dilation=(1, 2), bias=False),
        nn.ConvTranspose2d(3, 3, 4, 2, 1, groups=3),
        nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU6()),
        nn.Upsample(scale_factor=2),
        nn.Upsample(size=(4, 13), mode="nearest-exact"),
        nn.Upsample(scale_factor=3, mode="bilinear"),
        nn.Upsample(size=(11, 4), mode="bilinear", align_corners=True),
    ],
)
def test_torch_layers_compute_the_same(module):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 5, 6)
    graph = optimize(from_module(module.eval(), (x,), "m").graph)
    assert len(graph.nodes) == 1
    with torch.no_grad():
        wanted = module(x).numpy()
    found = run_float(graph, {graph.inputs[0]: x.numpy()})[graph.outputs[0]]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def onnx_model(folder, node, constants, shape=(1, 3, 4, 6), opset=21):
    made = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    ports = [helper.make_tensor_value_info("x", 1, shape)], [helper.make_tensor_value_info("y", 1, [None] * 4)]
    model = helper.make_model(
        helper.make_graph([node], "m", *ports, made), opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


FORMS = [
    {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    {"mode": "nearest"},
    {"mode": "linear"},
    {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
]


@pytest.mark.parametrize("by", ["sizes", "scales"])
@pytest.mark.parametrize("form", FORMS)
def test_onnx_resize_computes_what_onnx_runtime_computes(tmp_path, form, by):
    constant = {"sizes": np.array([1, 3, 8, 18]), "scales": np.array([1, 1, 2, 3], np.float32)}[by]
    inputs = ["x", "", "", by] if by == "sizes" else ["x", "", by]
    path = onnx_model(tmp_path, helper.make_node("Resize", inputs, ["y"], **form), {by: constant})
    graph, x = from_onnx(path).graph, np.random.default_rng(0).normal(size=(1, 3, 4, 6)).astype(np.float32)
    (wanted,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(run_float(graph, {"x": x})[graph.outputs[0]], wanted, atol=1e-5)


def test_onnx_upsample_and_transposed_convolution(tmp_path):
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 6)).astype(np.float32)
    upsample = helper.make_node("Upsample", ["x", "s"], ["y"], mode="nearest")
    weights = np.random.default_rng(1).normal(size=(3, 5, 3, 3)).astype(np.float32)
    spread = helper.make_node(
        "ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 0]
    )
    for node, constants, opset in (
        (upsample, {"s": np.array([1, 1, 2, 2], np.float32)}, 9),
        (spread, {"w": weights}, 21),
    ):
        path = onnx_model(tmp_path, node, constants, opset=opset)
        graph, (wanted,) = from_onnx(path).graph, onnxruntime.InferenceSession(path).run(None, {"x": x})
        np.testing.assert_allclose(run_float(graph, {"x": x})[graph.outputs[0]], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="cubic"), "cubic"),
        (helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="nearest", nearest_mode="ceil"), "ceil"),
    ],
)
def test_resizing_that_no_runtime_does_exactly_is_refused(tmp_path, node, reason):
    with pytest.raises(Unsupported, match=reason):
        from_onnx(onnx_model(tmp_path, node, {"s": np.array([1, 3, 8, 12])}))


@pytest.mark.parametrize("profile", ["htp-v73", "xnnpack"])
@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
@pytest.mark.parametrize("op", ROWS)
def test_fast_kernels_give_the_integers_of_the_reference_and_stay_near_torch(op, precision, profile):
    for number in range(12):
        case = make_case(op, precision, number, 7)
        graph = with_profile(case.graph, profile)
        exact, found = simulate(graph, case.feeds, Reference()), simulate(graph, case.feeds, Fast())
        for name in graph.outputs:
            np.testing.assert_array_equal(found[name], exact[name])
        node = next(node for node in graph.nodes if node.op == op)
        if len(graph.nodes) == 1 and profile == "xnnpack":
            wanted = real_codes(graph, node, case.feeds)
            assert np.abs(exact[node.output] - wanted).max() <= (0 if op == "resize_nearest" else 0.52)


def real_codes(graph, node, feeds):
    """The op in float64 on real values, in steps of the output's encoding."""
    real = []
    for name in node.inputs:
        value = graph.values[name]
        codes = value.data if value.const else feeds[name]
        steps = codes.astype(np.int64) - value.type.q.zero
        real.append(torch.from_numpy(steps * value.type.q.broadcast(codes.shape).astype(np.float64)))
    kind = graph.type(node.output)
    y = OPS[node.op].torch(torch, graph.view(node), *real).numpy() / np.float64(kind.q.scale) + kind.q.zero
    return np.clip(y, 0, 255 if kind.dtype == "u8" else 65535)


def image(op, dtype, old, new, coordinates, codes):
    kind = QParams(np.float32(0.1), 3)
    x, y = (TensorType((1, 1, *size), dtype, kind) for size in (old, new))
    node = Node(op, ("x",), "y", {"size": new, "coordinates": coordinates})
    graph = Graph("g", "integer", ("x",), (node,), ("y",), {"x": Value("x", x), "y": Value("y", y)})
    feeds = {"x": np.array(codes, np.uint8 if dtype == "u8" else np.uint16).reshape(1, 1, *old)}
    return simulate(with_profile(graph, "htp-v73"), feeds)["y"][0, 0]


def test_hexagon_rounds_doubled_images_of_16_bits_twice():
    """(0 + 1 + 1) / 2 and (1 + 0 + 1) / 2 become 1 and 1, their mean 1; the exact mean of 0, 1, 1, 0 is 1/2, too; of
    0, 1, 0, 0 it is 1/4."""
    codes = image("resize_bilinear", "u16", (2, 2), (4, 4), "asymmetric", [0, 1, 0, 0])
    assert codes[1, 1] == 1 and codes[0].tolist() == [0, 1, 1, 1]
    assert image("resize_bilinear", "u16", (2, 2), (4, 4), "half_pixel", [0, 1, 0, 0])[1, 1] == 0


def test_hexagon_weighs_rows_of_8_bits_by_240ths():
    """4/9 of 225 is 100; 107/240 of it is 100.3, and of 255 it is 113.7 where 4/9 are 113.3."""
    codes = image("resize_bilinear", "u8", (5, 1), (10, 1), "align_corners", [0, 255, 0, 0, 0])
    assert codes[1, 0] == 114


def transposed(channels, groups=1, dtype="u8", **attrs):
    kernel = attrs.pop("kernel", 2)
    x = TensorType((1, channels, 3, 4), dtype, QParams(np.float32(0.1), 7))
    w = TensorType((channels, channels // groups, kernel, kernel), "i8", QParams(np.full(channels, 0.01), 0, axis=0))
    common = {"stride": (2, 2), "pads": (0, 0, 0, 0), "output_padding": (0, 0), "dilation": (1, 1)}
    node = Node("conv_transpose2d", ("x", "w"), "y", {**common, "groups": groups, **attrs})
    codes = np.random.default_rng(0).integers(-127, 128, w.shape).astype(np.int8)
    values = {"x": Value("x", x), "w": Value("w", w, codes), "y": Value("y", x)}
    shape = OPS["conv_transpose2d"].infer(Graph("g", "integer", ("x",), (node,), (), values).view(node))
    values["y"] = Value("y", TensorType(shape, dtype, QParams(np.float32(0.2), 90)))
    return Graph("g", "integer", ("x",), (node,), ("y",), values)


@pytest.mark.parametrize(
    "graph",
    [transposed(3, groups=3), transposed(2, output_padding=(1, 1)), transposed(2, dilation=(2, 2), kernel=3)],
    ids=["depthwise", "output padding", "dilated"],
)
def test_forms_that_hexagon_has_not_become_zeros_in_the_weights(graph):
    prepared, edits = _htp.prepare(graph, TARGET)
    node = prepared.nodes[0]
    assert (node.attrs["groups"], node.attrs["dilation"], node.attrs["output_padding"]) == (1, (1, 1), (0, 0))
    assert edits[0].what == "zeros in the weights"
    feeds = {"x": np.random.default_rng(1).integers(0, 256, graph.type("x").shape).astype(np.uint8)}
    before, after = (simulate(with_profile(g, "htp-v73"), feeds)["y"] for g in (graph, prepared))
    np.testing.assert_array_equal(after, before)


def test_plain_transposed_convolutions_stay():
    assert _htp.prepare(transposed(3), TARGET)[1] == ()


def test_work_of_transposed_convolution_and_resizing():
    graph = transposed(3)
    found = OPS["conv_transpose2d"].cost(graph.view(graph.nodes[0]))
    assert (found.macs, found.weight_bytes) == (3 * 4 * 3 * 3 * 2 * 2, 3 * 3 * 2 * 2)
    case = make_case("resize_bilinear", "w8a8", 0, 0)
    node = next(node for node in case.graph.nodes if node.op == "resize_bilinear")
    assert OPS["resize_bilinear"].cost(case.graph.view(node)).macs == 4 * case.graph.type(node.output).size
