"""Activations that 8 bits cannot hold get 16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeforge.data import from_arrays
from edgeforge.frontend.torch import from_module
from edgeforge.models import Imported, Model
from edgeforge.passes import optimize
from edgeforge.pipeline import quantize
from edgeforge.recipe import Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")


class Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = torch.nn.Linear(16, 24, bias=False), torch.nn.Linear(24, 8, bias=False)
        for layer in (self.up, self.down):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def rows(outlier: float) -> np.ndarray:
    """64 rows of which one is ``outlier`` times larger, in a direction that the first layer sees."""
    x = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
    x[5] *= outlier
    return x


def test_a_layer_that_reads_what_was_widened_keeps_the_weights_it_was_given():
    graph = optimize(from_module(Gated().eval(), (torch.zeros(1, 16),), "gated").graph)
    overrides = [{"match": "down", "precision": "w4a8"}]
    recipe = Recipe.model_validate({"widen": 1e-6, "overrides": overrides})
    data = from_arrays("rows", {graph.inputs[0]: rows(1.0)}, graph)
    integer = quantize(Model("gated", Imported(graph), Path()), recipe, TARGET, data)
    (down,) = (node for node in integer.nodes if node.source == "down" and node.op == "linear")
    assert (integer.type(down.inputs[0]).dtype, integer.type(down.inputs[1]).dtype) == ("u16", "i4")


@pytest.mark.parametrize(("outlier", "wide"), [(1.0, False), (60.0, True)])
def test_what_a_rare_row_spoils_has_16_bits_and_nothing_else_has(outlier, wide):
    graph = optimize(from_module(Gated().eval(), (torch.zeros(1, 16),), "gated").graph)
    (name,) = graph.inputs
    data = from_arrays("rows", {name: rows(outlier)}, graph)
    overrides = [{"op": "input", "output": "a16"}, {"match": "up", "precision": "w8a16"}]
    made = {}
    for share in (0, 0.005):
        recipe = Recipe.model_validate({"widen": share, "overrides": overrides})
        made[share] = quantize(Model("gated", Imported(graph), Path()), recipe, TARGET, data)
    plain, found = ({node.source: node for node in made[share].nodes if node.op == "linear"} for share in (0, 0.005))
    dtypes = {place: made[0.005].type(node.inputs[0]).dtype for place, node in found.items()}
    assert made[0].type(plain["down"].inputs[0]).dtype == "u8"
    assert dtypes["down"] == ("u16" if wide else "u8")
    assert {made[0.005].type(node.inputs[1]).dtype for node in found.values()} == {"i8"}
    usual = {name: rows(1.0)}
    exact = run_float(graph, usual)[graph.outputs[0]]
    errors = []
    for integer in made.values():
        real = dequantize_outputs(integer, simulate(integer, quantize_feeds(integer, usual)))[graph.outputs[0]]
        errors.append(float(np.square(real - exact).mean()))
    assert errors[1] < errors[0] / 4 if wide else errors[1] == errors[0]
