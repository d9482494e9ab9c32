"""Methods that choose weights, biases and ranges."""

from __future__ import annotations

import numpy as np
import torch

from edgeforge.frontend.torch import from_module
from edgeforge.ir.graph import Graph
from edgeforge.passes import optimize
from edgeforge.quantize.assign import assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert
from edgeforge.quantize.correct import correct_biases
from edgeforge.recipe import Override, Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.target import load_target


class Cancelling(torch.nn.Module):
    """Large weights on inputs far from zero whose sum is small: rounding the weights moves the output's mean."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.second = torch.nn.Linear(8, 3, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)).mean((2, 3)))


def test_bias_correction_returns_the_mean_that_rounding_took() -> None:
    x = np.random.default_rng(1).uniform(3, 5, (16, 4, 6, 6)).astype(np.float32)
    graph = optimize(from_module(Cancelling().eval(), (torch.zeros(1, 4, 6, 6),), "cancelling").graph)
    target, recipe = load_target("snapdragon-8-gen-3"), Recipe(precision="w4a16")
    plan = assign(graph, calibrate(graph, [{graph.inputs[0]: x}]), recipe, target)
    plain = convert(graph, plan, target)
    corrected = convert(correct_biases(graph, plain, {graph.inputs[0]: x}), plan, target)
    wanted = run_float(graph, {graph.inputs[0]: x})[graph.outputs[0]]

    def shift(integer: Graph) -> np.ndarray:
        codes = simulate(integer, quantize_feeds(integer, {graph.inputs[0]: x}))
        return np.abs((dequantize_outputs(integer, codes)[graph.outputs[0]] - wanted).mean(0)) / np.abs(wanted).max()

    assert shift(plain).max() > 0.005
    assert shift(corrected).max() < 0.001


def test_bias_correction_takes_tied_weights() -> None:
    """The embedding table is the head's weight too, under two encodings."""

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(torch.relu(self.embed(ids)), self.embed.weight)

    ids = np.arange(11)[None]
    graph = optimize(from_module(Tied().eval(), (torch.from_numpy(ids),), "tied").graph)
    target, feeds = load_target("snapdragon-8-gen-3"), {graph.inputs[0]: ids}
    plan = assign(graph, calibrate(graph, [feeds]), Recipe(), target)
    corrected = correct_biases(graph, convert(graph, plan, target), feeds)
    assert [len(node.inputs) for node in corrected.nodes if node.op == "linear"] == [3]


def test_nodes_compute_at_one_width_where_the_target_demands_it() -> None:
    """Widening rounds nothing: most results are within a step of those without it (an 8-bit tie apart)."""

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
            for p in self.parameters():
                p.data = torch.randn(p.shape, generator=generator)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.tanh(self.up(x)))

    x = np.random.default_rng(2).normal(size=(64, 4, 6)).astype(np.float32)
    graph = optimize(from_module(Mixed().eval(), (torch.zeros(1, 4, 6),), "mixed").graph)
    wide = (Override(op="add", output="a16"), Override(match="*down", output="a16"))
    ranges, results = calibrate(graph, [{graph.inputs[0]: x}]), {}
    for name in ("snapdragon-8-gen-3", "x86-host"):
        target = load_target(name)
        integer = convert(graph, assign(graph, ranges, Recipe(overrides=wide), target), target)
        mixed = [
            node.op
            for node in integer.nodes
            if node.op != "requantize"
            and len({integer.type(name).dtype for name in (*node.inputs, node.output)} & {"u8", "u16"}) > 1
        ]
        assert mixed == ([] if target.equal_widths else ["linear", "add"])
        codes = simulate(integer, quantize_feeds(integer, {graph.inputs[0]: x}))
        results[name] = dequantize_outputs(integer, codes)[graph.outputs[0]]
    step = float(integer.type(integer.outputs[0]).q.scale)
    assert np.median(np.abs(results["snapdragon-8-gen-3"] - results["x86-host"])) <= 1.01 * step
