"""The chain float graph -> calibrate -> assign -> convert -> simulate, and the promises of the IR."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeforge.ops  # noqa: F401
from edgeforge.errors import EdgeForgeError, InvalidGraph, InvalidInput, Unsupported
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import OPS
from edgeforge.ir.rules import PROFILES
from edgeforge.ir.text import parse_graph, print_graph, tensors
from edgeforge.ir.types import QParams, TensorType, Value
from edgeforge.ir.verify import verify
from edgeforge.passes import optimize
from edgeforge.quantize.assign import assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert, with_profile
from edgeforge.recipe import Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.fast import Fast
from edgeforge.sim.reference import Reference
from edgeforge.target import load_target

CONV = {"stride": (1, 1), "dilation": (1, 1), "pads": (1, 1, 1, 1), "groups": 1}


class Build:
    """A float graph, node by node, with random constants."""

    def __init__(self, *shape: int):
        self.rng = np.random.default_rng(0)
        self.values = {"x": Value("x", TensorType(shape))}
        self.nodes: list[Node] = []

    def const(self, name: str, *shape: int) -> str:
        self.values[name] = Value(name, TensorType(shape), self.rng.normal(0, 0.3, shape).astype(np.float32))
        return name

    def node(self, op: str, output: str, *inputs: str, **attrs: object) -> str:
        self.nodes.append(Node(op, inputs, output, attrs, f"net.{output}"))
        self.values[output] = Value(output, TensorType((1,)))
        shape = OPS[op].infer(self.graph(output).view(self.nodes[-1]))
        self.values[output] = Value(output, TensorType(shape))
        return output

    def graph(self, output: str) -> Graph:
        return Graph("net", "float", ("x",), tuple(self.nodes), (output,), self.values)


def network() -> Graph:
    b = Build(1, 3, 16, 16)
    y = b.node("conv2d", "stem", "x", b.const("w1", 8, 3, 3, 3), b.const("b1", 8), **CONV)
    y = b.node("clip", "relu6", y, low_real=0.0, high_real=6.0)
    z = b.node("conv2d", "dw", y, b.const("w2", 8, 1, 3, 3), b.const("b2", 8), **{**CONV, "groups": 8})
    y = b.node("add", "sum", y, z)
    y = b.node(
        "conv2d", "dw2", y, b.const("w4", 8, 1, 3, 3), b.const("b4", 8), **{**CONV, "groups": 8, "stride": (2, 2)}
    )
    y = b.node("reduce_mean", "mean", y, axes=(2, 3), keepdims=True)
    y = b.node("reshape", "flat", y, shape=(1, 8))
    return b.graph(b.node("linear", "logits", y, b.const("w3", 10, 8), b.const("b3", 10)))


def samples(count: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def quantized(precision: str = "w8a8") -> tuple[Graph, Graph]:
    graph, target = optimize(verify(network())), load_target("snapdragon-8-gen-3")
    plan = assign(graph, calibrate(graph, samples()), Recipe(precision=precision), target)
    return graph, convert(graph, plan, target)


@pytest.mark.parametrize(("precision", "least_db"), [("w8a8", 30.0), ("w8a16", 35.0), ("w4a8", 10.0), ("w4a16", 10.0)])
def test_the_integers_stay_close_to_the_float_model(precision: str, least_db: float) -> None:
    graph, integer = quantized(precision)
    x = {"x": np.concatenate([s["x"] for s in samples()])}
    real = run_float(graph, x)["logits"]
    codes = simulate(integer, quantize_feeds(integer, x))
    error = dequantize_outputs(integer, codes)["logits"] - real
    assert 10 * np.log10((real**2).sum() / (error**2).sum()) > least_db


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
def test_fast_kernels_give_the_reference_integers(profile: str, precision: str) -> None:
    integer = with_profile(quantized(precision)[1], profile)
    codes = quantize_feeds(integer, samples()[0])
    fast, slow = simulate(integer, codes, Fast()), simulate(integer, codes, Reference())
    assert np.array_equal(fast["logits"], slow["logits"])


def test_text_parses_back_to_the_same_graph() -> None:
    integer = quantized()[1]
    again = parse_graph(print_graph(integer), tensors(integer))
    assert again.hash() == integer.hash()
    assert print_graph(again) == print_graph(integer)


def test_batch_norm_and_clamp_fold_into_the_convolution() -> None:
    graph = optimize(network())
    assert "clip" not in [node.op for node in graph.nodes]
    assert graph.producers()["relu6"].attrs["clamp"] == (0.0, 6.0)


def test_no_float_tensor_survives_and_verify_proves_it() -> None:
    integer = quantized()[1]
    assert all(value.type.dtype != "f32" for value in integer.values.values())
    broken = dict(integer.values)
    broken["sum"] = Value("sum", TensorType(broken["sum"].type.shape))
    with pytest.raises(InvalidGraph, match="sum: a float tensor"):
        verify(integer.rebuild(values=broken))


def test_a_bias_at_another_scale_is_rejected() -> None:
    integer = quantized()[1]
    bias = integer.values["b3"]
    assert bias.type.q is not None
    wrong = TensorType(bias.type.shape, "i32", QParams(bias.type.q.scale * np.float32(1.5), 0, 0))
    with pytest.raises(InvalidGraph, match=r"bias scale must be s_x \* s_w"):
        verify(integer.rebuild(values={**integer.values, "b3": Value("b3", wrong, bias.data)}))


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf, 1e-42])
def test_a_scale_that_is_no_normal_positive_number_is_rejected(scale: float) -> None:
    integer = quantized()[1]
    kind = dataclasses.replace(integer.type("logits"), q=QParams(np.float32(scale), 0))
    with pytest.raises(InvalidGraph, match="scale must be finite"):
        verify(integer.rebuild(values={**integer.values, "logits": Value("logits", kind)}))


def test_an_accumulator_beyond_int32_is_rejected() -> None:
    integer = quantized()[1]
    bias = integer.values["b3"]
    huge = Value("b3", bias.type, np.full(10, 2**31 - 1, np.int32))
    with pytest.raises(InvalidGraph, match="accumulator can reach"):
        verify(integer.rebuild(values={**integer.values, "b3": huge}))


def test_every_reason_of_a_refusal_is_collected() -> None:
    graph, target = optimize(network()), load_target("snapdragon-8-gen-3")
    with pytest.raises(Unsupported) as refused:
        assign(graph, calibrate(graph, samples(1)), Recipe(precision="w4a8-b32"), target)
    assert len(refused.value.reasons) == 4
    assert "overrides" in refused.value.reasons[0].remedy


def test_nan_in_calibration_names_the_sample() -> None:
    data = samples(2)
    data[1]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(InvalidInput, match="calibration sample 1: x holds NaN"):
        calibrate(optimize(network()), data)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_every_range_estimator_stays_inside_the_data(method: str) -> None:
    graph = optimize(network())
    seen = calibrate(graph, samples())
    for name, (low, high) in calibrate(graph, samples(), method).items():
        assert seen[name][0] - 1e-6 <= low <= high <= seen[name][1] + 1e-6


def test_an_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="did you mean snapdragon-8-gen-3"):
        load_target("snapdragon-8-gen-33")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_graph_text_is_an_error_and_never_a_traceback(data: st.DataObject) -> None:
    integer = quantized_once()
    text = list(print_graph(integer))
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.characters(max_codepoint=127))
    with contextlib.suppress(EdgeForgeError):
        verify(parse_graph("".join(text), tensors(integer)))


_ONCE: list[Graph] = []


def quantized_once() -> Graph:
    if not _ONCE:
        _ONCE.append(quantized()[1])
    return _ONCE[0]


def test_an_encoding_without_a_zero_point_is_named_with_its_line() -> None:
    with pytest.raises(InvalidInput, match="line 2: bad encoding"):
        parse_graph("graph g integer\nin %x: u8[1] q(0.5)\nout %x\n")
