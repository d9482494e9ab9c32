"""Promotions under a budget."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from edgeforge import cli
from edgeforge.data import from_arrays
from edgeforge.errors import InvalidInput
from edgeforge.frontend.torch import from_module
from edgeforge.passes import optimize
from edgeforge.recipe import Precision, Recipe
from edgeforge.target import load_target
from edgeforge.tune import Move, Score, Tuned, _both, _pruned, trail, tune


class Outlier(torch.nn.Module):
    """Three layers; one channel between the first two is 100 times as large as the others, and its reader's weights
    so much smaller."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = torch.nn.Linear(16, 24), torch.nn.Linear(24, 24), torch.nn.Linear(24, 8)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            self.first.weight[5] *= 100
            self.second.weight[:, 5] /= 100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def tuned(
    target: str = "snapdragon-8-gen-3", max_drop: float = 0.005, said: list[str] | None = None, **budget: float
) -> Tuned:
    graph = optimize(from_module(Outlier().eval(), (torch.zeros(1, 16),), "outlier").graph)
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    data = from_arrays("noise", {graph.inputs[0]: x}, graph)
    say = (said if said is not None else []).append
    return tune(graph, Recipe(), load_target(target), data, data, max_drop, say=say, **budget)


def test_only_what_reads_the_outlier_is_promoted() -> None:
    found = tuned()
    assert found.missed is None
    assert found.before.drop > 0.01 > 0.005 >= found.after.drop
    assert [(move.node, move.what) for move in found.promoted] == [("relu_1", "w8a16")]
    worst = max((f for f in found.findings if f.input_peak is not None), key=lambda f: f.input_peak or 0)
    assert worst.move.node == "relu_1"
    assert found.recipe.overrides == found.promoted[0].overrides
    assert f"; input up to {worst.input_peak:.3g} rms" in trail(found) and worst.input_peak > 10


def test_promotions_of_one_layer_add_up() -> None:
    assert _both(Precision("w8a8"), Precision("w4a16")) == "w8a16"
    assert _both(Precision("w4a16-b64"), Precision("w4a16-b32")) == "w4a16-b32"


def test_a_start_that_keeps_to_the_drop_is_left_alone() -> None:
    said: list[str] = []
    found = tuned(max_drop=0.05, said=said)
    assert found.missed is None and found.after == found.before
    assert len(said) == 1 and found.findings


def test_a_budget_that_allows_no_promotion_is_kept() -> None:
    found = tuned(budget_ms=tuned().before.cost)
    assert found.missed == f"drop {found.before.drop:.2%} stays above 0.50% within the budget"
    assert (found.promoted, found.after) == ((), found.before)


def test_a_start_above_the_budget_says_what_to_do() -> None:
    found = tuned(budget_ms=1e-9)
    assert found.missed == "w8a8 is above the budget before any promotion -> --precision with fewer bits"
    assert (found.promoted, found.after) == ((), found.before)


def test_no_budget_is_named_where_none_is_given() -> None:
    found = tuned(max_drop=1e-6)
    assert found.missed == f"drop {found.after.drop:.2%} stays above 0.00%"


def test_taking_promotions_back_stays_within_the_budget() -> None:
    class Trial:
        """No promotion is needed for the drop, but each makes a requantize node needless."""

        def score(self, moves: list[Move]) -> Score:
            return Score(loss=0, drop=0, cost=3.0 - len(moves), megabytes=1)

    moves = [Move(name, "add", "result at 16 bits", ()) for name in "ab"]
    for most, kept in ((1.0, moves), (2.0, moves[:1]), (3.0, [])):
        assert _pruned(Trial(), moves, 0.01, lambda score, most=most: score.cost <= most, print) == kept  # type: ignore[arg-type]


def test_milliseconds_need_a_latency_model() -> None:
    with pytest.raises(InvalidInput, match="x86-host has no latency model"):
        tuned("x86-host", budget_ms=1.0)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["edgeforge", "tune", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_the_recipe_is_written_with_its_trail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    words = ["digits", "--target", "snapdragon-8-gen-3", "--calibration", "embedded", "--precision", "w4a8"]
    words += ["--data", "embedded", "--samples", 100, "--max-drop", "1%", "--out", recipe, "--json"]
    assert run(monkeypatch, *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reached"]
    assert found["after"]["drop"] < 0.0101 < found["before"]["drop"]
    assert 0 < sum(finding["taken"] for finding in found["findings"]) < len(found["findings"])
    assert recipe.read_text().startswith("# Tuned from w4a8")
    assert Recipe.model_validate(yaml.safe_load(recipe.read_text())).overrides
    assert run(monkeypatch, *words[:-1], "--budget-mb", 1e-6) == 1
    assert "above the budget" in capsys.readouterr().err
    assert run(monkeypatch, *words[:-1], "--max-drop", "little") == 2
