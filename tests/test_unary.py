"""Element-wise functions on Hexagon: closed rules against recorded and fresh integers of the HTP emulator, tables asked
from it, and encodings that it ignores."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import edgeforge.ops  # noqa: F401
from edgeforge.backends.ort_qnn import BACKEND
from edgeforge.errors import Unsupported
from edgeforge.frontend import Imported
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.rules import RULES
from edgeforge.ir.text import parse_graph, print_graph, tensors
from edgeforge.ir.types import NUMPY, RANGE, QParams, TensorType, Value
from edgeforge.measured import ORACLE, answers, measure, question, together
from edgeforge.pipeline import export
from edgeforge.quantize.assign import assign
from edgeforge.quantize.convert import with_profile
from edgeforge.quantize.keep import plan_from
from edgeforge.recipe import Recipe
from edgeforge.sim.evaluate import simulate
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")
emulator = pytest.mark.skipif(bool(BACKEND.cannot_run()), reason=BACKEND.cannot_run() or "")

#: op, input scale and zero point, output scale and zero point -> codes, and what they give at even and at odd places.
RECORDED = [
    ("requantize", 0.00016056308, 33568, 0.00023348926, 23244, [(83, 218, 217), (30000, 20790, 20790)]),
    ("relu", 0.0002843917, 27585, 0.00040054848, 0, [(27680, 67, 67), (46553, 13467, 13467), (50000, 15915, 15915)]),
    ("neg", 0.00015928803, 24891, 0.00017768328, 41682, [(90, 63916, 63915), (50000, 19173, 19172)]),
]  # fmt: skip


def chain(bits: int, encodings: list[tuple[float, int]], *ops: str, shape=(1, 6, 5, 7), **attrs: object) -> Graph:
    """x -> op -> op ... -> y, element-wise or max_pool; ``add`` and ``sub`` take the graph input ``b`` besides."""
    kinds = [TensorType(shape, f"u{bits}", QParams(np.float32(s), z)) for s, z in encodings]
    values, nodes, last = {"x": Value("x", kinds[0]), "b": Value("b", kinds[0])}, [], "x"
    for i, op in enumerate(ops):
        name = f"v{i}.{op}"
        inputs = (last, "b") if op in ("add", "sub") else (last,)
        values[name] = Value(name, kinds[i + 1])
        nodes.append(Node(op, inputs, name, attrs if op not in ("add", "sub") else {}))
        last = name
    named = {name for node in nodes for name in node.inputs}
    inputs = tuple(name for name in ("x", "b") if name in named)
    graph = Graph(
        "chain", "integer", inputs, tuple(nodes), (last,), {k: v for k, v in values.items() if k in named | {last}}
    )
    return with_profile(graph, TARGET.numerics)


def random_feeds(graph: Graph) -> dict[str, np.ndarray]:
    """Codes in random order: a code must not betray its place."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, RANGE[graph.type(name).dtype][1] + 1, graph.type(name).shape).astype(
            NUMPY[graph.type(name).dtype]
        )
        for name in graph.inputs
    }


def encoding(bits: int, low: float, high: float) -> tuple[float, int]:
    top = RANGE[f"u{bits}"][1]
    scale = np.float32((high - low) / top)
    return float(scale), int(np.clip(np.rint(-low / scale), 0, top))


@pytest.mark.parametrize(
    ("op", "sx", "zx", "sy", "zy", "rows"), RECORDED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_sixteen_bit_codes_depend_on_the_place_in_the_tensor(op, sx, zx, sy, zy, rows) -> None:
    graph = chain(16, [(sx, zx), (sy, zy)], op, shape=(1, len(rows), 2))
    codes = np.array([[(row[0], row[0]) for row in rows]], np.uint16)
    got = simulate(graph, {"x": np.concatenate([codes, codes])})
    expected = [[even, odd] for _, even, odd in rows]
    assert got[graph.outputs[0]].tolist() == [expected, expected]


def test_eight_bit_gelu_is_the_erf_form_whichever_was_asked_for() -> None:
    graph = chain(8, [(0.007091983, 190), (0.0016421091, 104)], "gelu", shape=(1, 4), approximate="tanh")
    got = simulate(graph, {"x": np.array([[10, 34, 71, 86]], np.uint8)})
    assert got[graph.outputs[0]].tolist() == [[26, 14, 2, 1]]


@emulator
@pytest.mark.parametrize("op", ["requantize", "neg", "relu", "clip"])
def test_sixteen_bit_changes_of_scale_are_the_emulators(op: str) -> None:
    rng = np.random.default_rng(1)
    attrs = {"low_real": -0.5, "high_real": 4.0} if op == "clip" else {}
    graphs = []
    for _ in range(8):
        sx, zx, zy = 10 ** rng.uniform(-4.5, -3), *map(int, rng.integers(0, 65536, 2))
        graphs.append(chain(16, [(sx, zx), (sx / 2 ** rng.uniform(-4, 4), zy)], op, shape=(1, 4, 8, 512), **attrs))
    graph = with_profile(together(graphs), TARGET.numerics)
    feeds = random_feeds(graph)
    found, expected = BACKEND.evaluate(graph, TARGET, feeds), simulate(graph, feeds)
    assert {name: int((found[name] != expected[name]).sum()) for name in found} == dict.fromkeys(found, 0)


EIGHT_BIT = ["silu", "gelu", "hardswish", "exp"]


@emulator
def test_eight_bit_functions_are_the_rounded_exact_value_under_any_encoding() -> None:
    attrs = {"gelu": {"approximate": "tanh"}}
    spans = {"exp": (0, 3), "sigmoid": (0, 0.9), "tanh": (-0.7, 0.9)}
    graphs = [
        chain(
            8, [encoding(8, -4, top), encoding(8, *spans.get(op, (-0.6, 3)))], op, shape=(1, 4, 64), **attrs.get(op, {})
        )
        for op in EIGHT_BIT
        for top in (1.1, 4.7)
    ]
    graph = with_profile(together(graphs), TARGET.numerics)
    assert {RULES[node.rule].status for node in graph.nodes} == {"exact"}
    feeds = {name: np.arange(256, dtype=np.uint8).reshape(1, 4, 64) for name in graph.inputs}
    found, expected = BACKEND.evaluate(graph, TARGET, feeds), simulate(graph, feeds)
    assert {name: int((found[name] != expected[name]).sum()) for name in found} == dict.fromkeys(found, 0)


IN_CONTEXT = {
    "8-bit reciprocal between two sums": chain(
        8, [(0.0136, 3), (0.0136, 0), (0.021, 0), (0.03, 130)], "sub", "reciprocal", "add", shape=(1, 33, 9)
    ),
    "8-bit hardsigmoid after a sum": chain(8, [(0.02, 3), (0.02, 128), (0.02, 20)], "add", "hardsigmoid"),
    "16-bit silu before neg": chain(16, [(2e-4, 30000), (1.1e-4, 3000), (1.4e-4, 33000)], "silu", "neg"),
    "16-bit exp after neg": chain(16, [(9e-5, 200), (1.1e-4, 65000), (1.6e-5, 0)], "neg", "exp", shape=(1, 50, 16)),
    "16-bit sigmoid between two neg": chain(
        16, [(2e-4, 30000), (2.2e-4, 31000), (1 / 65536, 0), (1.7e-5, 65535)], "neg", "sigmoid", "neg"
    ),
}


@emulator
@pytest.mark.parametrize("graph", IN_CONTEXT.values(), ids=list(IN_CONTEXT))
def test_a_measured_table_holds_in_another_graph(graph: Graph) -> None:
    """Another shape and other neighbors than those of the question, and only the last output visible."""
    measured, notes = measure(graph, TARGET)
    assert [node.rule for node in measured.nodes].count("htp_measured") == 1
    assert "1 function(s) hold tables measured" in notes[0]
    feeds, name = random_feeds(graph), graph.outputs[0]
    found = BACKEND.evaluate(graph, TARGET, feeds)[name]
    assert np.array_equal(simulate(measured, feeds)[name], found)
    assert not np.array_equal(simulate(graph, feeds)[name], found), (
        "the modelled rule differs: else this proves nothing"
    )


@emulator
def test_eight_bit_ties_fall_as_in_float32() -> None:
    """Decimal scales make ties of piecewise linear functions."""
    outputs = [(0.02, 0), (0.04, 0), (0.0156, 20), (0.15, 20)]
    graphs = [
        chain(
            8,
            [(sx, 110), output],
            op,
            shape=(1, 4, 64),
            **({"low_real": 0.0, "high_real": 6.0} if op == "clip" else {}),
        )
        for op in ("relu", "clip", "hardswish")
        for sx in (0.02, 0.05, 0.1)
        for output in outputs
    ]
    graph = with_profile(together(graphs), TARGET.numerics)
    feeds = {name: np.arange(256, dtype=np.uint8).reshape(1, 4, 64) for name in graph.inputs}
    found, expected = BACKEND.evaluate(graph, TARGET, feeds), simulate(graph, feeds)
    assert {name: int((found[name] != expected[name]).sum()) for name in found} == dict.fromkeys(found, 0)


def test_eight_bit_ties_recorded() -> None:
    graph = chain(8, [(0.02, 128), (0.04, 0)], "relu", shape=(1, 5))
    got = simulate(graph, {"x": np.array([[143, 147, 151, 155, 171]], np.uint8)})
    assert got[graph.outputs[0]].tolist() == [[7, 10, 11, 13, 21]]


@emulator
def test_equal_questions_are_asked_once_and_answered_for_each() -> None:
    graph = chain(16, [(2e-4, 30000), (1.1e-4, 3000)], "gelu", approximate="none")
    asked = {"a": question(graph, graph.nodes[0]), "b": question(graph, graph.nodes[0])}
    tables = answers(asked, TARGET)
    assert tables["a"] is tables["b"]
    assert tables["a"].shape == (65536,)


def measured_by_hand() -> Graph:
    graph = chain(16, [(2e-4, 30000), (1.1e-4, 3000)], "silu")
    fixed = {"table": np.arange(65536, dtype=np.uint16), "profile": TARGET.numerics}
    return graph.rebuild([replace(graph.nodes[0], rule="htp_measured", fixed=fixed)])


def test_a_measured_table_stays_under_its_profile_and_goes_under_another() -> None:
    graph = measured_by_hand()
    assert with_profile(graph, TARGET.numerics).hash() == graph.hash()
    assert with_profile(graph, "htp-v68").nodes[0].rule != "htp_measured"


def test_a_measured_table_is_part_of_the_text() -> None:
    graph = measured_by_hand()
    assert parse_graph(print_graph(graph), tensors(graph)).hash() == graph.hash()


class Gate(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x).exp()


def gate() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    return Gate(), (torch.zeros(1, 4, 8),)


def exported(out: Path) -> tuple[list[str], tuple[str, ...], str]:
    bundle = export("test_unary:gate", TARGET.name, out, "random", "w8a16", ("simulator",))
    return [node.rule for node in bundle.graph.nodes], bundle.manifest.notes, (out / "report.md").read_text()


@emulator
def test_a_bundle_holds_measured_tables_and_says_so(tmp_path: Path) -> None:
    rules, notes, report = exported(tmp_path / "b")
    assert rules == ["htp_measured", "htp_measured"]
    assert notes and notes[0].startswith("2 function(s) hold tables measured from the HTP emulator")
    assert notes[0] in report


def test_without_the_vendors_package_the_bundle_says_that_rules_are_modelled(tmp_path, monkeypatch) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime-qnn":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    rules, notes, report = exported(tmp_path / "b")
    assert rules == ["table", "table"]
    assert "modelled rule" in notes[0] and "onnxruntime-qnn is not installed" in notes[0]
    assert notes[0] in report


# ------------------------------------------------------------------------------------------------ encodings and targets


def plain(op: str) -> Graph:
    values = {name: Value(name, TensorType((1, 8))) for name in ("x", "y")}
    return Graph("plain", "float", ("x",), (Node(op, ("x",), "y", {}, "net.act"),), ("y",), values)


@pytest.mark.parametrize("op", ["sigmoid", "tanh", "hardsigmoid"])
def test_an_output_encoding_that_the_hardware_ignores_is_forced_where_it_is_free(op: str) -> None:
    plan = assign(plain(op), {"x": (-3.0, 4.0), "y": (-0.2, 0.3)}, Recipe(precision="w8a16"), TARGET)
    rule = TARGET.encodings[op]["a16"]
    assert plan.types["y"].q == QParams(np.float32(1 / rule.steps), rule.zero)
    free = assign(plain(op), {"x": (-3.0, 4.0), "y": (-0.2, 0.3)}, Recipe(precision="w8a8"), TARGET)
    assert free.types["y"].q == QParams(np.float32(0.5 / 255), 102)


@pytest.mark.parametrize("op", ["sigmoid", "tanh", "hardsigmoid"])
def test_an_output_encoding_that_the_hardware_ignores_is_refused_where_it_was_given(op: str) -> None:
    def keep(dtype: str) -> None:
        kinds = {name: TensorType((1, 8), dtype, QParams(np.float32(1e-4), 100)) for name in ("x", "y")}
        plan_from(Imported(plain(op), encodings=kinds), Recipe(precision=f"w8a{dtype[1:]}"), TARGET)

    with pytest.raises(Unsupported, match=r"writes scale 1/\d+, zero point \d+  -> --requantize"):
        keep("u16")
    keep("u8")


@emulator
@pytest.mark.parametrize("op", ["sigmoid", "tanh", "hardsigmoid"])
def test_the_emulator_ignores_just_these_encodings(op: str) -> None:
    rule = TARGET.encodings[op]["a16"]
    forced = (1 / rule.steps, rule.zero)
    graphs = [chain(16, [(1e-4, 30000), output], op, shape=(1, 4, 64)) for output in (forced, (2e-5, 1000))]
    graph = together(graphs)
    feeds = random_feeds(together(graphs[:1]))
    found = BACKEND.evaluate(graph, TARGET, {"0.x": feeds["0.x"], "1.x": feeds["0.x"]})
    assert np.array_equal(*found.values())


def test_an_op_without_a_kernel_is_refused_with_the_remedy() -> None:
    with pytest.raises(Unsupported, match=r"HTP has no kernel for erf .* -> replace the op"):
        assign(plain("erf"), {"x": (-3.0, 4.0), "y": (-1.0, 1.0)}, Recipe(), TARGET)


def test_the_oracle_is_a_backend() -> None:
    assert BACKEND.name == ORACLE
