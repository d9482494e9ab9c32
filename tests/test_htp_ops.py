"""Hexagon's sums of products, sums, products, averages and changes of encoding against integers that the HTP emulator
gave, so that they are tested where its package is not installed."""

from __future__ import annotations

import numpy as np
import pytest
from record_htp import BACKEND, RECORDED, cases, digest, emulated, head, prefix, simulated

import edgeforge.ops  # noqa: F401
from edgeforge.backends import _htp
from edgeforge.conformance.cases import make_case
from edgeforge.dialects.onnx import to_onnx
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.rules import rule_of
from edgeforge.ir.types import QParams, TensorType, Value
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import simulate
from edgeforge.sim.parity import explode, exploded_feeds, per_node, trace
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")
CASES = {prefix(case): case for case in cases()}


@pytest.fixture(scope="module")
def recorded() -> dict[str, tuple[str, int, np.ndarray]]:
    with np.load(RECORDED) as kept:
        rows = zip(kept["names"], kept["graphs"], kept["digests"], kept["heads"], strict=True)
        return {str(name): (str(graph), int(code), first) for name, graph, code, first in rows}


@pytest.mark.parametrize("name", CASES)
def test_the_simulator_gives_the_recorded_integers(name, recorded):
    graph, wanted, first = recorded[name]
    assert CASES[name].graph.hash() == graph, "the case changed: run tests/record_htp.py where the emulator is"
    codes = simulated(CASES[name])
    np.testing.assert_array_equal(head(codes), first)
    assert digest(codes) == wanted


@pytest.mark.slow
@pytest.mark.skipif(bool(BACKEND.missing()), reason="needs onnxruntime-qnn")
def test_fresh_cases_agree_with_the_emulator():
    fresh = [make_case(op, "w8a16", k, 99, TARGET) for op in ("conv2d", "avg_pool", "linear") for k in range(8)]
    for case, codes in zip(fresh, emulated(fresh), strict=True):
        np.testing.assert_array_equal(simulated(case), codes)


def convolution(dtype: str, kernel: tuple[int, int], channels: int, stride: int = 2, pad: int = 0) -> Graph:
    """A depthwise convolution on 12 x 12 pixels."""
    size = tuple((12 + 2 * pad - side) // stride + 1 for side in kernel)
    x = TensorType((1, channels, 12, 12), dtype, QParams(np.float32(0.01), 3))
    w = TensorType((channels, 1, *kernel), "i8", QParams(np.full(channels, np.float32(0.01)), 0, axis=0))
    y = TensorType((1, channels, *size), dtype, QParams(np.float32(0.02), 3))
    values = {"x": Value("x", x), "w": Value("w", w, np.ones(w.shape, np.int8)), "y": Value("y", y)}
    attrs = {"stride": (stride, stride), "dilation": (1, 1), "pads": (pad,) * 4, "groups": channels}
    return Graph("conv", "integer", ("x",), (Node("conv2d", ("x", "w"), "y", attrs),), ("y",), values)


@pytest.mark.parametrize(
    ("dtype", "kernel", "channels", "stride", "rule"),
    [
        ("u8", (3, 3), 8, 2, "htp_depthwise_2"),
        ("u16", (3, 3), 8, 2, "htp_depthwise_2"),
        ("u8", (4, 4), 8, 2, "htp_depthwise_2"),
        ("u16", (4, 4), 8, 2, "htp16"),
        ("u8", (2, 2), 8, 2, "htp8"),
        ("u16", (3, 3), 8, 1, "htp16"),
        ("u16", (3, 3), 1, 2, "htp16"),
    ],
)
def test_depthwise_kernels_of_stride_2_have_their_own_rule(dtype, kernel, channels, stride, rule):
    graph = convolution(dtype, kernel, channels, stride)
    assert rule_of("htp-v73", "dot", graph.view(graph.nodes[0])).name == rule


def test_a_form_that_hexagon_pads_wrongly_is_padded_apart():
    prepared, edits = _htp.prepare(convolution("u16", (5, 5), 8, pad=2), TARGET)
    assert [node.op for node in prepared.nodes] == ["pad", "conv2d"]
    assert prepared.nodes[1].attrs["pads"] == (0, 0, 0, 0) and edits[0].where == "y"
    assert len(_htp.prepare(convolution("u16", (3, 3), 8, pad=1), TARGET)[0].nodes) == 1


def test_a_form_that_hexagon_computes_wrongly_is_refused():
    reason = _htp.refusals(convolution("u8", (2, 2), 3), TARGET)[0]
    assert "2 to 4 channels" in reason.why and reason.remedy
    assert not _htp.refusals(convolution("u8", (2, 2), 8), TARGET)


def mixing(groups: int, repeated: int, rows: int) -> Graph:
    """The mixing of values in attention: [1, groups * repeated, rows, 24] scores times [1, groups, 24, 16] values."""
    heads, q16 = groups * repeated, QParams(np.float32(4 / 65535), 32768)
    kinds = {
        "a": TensorType((1, heads, rows, 24), "u16", QParams(np.float32(1 / 65536))),
        "rows": TensorType((1, groups, repeated * rows, 24), "u16", QParams(np.float32(1 / 65536))),
        "b": TensorType((1, groups, 24, 16), "u8", QParams(np.float32(0.02), 128)),
        "m": TensorType((1, groups, repeated * rows, 16), "u16", q16),
        "q": TensorType((1, groups, repeated * rows, 16), "u8", QParams(np.float32(4 / 255), 128)),
        "y": TensorType((1, heads, rows, 16), "u8", QParams(np.float32(4 / 255), 128)),
    }
    nodes = (
        Node("reshape", ("a",), "rows", {"shape": kinds["rows"].shape}),
        Node("matmul", ("rows", "b"), "m"),
        Node("requantize", ("m",), "q"),
        Node("reshape", ("q",), "y", {"shape": kinds["y"].shape}),
    )
    values = {name: Value(name, kind) for name, kind in kinds.items()}
    return with_profile(Graph("mixing", "integer", ("a", "b"), nodes, ("y",), values), TARGET.numerics)


def test_heads_whose_rows_hexagon_mixes_up_are_refused():
    (reason,) = _htp.refusals(mixing(2, 2, 8), TARGET)
    assert "mixes up the rows" in reason.why and "language.chunk" in reason.remedy
    for groups, repeated, rows in ((2, 2, 16), (1, 2, 8), (2, 4, 8), (2, 1, 8)):
        assert not _htp.refusals(mixing(groups, repeated, rows), TARGET)


@pytest.mark.skipif(bool(BACKEND.missing()), reason="needs onnxruntime-qnn")
@pytest.mark.parametrize(("shape", "right"), [((2, 2, 8), False), ((2, 2, 16), True)])
def test_hexagon_mixes_up_the_rows_that_are_refused_and_no_others(shape, right):
    graph, rng = mixing(*shape), np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(24), graph.type("a").shape[:3])
    values = rng.integers(0, 256, graph.type("b").shape).astype(np.uint8)
    feeds = {"a": np.rint(scores * 65535).astype(np.uint16), "b": values}
    found = BACKEND.evaluate(graph, TARGET, feeds)["y"] == simulate(graph, feeds)["y"]
    assert found.all() if right else found.mean() < 0.5


def test_clamps_are_written_so_that_hexagon_does_not_merge_them():
    case = next(c for c in CASES.values() if "clamp" in c.graph.nodes[0].attrs and c.graph.values["y"].type.q.zero > 0)
    ops = [node.op_type for node in to_onnx(case.graph).graph.node]
    assert "Relu" not in ops and "Clip" not in ops and {"Max", "Min"} & set(ops)


def test_block_wise_weights_are_written_with_two_levels_of_scales():
    case = next(c for name, c in CASES.items() if name.startswith("linear.w4a16-b32"))
    model = to_onnx(case.graph, two_level=True)
    chain = [node.op_type for node in model.graph.node if "w/" in "".join(node.input)]
    assert chain[:3] == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear"]
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    assert initializers["w/multiples"].data_type == 2 and initializers["w/real"].data_type == 1


def chain(*nodes: Node, zero: int = 40, dtype: str = "u8", shape: tuple[int, ...] = (1, 4, 6, 6)) -> Graph:
    """Nodes of one input each, all of one encoding, but that a requantize doubles the scale."""
    values, scale = {"x": Value("x", TensorType(shape, dtype, QParams(np.float32(0.02), zero)))}, 0.02
    for node in nodes:
        scale *= 2 if node.op == "requantize" else 1
        values[node.output] = Value(node.output, TensorType(shape, dtype, QParams(np.float32(scale), zero)))
    return Graph("chain", "integer", ("x",), nodes, (nodes[-1].output,), values)


@pytest.mark.parametrize(
    ("nodes", "zero", "rule"),
    [
        ((Node("requantize", ("x",), "y"),), 40, "htp_requantize"),
        ((Node("relu", ("x",), "r"), Node("requantize", ("r",), "y")), 40, "htp_table"),
        ((Node("relu", ("x",), "r"), Node("requantize", ("r",), "y")), 0, "htp_requantize"),
        ((Node("requantize", ("x",), "y"), Node("sigmoid", ("y",), "z")), 40, "htp_table"),
        ((Node("silu", ("x",), "s"), Node("requantize", ("s",), "y")), 40, "htp_requantize"),
    ],
)
def test_a_requantize_beside_a_table_becomes_part_of_it(nodes, zero, rule):
    graph = chain(*nodes, zero=zero)
    view = graph.view(graph.producers()["y"])
    assert rule_of("htp-v73", "table", view).name == rule


@pytest.mark.slow
@pytest.mark.skipif(bool(BACKEND.missing()), reason="needs onnxruntime-qnn")
def test_a_node_alone_is_compared_by_its_rule_alone(tmp_path):
    """The requantize rounds otherwise in the network, where it is part of the relu's table."""
    graph = chain(Node("relu", ("x",), "r"), Node("requantize", ("r",), "y"), shape=(1, 256))
    graph.values["y"] = Value("y", TensorType((1, 256), "u8", QParams(np.float32(0.02 * 0.444), 0)))
    graph = with_profile(graph, TARGET.numerics)
    feeds = {"x": np.arange(256, dtype=np.uint8)[None]}
    codes, cut = trace(graph, feeds), with_profile(explode(graph), TARGET.numerics)
    alone = exploded_feeds(graph, codes)
    assert (simulate(cut, alone)["y"] != codes["y"]).any()
    assert [node.identical for node in per_node(BACKEND, tmp_path, cut, TARGET, alone)] == [1.0, 1.0]
    np.testing.assert_array_equal(BACKEND.evaluate(graph, TARGET, feeds)["y"], codes["y"])


def test_a_relu_behind_a_clip_is_joined_with_it():
    clip = Node("clip", ("x",), "c", {"low_real": -1.0, "high_real": 2.0})
    prepared, edits = _htp.prepare(chain(clip, Node("relu", ("c",), "y")), TARGET)
    assert [(node.op, node.output, node.attrs) for node in prepared.nodes] == [
        ("clip", "y", {"low_real": 0.0, "high_real": 2.0})
    ]
    assert "upper limit" in edits[0].why


def test_padding_at_the_right_is_kept_off_element_wise_results_of_16_bits():
    def padded(dtype: str, pads: tuple[int, int, int, int]) -> list[str]:
        graph = chain(Node("relu", ("x",), "r"), Node("pad", ("r",), "y", {"pads": pads}), dtype=dtype)
        return [node.op for node in _htp.prepare(graph, TARGET)[0].nodes]

    assert padded("u16", (1, 0, 1, 2)) == ["relu", "max_pool", "pad"]
    assert padded("u16", (1, 1, 1, 2)) == padded("u8", (1, 0, 1, 2)) == ["relu", "pad"]


def test_rsqrt_is_written_as_two_functions_with_integer_kernels():
    prepared, _ = _htp.prepare(chain(Node("rsqrt", ("x",), "y"), zero=0), TARGET)
    assert [node.op for node in prepared.nodes] == ["sqrt", "reciprocal"]
    assert float(prepared.type(prepared.nodes[0].output).q.scale) == pytest.approx((255 * 0.02) ** 0.5 / 255)


@pytest.mark.parametrize(
    ("axes", "keepdims", "ops"),
    [
        ((2, 3), True, ["reduce_mean"]),
        ((3,), True, ["reshape", "reduce_mean", "reshape"]),
        ((1, 3), False, ["transpose", "reshape", "reduce_mean", "reshape"]),
    ],
)
def test_every_mean_is_written_as_the_mean_of_an_image(axes, keepdims, ops):
    shape = (1, 4, 6, 6)
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(shape) if keepdims or axis not in axes)
    graph = chain(Node("reduce_mean", ("x",), "y", {"axes": axes, "keepdims": keepdims}))
    graph.values["y"] = Value("y", TensorType(kept, "u8", graph.type("y").q))
    prepared, _ = _htp.prepare(graph, TARGET)
    mean = next(node for node in prepared.nodes if node.op == "reduce_mean")
    assert [node.op for node in prepared.nodes] == ops and mean.attrs == {"axes": (2, 3), "keepdims": True}
    assert prepared.type("y").shape == kept


@pytest.mark.parametrize(
    ("ratio", "refused"),
    [(0.125, False), (0.125 * (1 + 1e-5), True), (0.125 * (1 + 1e-4), False), (0.0625 * (1 + 1e-5), False)],
)
def test_a_product_whose_compilation_would_not_end_is_refused(ratio, refused):
    graph = chain(Node("mul", ("x", "x"), "y"), dtype="u16")
    q = graph.type("x").q
    wide = QParams(np.float32(float(q.scale) ** 2 / ratio), q.zero)
    graph.values["y"] = Value("y", TensorType(graph.type("y").shape, "u16", wide))
    assert bool(_htp.refusals(graph, TARGET)) == refused
