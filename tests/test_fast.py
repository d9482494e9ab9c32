"""The fast kernels against the readable ones: random one-op graphs per family, under every runtime's rounding rules."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import edgeforge.ops  # noqa: F401
from edgeforge.errors import InvalidGraph
from edgeforge.ir import qfloat
from edgeforge.ir.fixed import channel_scale
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import OPS
from edgeforge.ir.rules import PROFILES
from edgeforge.ir.rules.htp_unary import measured_node
from edgeforge.ir.types import NUMPY, RANGE, QParams, TensorType, Value
from edgeforge.quantize.convert import with_profile
from edgeforge.quantize.widths import equal_widths
from edgeforge.sim import fast, rounding, rows, threads
from edgeforge.sim.evaluate import simulate
from edgeforge.sim.fast import Fast
from edgeforge.sim.reference import Reference

WIDTHS = st.sampled_from(["u8", "u16"])
#: Scales whose ratios shift left and right and saturate.
SCALES = st.floats(-9, 3).map(lambda e: np.float32(2.0**e))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every block, table and thread path is taken by small arrays; two threads."""
    for name, value in {"SUMS": 512, "CODES": 64, "FEW_ROWS": 5, "COLUMNS": 4, "WORTH_A_TABLE": 50}.items():
        monkeypatch.setattr(fast, name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def checks(function: Callable[..., None]) -> Callable[..., None]:
    function = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))(function)
    return given(st.data())(function)


class Random:
    """A one-op integer graph whose shapes and encodings hypothesis draws."""

    def __init__(self, data: st.DataObject):
        self.draw = data.draw
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        self.values: dict[str, Value] = {}
        self.feeds: dict[str, np.ndarray] = {}

    def size(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def encoding(self, dtype: str) -> QParams:
        low, high = RANGE[dtype]
        zero = self.draw(st.one_of(st.sampled_from([low, high, (low + high + 1) // 2]), st.integers(low, high)))
        return QParams(self.draw(SCALES), zero)

    def codes(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Uniform codes, extremes only, or one extreme everywhere."""
        low, high = RANGE[dtype]
        kind = self.draw(st.sampled_from(["uniform", "ends", "lowest", "highest"]))
        made = {
            "uniform": lambda: self.rng.integers(low, high + 1, shape),
            "ends": lambda: self.rng.choice([low, high], shape),
            "lowest": lambda: np.full(shape, low),
            "highest": lambda: np.full(shape, high),
        }[kind]()
        return made.astype(NUMPY[dtype])

    def act(self, name: str, shape: tuple[int, ...], dtype: str, q: QParams | None = None, const: bool = False) -> str:
        codes = self.codes(shape, dtype)
        kind = TensorType(shape, dtype, q or self.encoding(dtype))
        self.values[name] = Value(name, kind, codes if const else None)
        if not const:
            self.feeds[name] = codes
        return name

    def weights(self, shape: tuple[int, ...], dtype: str = "i8") -> str:
        scale = 2.0 ** self.rng.uniform(-8, 0, shape[0])
        q = QParams(scale.astype(np.float32), 0, axis=0)
        self.values["w"] = Value("w", TensorType(shape, dtype, q), self.codes(shape, dtype))
        return "w"

    def bias(self, x: str, channels: int) -> list[str]:
        if not self.draw(st.booleans()):
            return []
        qx, qw = self.values[x].type.q, self.values["w"].type.q
        assert qx is not None and qw is not None
        scale = qx.scale * channel_scale(qw).astype(np.float32)
        reach = self.draw(st.sampled_from([1000, 2**24, 2**30]))
        codes = self.rng.integers(-reach, reach, channels).astype(np.int32)
        kind = TensorType((channels,), "i32", QParams(np.broadcast_to(scale, channels).copy(), 0, axis=0))
        self.values["b"] = Value("b", kind, codes)
        return ["b"]

    def graph(self, op: str, inputs: list[str], dtype: str, q: QParams | None = None, **attrs: Any) -> Graph:
        node = Node(op, tuple(inputs), "y", attrs)
        known = {**self.values, "y": Value("y", TensorType((1,), dtype, q or self.encoding(dtype)))}
        feeds = tuple(name for name in inputs if name in self.feeds)
        draft = Graph("one", "integer", tuple(dict.fromkeys(feeds)), (node,), ("y",), known)
        shape = tuple(OPS[op].infer(draft.view(node)))
        known["y"] = Value("y", TensorType(shape, dtype, known["y"].type.q))
        return draft.rebuild(values=known)

    def clamp(self) -> dict[str, Any]:
        return {"clamp": (0.0, 6.0)} if self.draw(st.booleans()) else {}

    def agree(self, graph: Graph) -> None:
        """Same integers under every profile that takes the graph: when it is prepared, and when it was. Hexagon gets it
        with equal widths."""
        ran = 0
        for profile in PROFILES:
            try:
                rounded = with_profile(equal_widths(graph) if profile.startswith("htp") else graph, profile)
            except InvalidGraph:
                continue
            ran += 1
            expected = simulate(rounded, self.feeds, Reference())["y"]
            for _ in range(2):
                found = simulate(rounded, self.feeds, Fast())["y"]
                assert found.dtype == expected.dtype, profile
                np.testing.assert_array_equal(found, expected, err_msg=f"{profile}: {rounded.nodes[0].rule}")
        assume(ran)


@checks
def test_linear(data: st.DataObject) -> None:
    r = Random(data)
    depth, channels = r.size(1, 70), r.size(1, 11)
    x = r.act("x", (*((r.size(1, 3),) if r.draw(st.booleans()) else ()), r.size(1, 9), depth), r.draw(WIDTHS))
    w = r.weights((channels, depth), r.draw(st.sampled_from(["i8", "i4"])))
    r.agree(r.graph("linear", [x, w, *r.bias(x, channels)], r.draw(WIDTHS), **r.clamp()))


@checks
def test_block_wise_linear(data: st.DataObject) -> None:
    r = Random(data)
    x = r.act("x", (r.size(1, 9), 32), "u16")
    steps = r.rng.integers(1, 17, (5, 2))
    steps[:, 0] = 16
    scale = (2.0 ** r.rng.uniform(-8, 0, (5, 1)) * steps).astype(np.float32)
    q = QParams(scale, 0, axis=0, block=16)
    r.values["w"] = Value("w", TensorType((5, 32), "i4", q), r.codes((5, 32), "i4"))
    r.agree(r.graph("linear", [x, "w"], r.draw(WIDTHS)))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "pointwise", "grouped", "depthwise"])
@checks
def test_convolution(kind: str, step: int, data: st.DataObject) -> None:
    r = Random(data)
    groups = r.size(2, 9) if kind in ("grouped", "depthwise") else 1
    depth = 1 if kind == "depthwise" else r.size(1, 5)
    channels = groups if kind == "depthwise" else groups * r.size(1, 4)
    kernel = (1, 1) if kind == "pointwise" else (r.size(1, 4), r.size(1, 4))
    x = r.act("x", (r.size(1, 3), groups * depth, r.size(4, 9), r.size(4, 9)), r.draw(WIDTHS))
    attrs = {
        "stride": (step, step),
        "dilation": (r.size(1, 2), r.size(1, 2)) if max(kernel) < 3 else (1, 1),
        "pads": tuple(r.size(0, 2) for _ in range(4)),
        "groups": groups,
    }
    w = r.weights((channels, depth, *kernel))
    graph = r.graph("conv2d", [x, w, *r.bias(x, channels)], r.draw(WIDTHS), **attrs, **r.clamp())
    if r.draw(st.booleans()):
        r.feeds["x"] = np.ascontiguousarray(r.feeds["x"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    r.agree(graph)


@checks
def test_product_of_activations(data: st.DataObject) -> None:
    r = Random(data)
    rows, depth, columns = r.size(1, 6), r.size(1, 40), r.size(1, 9)
    shapes = [((), ()), ((2,), (2,)), ((3, 2), (3, 2)), ((2, 2), (1, 2)), ((1, 3), (2, 1)), ((), (2,))]
    left, right = r.draw(st.sampled_from(shapes))
    a = r.act("a", (*left, rows, depth), r.draw(WIDTHS))
    half = QParams(r.draw(SCALES), 128)
    narrow = r.draw(st.booleans())
    b = r.act("b", (*right, depth, columns), "u8" if narrow else r.draw(WIDTHS), half if narrow else None)
    r.agree(r.graph("matmul", [a, b], r.draw(WIDTHS)))


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
@checks
def test_operations_of_two_operands(op: str, data: st.DataObject) -> None:
    r = Random(data)
    shape = (2, 3, 4, 5)
    other = r.draw(st.sampled_from([shape, (1, 3, 1, 1), (5,), (), (2, 1, 4, 1), (1, 1, 1, 1)]))
    a = r.act("a", shape, r.draw(WIDTHS))
    b = r.act("b", other, r.draw(WIDTHS), const=r.draw(st.booleans()))
    if r.draw(st.booleans()):
        r.feeds["a"] = np.ascontiguousarray(r.feeds["a"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    inputs = [a, b] if r.draw(st.booleans()) else [b, a]
    r.agree(r.graph(op, inputs, r.draw(WIDTHS), **r.clamp()))


UNARY = ("requantize", "relu", "sigmoid", "silu", "tanh", "exp", "sqrt", "neg", "hardswish")


@pytest.mark.parametrize("width", ["u8", "u16"])
@pytest.mark.parametrize("op", UNARY)
@checks
def test_functions_of_one_operand(op: str, width: str, data: st.DataObject) -> None:
    """Tensors of an odd and an even number of codes, one by one and in a batch."""
    r = Random(data)
    x = r.act("x", (1, 3, 4, r.size(5, 6) if r.draw(st.booleans()) else 25), width)
    graph = r.graph(op, [x], r.draw(WIDTHS))
    r.feeds["x"] = r.codes((r.size(1, 3), *r.values["x"].type.shape[1:]), width)
    if r.draw(st.booleans()):
        r.feeds["x"] = np.ascontiguousarray(r.feeds["x"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    with np.errstate(all="ignore"):
        r.agree(graph)


def test_a_measured_table_is_looked_up() -> None:
    q = QParams(np.float32(0.01), 100)
    values = {name: Value(name, TensorType((1, 300), "u16", q)) for name in ("x", "y")}
    table = np.random.default_rng(0).permutation(65536).astype(np.uint16)
    node = measured_node(Node("sigmoid", ("x",), "y"), table, "htp-v73")
    graph = Graph("one", "integer", ("x",), (node,), ("y",), values)
    x = np.random.default_rng(1).integers(0, 65536, (2, 300)).astype(np.uint16)
    np.testing.assert_array_equal(simulate(graph, {"x": x}, Fast())["y"], table[x])


@pytest.mark.parametrize("op", ["softmax", "rms_norm", "layer_norm"])
@checks
def test_softmax_and_normalization(op: str, data: st.DataObject) -> None:
    r = Random(data)
    depth = r.draw(st.sampled_from([1, 7, 70]))
    shape = (*r.draw(st.sampled_from([(2,), (2, 3), (1, 2, 5)])), depth)
    x = r.act("x", shape, r.draw(WIDTHS))
    out = r.draw(WIDTHS)
    if op == "softmax":
        r.agree(r.graph(op, [x], out, axis=r.draw(st.sampled_from([len(shape) - 1, 0]))))
        return
    constants = [r.act("w", (depth,), r.draw(WIDTHS), const=True)]
    if op == "layer_norm":
        q = QParams(np.float32(r.values["x"].type.q.scale * r.values["w"].type.q.scale))  # type: ignore[union-attr]
        r.values["b"] = Value("b", TensorType((depth,), "i32", q), r.rng.integers(-9999, 9999, depth).astype(np.int32))
        constants.append("b")
    r.agree(r.graph(op, [x, *constants], out, eps=r.draw(st.sampled_from([1e-5, 1e-12, 1.0]))))


@pytest.mark.parametrize("dtype", ["u8", "u16"])
def test_centered_codes_of_zero_keep_their_sign_in_a_normalization(dtype: str) -> None:
    q = QParams(np.float32(0.01), 100)
    gains = np.array([90, 100, 110, 100], np.uint8)
    values = {
        "x": Value("x", TensorType((3, 4), dtype, q)),
        "w": Value("w", TensorType((4,), "u8", q), gains),
        "y": Value("y", TensorType((3, 4), dtype, q)),
    }
    graph = Graph("one", "integer", ("x",), (Node("rms_norm", ("x", "w"), "y", {"eps": 1e-5}),), ("y",), values)
    feeds = {"x": np.array([[100] * 4, [100, 90, 110, 110], [0, 100, 100, 255]], NUMPY[dtype])}
    rounded = with_profile(graph, "htp-v73")
    np.testing.assert_array_equal(simulate(rounded, feeds, Fast())["y"], simulate(rounded, feeds, Reference())["y"])


def some_floats(seed: int, count: int = 100_000) -> np.ndarray:
    """float32 of both signs: random bits, short significands (ties), zeros."""
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.integers(0, 2**24, count).astype(np.float64), rng.integers(-60, 40, count))
    x[::3] = np.ldexp(rng.integers(1, 64, count).astype(np.float64), rng.integers(-12, 12, count))[::3]
    x[::50] = 0
    return np.copysign(x, rng.choice([-1.0, 1.0], count)).astype(np.float32)


def test_compiled_vector_float_equals_the_readable_one() -> None:
    a, b = some_floats(0), some_floats(1)
    each = range(0, len(a), 10)
    np.testing.assert_array_equal(bits(rows.multiply(a[i], b[i]) for i in each), bits(qfloat.multiply(a, b)[::10]))
    total = [i for i in each if np.float64(a[i]) + b[i] >= 0]
    np.testing.assert_array_equal(bits(rows.add(a[i], b[i]) for i in total), bits(qfloat.add(a, b)[total]))
    roots = bits(rows.rsqrt(x) for x in np.abs(a[::10]))
    np.testing.assert_array_equal(roots, bits(qfloat.rsqrt(np.abs(a[::10]))))


def bits(values: Iterable[Any]) -> np.ndarray:
    """The bit patterns of float32 values: zeros of both signs differ."""
    return np.array(list(values), np.float32).view(np.int32)


@checks
def test_pooling_and_moves(data: st.DataObject) -> None:
    r = Random(data)
    dtype = r.draw(WIDTHS)
    x = r.act("x", (2, 3, 8, 6), dtype)
    if r.draw(st.booleans()):
        r.feeds["x"] = np.ascontiguousarray(r.feeds["x"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    q = r.values["x"].type.q
    window = {"kernel": (2, 2), "stride": (2, 2), "pads": (0, 0, 0, 0)}
    graphs = {
        "reduce_mean": lambda: r.graph("reduce_mean", [x], dtype, axes=(2, 3), keepdims=r.draw(st.booleans())),
        "avg_pool": lambda: r.graph("avg_pool", [x], dtype, **window),
        "max_pool": lambda: r.graph("max_pool", [x], dtype, q, **{**window, "pads": (1, 0, 1, 1)}),
        "pad": lambda: r.graph("pad", [x], dtype, q, pads=(0, 1, 2, 1)),
        "concat": lambda: r.graph("concat", [x, x], dtype, q, axis=1),
        "transpose": lambda: r.graph("transpose", [x], dtype, q, perm=(0, 2, 3, 1)),
        "reshape": lambda: r.graph("reshape", [x], dtype, q, shape=(2, 18, 8)),
    }
    r.agree(graphs[r.draw(st.sampled_from(sorted(graphs)))]())


def a_layer(channels: int = 6, dtype: str = "u8", profile: str = "htp-v73") -> tuple[Graph, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    values = {
        "x": Value("x", TensorType((7, 20), dtype, QParams(np.float32(0.02), 3))),
        "w": Value(
            "w",
            TensorType((channels, 20), "i8", QParams(np.full(channels, 0.01, np.float32), 0, axis=0)),
            rng.integers(-127, 128, (channels, 20)).astype(np.int8),
        ),
        "y": Value("y", TensorType((7, channels), dtype, QParams(np.float32(0.05), 128))),
    }
    graph = Graph("layer", "integer", ("x",), (Node("linear", ("x", "w"), "y"),), ("y",), values)
    feeds = {"x": rng.integers(0, RANGE[dtype][1] + 1, (7, 20)).astype(NUMPY[dtype])}
    return with_profile(graph, profile), feeds


@pytest.mark.parametrize(("dtype", "profile"), [("u8", "htp-v73"), ("u16", "htp-v73"), ("u8", "xnnpack")])
def test_the_rules_of_common_networks_have_a_compiled_loop(dtype: str, profile: str) -> None:
    graph, _ = a_layer(dtype=dtype, profile=profile)
    assert rounding.finish(graph.view(graph.nodes[0]), 6, 128).loop is not None


def test_a_machine_whose_int8_product_saturates_gets_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, feeds = a_layer()
    monkeypatch.setattr(fast, "_int_mm_is_exact", lambda: False)
    np.testing.assert_array_equal(simulate(graph, feeds, Fast())["y"], simulate(graph, feeds, Reference())["y"])


def test_weights_are_prepared_once_per_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, feeds = a_layer()
    simulate(graph, feeds)
    monkeypatch.delattr(fast, "_layer")
    simulate(graph, feeds)


def test_what_was_prepared_goes_with_the_graph() -> None:
    graph, feeds = a_layer()
    simulate(graph, feeds)
    alive = weakref.ref(graph)
    del graph
    gc.collect()
    assert alive() is None


def test_a_run_leaves_torch_its_threads_also_when_it_fails() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads.own_threads():
        threads.spread(lambda block: 1 // block, [1, 1, 1, 0])
    assert torch.get_num_threads() == before


def test_blocks_are_each_worked_on_once() -> None:
    seen: list[int] = []
    with threads.own_threads():
        threads.spread(seen.append, range(1000))
    assert sorted(seen) == list(range(1000))
    assert [(s.start, s.stop) for s in threads.ranges(10, 4)] == [(0, 3), (3, 6), (6, 10)]


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
import numpy as np
from edgeforge.sim.compiled import look_up
out = np.zeros(2, np.uint8)
look_up(np.arange(9, dtype=np.uint8), np.array([3, 5], np.uint8), out)
print(out)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_disk_that_takes_no_compiled_loops_is_no_reason_to_fail(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FULL_DISK], env=environment, capture_output=True, text=True)
    assert done.stdout == "[3 5]\n", done.stderr
