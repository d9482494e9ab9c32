"""TOSA: the specification's arithmetic, the graph that is written, and the reference model's integers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeforge.ops  # noqa: F401
from edgeforge.backends import backend, tosa
from edgeforge.conformance.cases import precisions
from edgeforge.conformance.run import conformance
from edgeforge.dialects.tosa import from_stored, refusals, to_stored, to_tosa
from edgeforge.errors import BackendFailed
from edgeforge.ir.graph import Graph
from edgeforge.ir.op import OPS
from edgeforge.ir.rules.tosa import apply_scale_32, reciprocal_scale, scale_32
from edgeforge.ir.text import parse_graph
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import simulate
from edgeforge.target import load_target

TARGET = load_target("tosa")
needs_tosa = pytest.mark.skipif(bool(backend("tosa").missing()), reason="tosa-tools is not installed")


def written(text: str) -> Graph:
    """A graph under TOSA's rules, from text without rules."""
    return with_profile(parse_graph(text, {}), "tosa")


def block(graph: Graph) -> dict[str, Any]:
    return to_tosa(graph)["regions"][0]["blocks"][0]


def names(found: Mapping[str, Any]) -> list[str]:
    return [operator["op"] for operator in found["operators"] if not operator["op"].startswith("CONST")]


# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("value", "mult", "shift", "expected"),
    [
        (3, 1 << 30, 31, 2),  # 1.5: half up
        (-3, 1 << 30, 31, -1),  # -1.5: half up as well
        (-5, 1 << 30, 32, -1),  # -1.25
        (-200, 1 << 30, 30, -200),
        (100, 1431655766, 32, 33),  # a third
        (2**31 - 1, 2**31 - 1, 62, 1),
        (-(2**31), 2**31 - 1, 31, -(2**31) + 1),
    ],
)
def test_a_sum_is_scaled_and_rounded_once(value: int, mult: int, shift: int, expected: int) -> None:
    assert apply_scale_32(np.array(value), mult, shift) == expected


def test_a_multiplier_has_31_bits_and_a_shift_of_at_most_62() -> None:
    ratios = np.exp2(np.random.default_rng(0).uniform(-31, 20, 10_000))
    mult, shift = scale_32(ratios)
    assert mult.min() >= 1 << 30 and mult.max() < 1 << 31
    assert np.abs(np.ldexp(mult.astype(np.float64), -shift) / ratios - 1).max() <= 2.0**-31
    assert [int(x) for x in scale_32(1.0)] == [1 << 30, 30]
    assert [int(x) for x in scale_32(np.nextafter(1.0, 0.0))] == [1 << 30, 30]
    assert [int(x) for x in scale_32(2.0**-40)] == [1 << 22, 62]


def test_averages_divide_by_the_specifications_reciprocal_and_so_round_half_away_from_zero() -> None:
    """The reciprocal is a little too large, which decides ties."""
    assert reciprocal_scale(1) == ((1 << 30) + 1, 30)
    assert reciprocal_scale(9) == (1908874355, 34)
    for count in range(1, 500):
        mult, shift = reciprocal_scale(count)
        assert 1 << 30 <= mult < 1 << 31
        sums = np.arange(-255 * count, 255 * count, max(count // 3, 1))
        expected = np.sign(sums) * np.floor(np.abs(sums) / count + 0.5)
        assert np.array_equal(apply_scale_32(sums, mult, shift), expected)


@pytest.mark.parametrize(("dtype", "codes"), [("u8", 256), ("u16", 65536)])
def test_codes_come_back_as_they_went(dtype: str, codes: int) -> None:
    every = np.arange(codes).astype(np.uint8 if dtype == "u8" else np.uint16)
    stored = to_stored(every, dtype)
    assert (stored[0], stored[-1]) == (-codes // 2, codes // 2 - 1)
    assert np.array_equal(from_stored(stored, dtype), every)


# ------------------------------------------------------------------------------------------------------------- dialect


def test_an_add_is_three_rescales_with_the_constants_of_the_node() -> None:
    graph = written(
        "graph g integer\nin %a: u8[1,8] q(0.5, 3)\nin %b: u8[8] q(0.1, 128)\n"
        '%y: u8[1,8] q(0.25, 7) = add(%a, %b) {"clamp": [0.0, 6.0]}\nout %y\n'
    )
    found, fixed = block(graph), graph.nodes[0].fixed
    assert names(found) == ["RESCALE", "RESHAPE", "RESCALE", "ADD", "RESCALE", "CLAMP"]
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    rescales = [operator for operator in found["operators"] if operator["op"] == "RESCALE"]
    constants = [
        [int.from_bytes(bytes(tensors[name]["data"]), "little", signed=True) for name in operator["inputs"][1:]]
        for operator in rescales
    ]
    left, right = zip(fixed["operand_mult"], fixed["operand_shift"], strict=True)
    assert constants == [[*left, 3 - 128, 0], [*right, 0, 0], [fixed["mult"], fixed["shift"], 0, 7 - 128]]
    clamp = found["operators"][-1]
    assert clamp["outputs"] == ["y"] and clamp["attribute"]["min_val"] == [256 + 7 - 128]
    assert clamp["attribute"]["max_val"] == [7 + 24 + 128]
    assert all(operator["attribute"]["rounding_mode"] == "SINGLE_ROUND" for operator in rescales)


def test_windows_end_where_the_image_does() -> None:
    """TOSA refuses a last row that no window covers: here one is sliced off, there a row of padding is left out."""
    text = (
        "graph g integer\nin %x: u8[1,2,8,9] q(0.5, 3)\n"
        '%y: u8[1,2,4,5] q(0.5, 3) = max_pool(%x) {"kernel": [2, 3], "stride": [2, 2], "pads": [0, 1, 1, 1]}\nout %y\n'
    )
    pool = next(operator for operator in block(written(text))["operators"] if operator["op"] == "MAX_POOL2D")
    assert pool["attribute"]["pad"] == [0, 0, 1, 1]
    found = block(written(text.replace("u8[1,2,8,9]", "u8[1,2,9,9]").replace("[0, 1, 1, 1]", "[0, 1, 0, 1]")))
    assert names(found) == ["TRANSPOSE", "SLICE", "MAX_POOL2D", "TRANSPOSE"]


def test_everything_without_a_counterpart_is_refused_with_its_reason() -> None:
    graph = written(
        "graph g integer\nin %x: u8[1,8] q(0.5, 3)\nin %w: u16[1,8] q(0.5, 3)\n"
        '%s: u8[1,8] q(0.00390625, 0) = softmax(%x) {"axis": 1}\n'
        "%t: u16[1,8] q(0.5, 3) = add(%w, %w) {} ; block.add\n"
        "%r: u16[1,8] q(0.5, 3) = relu(%w) {}\n"
        "%y: u8[1,8] q(0.5, 3) = tanh(%s) {}\nout %t\nout %r\nout %y\n"
    )
    found = refusals(graph)
    assert [(reason.where, reason.op) for reason in found] == [("s", "softmax"), ("block.add", "add")]
    assert "no such operation" in found[0].why and "16-bit codes have no zero point" in found[1].why


def test_where_the_tools_are_not_the_remedy_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tosa.importlib.metadata, "distributions", lambda **query: [])
    monkeypatch.setenv("EDGEFORGE_TOSA", str(tmp_path))
    assert "pip install --no-deps --target DIR tosa-tools==" in backend("tosa").missing()
    for name in (tosa.FLATC, tosa.SCHEMA, tosa.RUNNER):
        (tmp_path / name).touch()
    assert tosa.tools() == tmp_path and backend("tosa").missing() == ""


# ----------------------------------------------------------------------------------------------------- reference model


def exact_rows() -> list[tuple[str, str]]:
    """Every op with a counterpart, at 8 bits; those that only move codes at 16 bits too."""
    ops = [op for op in sorted(OPS) if OPS[op].tosa is not None]
    return [(op, p) for op in ops for p in precisions(op) if "a8" in p or OPS[op].numerics == "move"]


@needs_tosa
def test_the_reference_model_gives_the_simulators_integers() -> None:
    rows = conformance(TARGET, "tosa", exact_rows(), 6, 1)
    assert len(rows) > 40
    wrong = [row for row in rows if (row.cases, row.identical, row.max_lsb, row.rule) != (6, 1.0, 0, "exact")]
    assert wrong == []


@needs_tosa
def test_a_step_serves_many_runs_and_a_batch_runs_piece_by_piece(tmp_path: Path) -> None:
    graph = written("graph g integer\nin %x: u8[1,16] q(0.5, 3)\n%y: u8[1,16] q(0.7, 9) = requantize(%x) {}\nout %y\n")
    chosen, codes = backend("tosa"), np.arange(48, dtype=np.uint8).reshape(3, 16)
    assert chosen.compile(graph, TARGET, tmp_path).files == ("model.tosa",)
    expected = simulate(graph, {"x": codes})["y"]
    assert np.array_equal(chosen.run(tmp_path, graph, TARGET, {"x": codes})["y"], expected)
    with chosen.opened(tmp_path, graph, TARGET) as step:
        for row in range(2):
            assert np.array_equal(step({"x": codes[row : row + 1]})["y"], expected[row : row + 1])


@needs_tosa
def test_a_sum_that_rescale_does_not_take_is_named(tmp_path: Path) -> None:
    graph = written("graph g integer\nin %x: u8[1,1] q(1e7, 0)\n%y: u8[1,1] q(1.0, 9) = requantize(%x) {}\nout %y\n")
    chosen = backend("tosa")
    chosen.compile(graph, TARGET, tmp_path)
    with pytest.raises(BackendFailed, match="value should stay within"):
        chosen.run(tmp_path, graph, TARGET, {"x": np.array([[255]], np.uint8)})
