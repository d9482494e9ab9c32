"""Weights chosen layer by layer: each method against nearest rounding, on convolutions of every kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeforge.backends.ort_qnn import BACKEND
from edgeforge.data import Dataset, from_arrays
from edgeforge.frontend import Imported
from edgeforge.frontend.torch import from_module
from edgeforge.ir.graph import Graph
from edgeforge.ir.types import QParams, TensorType
from edgeforge.models import Model
from edgeforge.passes import optimize
from edgeforge.pipeline import quantize, ranges_of
from edgeforge.quantize import adaround, gptaq, layerwise, seqmse
from edgeforge.quantize.assign import assign, bits
from edgeforge.quantize.gptq import column_codes, factored
from edgeforge.quantize.layerwise import Layer, patches
from edgeforge.recipe import Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.parity import sqnr_db
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")


class Bottleneck(nn.Module):
    """A stem, a depthwise and a grouped convolution, a projection and a head; uneven strides and paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 3, 1, 2, dilation=2, groups=4)
        self.project = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.stem(x))
        y = self.project(nn.functional.relu6(self.grouped(nn.functional.relu6(self.depthwise(x)))))
        return self.head((x + y).mean((2, 3)))


def bottleneck() -> Graph:
    torch.manual_seed(0)
    module = Bottleneck().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    return optimize(from_module(module, (torch.zeros(1, 3, 12, 12),), "bottleneck").graph)


def images(count: int, seed: int) -> np.ndarray:
    """Smooth: neighboring pixels are alike."""
    coarse = np.random.default_rng(seed).normal(size=(count, 3, 4, 4))
    return np.kron(coarse, np.ones((1, 1, 3, 3))).astype(np.float32)


def test_views_come_behind_the_images_and_are_parts_of_them():
    x = images(3, 0).repeat(4, 2).repeat(4, 3)
    data = Dataset("images", 3, lambda i: {"x": x[i : i + 1], "size": np.ones((1, 2), np.float32)}, np.arange(3))
    found = data.with_views(4).stacked()
    assert found["x"].shape == (12, 3, 48, 48) and found["size"].shape == (12, 2)
    np.testing.assert_array_equal(found["x"][:3], x)
    np.testing.assert_array_equal(found["x"], data.with_views(4).stacked()["x"])
    assert data.with_views(1).stacked()["x"].shape == x.shape
    for view, image in zip(found["x"][3:], np.tile(x, (3, 1, 1, 1)), strict=True):
        assert not np.array_equal(view, image)
        assert image.min() - 1e-5 <= view.min() and view.max() <= image.max() + 1e-5
    flat = Dataset("flat", 1, lambda i: {"x": np.full((1, 3, 20, 30), 0.5, np.float32)}).with_views(20)
    np.testing.assert_allclose(flat.stacked()["x"], 0.5, rtol=1e-6)


def outputs(weights: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the float and the integer network, on images that were not calibrated on."""
    graph = bottleneck()
    (name,) = graph.inputs
    recipe = Recipe.model_validate({"precision": "w4a8", "weights": weights})
    data = from_arrays("images", {name: images(64, 0)}, graph)
    integer = quantize(Model("bottleneck", Imported(graph), Path()), recipe, TARGET, data)
    feeds = {name: images(64, 1)}
    codes = simulate(integer, quantize_feeds(integer, feeds))
    assert {integer.type(n.inputs[1]).dtype for n in integer.nodes if n.op in ("conv2d", "linear")} == {"i4"}
    real = dequantize_outputs(integer, codes)
    return run_float(graph, feeds)[graph.outputs[0]], real[graph.outputs[0]]


@pytest.mark.parametrize(("method", "gain"), [("gptq", 1), ("seqmse", 1), ("gptaq", 4), ("adaround", 4)])
def test_each_method_is_better_than_nearest_rounding_on_unseen_images(method, gain, monkeypatch):
    monkeypatch.setattr(adaround, "STEPS", 200)
    assert sqnr_db(*outputs(method)) > sqnr_db(*outputs("minmax")) + gain


@pytest.mark.parametrize("place", ["stem", "depthwise", "grouped", "head"])
def test_patches_times_weights_are_the_layer(place):
    graph = bottleneck()
    seen: dict[str, np.ndarray] = {graph.inputs[0]: images(2, 0)}
    run_float(graph, {graph.inputs[0]: images(2, 0)}, lambda node, y: seen.update({node.output: y.numpy()}))
    (node,) = (n for n in graph.nodes if n.op in ("conv2d", "linear") and place in n.source)
    n = graph.view(node)
    rows = patches(n, seen[node.inputs[0]], None)
    weight, bias = (graph.values[name].data for name in node.inputs[1:])
    y = rows @ weight.reshape(len(rows), -1, rows.shape[2]).swapaxes(1, 2)
    y = y.transpose(1, 0, 2).reshape(2, -1, len(weight)) + bias
    y = y.clip(*node.attrs.get("clamp", (-np.inf, np.inf)))
    found = seen[node.output].reshape(2, len(weight), -1).swapaxes(1, 2)
    np.testing.assert_allclose(found, y.reshape(found.shape), rtol=1e-4, atol=1e-5)
    few = patches(n, seen[node.inputs[0]], 5)
    assert few.shape[1] == 2 * min(5, y.shape[1])


def one_layer(block: int | None = None, samples: int = 300, outputs: int = 12) -> Layer:
    """Correlated inputs, and the same after a disturbance that depends on them."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1, samples, 6)) @ rng.normal(size=(6, 16)) + 0.1 * rng.normal(size=(samples, 16))) + 1
    disturbed = np.round(x * 4) / 4 * 0.9 + 0.1
    weight = rng.normal(size=(1, outputs, 16)).astype(np.float32)
    peak = np.abs(weight[0]).max(1) / 7
    if block is None:
        q = QParams(peak, axis=0)
    else:
        unit = np.float32(peak / 16)
        steps = np.ceil(np.abs(weight.reshape(outputs, -1, block)).max(2) / 7 / unit[:, None] - 1e-6)
        q = QParams(steps * unit[:, None], axis=0, block=block)
    kind = TensorType((outputs, 16), "i4", q)
    bias = np.zeros((1, outputs), np.float32)
    return Layer(weight, bias, x.astype(np.float32), disturbed.astype(np.float32), kind, 0.0, None)


def error(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """Squared error of each channel about its mean."""
    y = layer.exact @ layer.weight.swapaxes(1, 2) - layer.rounded @ weight.swapaxes(1, 2)
    return y.var(1)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("method", [gptaq, seqmse, adaround])
def test_a_choice_lies_on_its_grid_and_errs_less_than_nearest_rounding(method, block):
    layer = one_layer(block)
    weight, kind = method.choose(layer)
    codes = weight.reshape(kind.shape) / kind.q.broadcast(kind.shape)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert np.abs(codes).max() < 7.001
    if block is not None:
        channel = kind.q.scale.max(1, keepdims=True) / (layer.kind.q.scale.max(1, keepdims=True))
        np.testing.assert_allclose(kind.q.scale, layer.kind.q.scale * channel, rtol=1e-6)
    nearest = seqmse.nearest(layer.weight, layer.scaled(1.0)[1], layer.top)
    assert error(layer, weight).sum() < error(layer, nearest).sum()


def test_seqmse_finds_the_best_of_its_shares():
    layer = one_layer(samples=2000)
    found = error(layer, seqmse.choose(layer)[0])
    for share in seqmse.SHARES:
        assert (found <= error(layer, seqmse.nearest(layer.weight, layer.scaled(share)[1], layer.top)) * 1.0001).all()


def test_columns_in_strides_are_the_columns_one_by_one(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 200, 12))
    moment = x.swapaxes(1, 2) @ x
    weight, scale = rng.normal(size=(1, 2, 5, 12)), np.full((3, 2, 5, 1), 0.2) * np.arange(1, 4).reshape(3, 1, 1, 1)
    factor = factored(moment)
    whole = column_codes(weight, scale, factor, 7)
    monkeypatch.setattr("edgeforge.quantize.gptq.STRIDE", 5)
    np.testing.assert_array_equal(column_codes(weight, scale, factor, 7), whole)
    assert whole.shape == (3, 2, 5, 12)


def test_after_sweeps_no_column_has_a_better_value_beside_the_others():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 8)) @ rng.normal(size=(8, 8))
    moment, wanted, scale = x.swapaxes(1, 2) @ x, rng.normal(size=(2, 5, 8)), np.full((2, 5, 1), 0.2)

    def error(codes: np.ndarray) -> np.ndarray:
        away = codes * scale - wanted
        return np.einsum("kpd,kde,kpe->kp", away, moment, away)

    codes = column_codes(wanted[None], scale[None], factored(moment), 7)[0].astype(float)
    for _ in range(10):
        before, codes = error(codes), gptaq.swept(codes, scale, wanted, moment, 7)
        assert (error(codes) <= before + 1e-9).all()
    for j in range(8):
        for step in (-1, 1):
            moved = codes + step * (np.arange(8) == j)
            assert ((error(moved) >= error(codes) - 1e-9) | (np.abs(moved).max(2) > 7)).all()


def clamped(layer: Layer, weight: np.ndarray, shift: np.ndarray) -> float:
    """Squared error of a layer's output behind its clamp."""
    assert layer.clamp is not None
    wanted = layer.exact @ layer.weight.swapaxes(1, 2) + layer.bias
    found = layer.rounded @ weight.swapaxes(1, 2) + layer.bias + shift
    return float(np.square(wanted.clip(*layer.clamp) - found.clip(*layer.clamp)).mean())


def test_a_choice_minds_the_rows_that_pass_the_clamp():
    layer = one_layer(samples=4000, outputs=30)
    most = np.quantile(layer.exact @ layer.weight.swapaxes(1, 2), 0.8, 1).astype(np.float32)
    layer = replace(layer, bias=-most, clamp=(0.0, 6.0), rounded=layer.exact)
    every = replace(layer, clamp=None)
    blind, seeing = gptaq.choose(every)[0], gptaq.choose(layer)[0]
    assert clamped(layer, seeing, layer.shift(seeing)) < 0.9 * clamped(layer, blind, every.shift(blind))


def test_rows_that_pass_are_those_within_the_clamp_and_a_little_beyond(monkeypatch):
    layer = replace(one_layer(samples=4000), clamp=(0.0, 6.0))
    y = layer.weight @ layer.exact.swapaxes(1, 2)
    assert layer.passing is not None
    assert layer.passing[(y > 0) & (y < 6)].all()
    assert not layer.passing[(y < -0.1 * y.std(2, keepdims=True)) | (y > 6 + 0.1 * y.std(2, keepdims=True))].any()
    monkeypatch.setattr(layerwise, "FEWEST", 10**6)
    assert replace(layer).passing.all()  # type: ignore[union-attr]


def test_samples_that_join_late_read_what_they_would_have_read_from_the_start(monkeypatch):
    graph = bottleneck()
    (name,) = graph.inputs
    recipe = Recipe.model_validate({"precision": "w4a8", "weights": "gptaq"})
    data = from_arrays("images", {name: images(16, 0)}, graph)
    plan = assign(graph, ranges_of(graph, recipe, data, bits(graph, recipe, TARGET)), recipe, TARGET)
    monkeypatch.setattr(Layer, "shift", lambda layer, weight: np.zeros_like(layer.bias))
    seen: list[Layer] = []

    def nearest(layer: Layer) -> tuple[np.ndarray, TensorType]:
        seen.append(layer)
        kind, scale = layer.scaled(1.0)
        return seqmse.nearest(layer.weight, scale, layer.top), kind

    for most in (4 << 30, 8 * 8 * 16 * 36):  # all, and what eight samples need behind the first layers
        monkeypatch.setattr(layerwise, "MOST_BYTES", most)
        layerwise.choose_layerwise(graph, plan, list(data.batches(4)), nearest)
    first, late = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert late[0].exact.shape[1] < first[0].exact.shape[1]
    np.testing.assert_array_equal(late[-1].exact, first[-1].exact)
    np.testing.assert_array_equal(late[-1].rounded, first[-1].rounded)


@pytest.fixture
def one_channel_without_weights() -> tuple[Graph, dict[str, np.ndarray]]:
    """A layer at w4a8 whose channel 3 is a bias of 2.3 alone, and codes for its input."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(96, 576, 1), nn.ReLU6()).eval()
    net[0].weight.data[3], net[0].bias.data[3] = 0, 2.3
    graph = optimize(from_module(net, (torch.zeros(1, 96, 4, 4),), "net").graph)
    (name,) = graph.inputs
    feeds = {name: np.random.default_rng(0).normal(size=(8, 96, 4, 4)).astype(np.float32)}
    recipe = Recipe.model_validate({"precision": "w4a8"})
    integer = quantize(Model("net", Imported(graph), Path()), recipe, TARGET, from_arrays("images", feeds, graph))
    return integer, quantize_feeds(integer, feeds)


def test_the_bias_of_a_channel_without_weights_stays_a_number_that_hexagon_keeps(one_channel_without_weights) -> None:
    integer, codes = one_channel_without_weights
    (layer,) = (node for node in integer.nodes if node.op == "conv2d")
    bias = integer.values[layer.inputs[2]].data
    assert bias is not None and np.abs(bias).max() <= 2**24
    real = dequantize_outputs(integer, simulate(integer, codes))[integer.outputs[0]]
    np.testing.assert_allclose(real[:, 3], 2.3, atol=0.02)


@pytest.mark.skipif(bool(BACKEND.cannot_run()), reason=BACKEND.cannot_run() or "")
def test_hexagon_keeps_the_bias_of_a_channel_without_weights(one_channel_without_weights, tmp_path) -> None:
    integer, codes = one_channel_without_weights
    BACKEND.compile(integer, TARGET, tmp_path)
    found = BACKEND.run(tmp_path, integer, TARGET, codes)
    np.testing.assert_array_equal(found[integer.outputs[0]], simulate(integer, codes)[integer.outputs[0]])


def test_a_bias_beside_16_bit_inputs_costs_weights_no_precision() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU6()).eval()
    net[0].weight.data *= 0.1
    net[0].bias.data[:] = 2.3
    graph = optimize(from_module(net, (torch.zeros(1, 8, 4, 4),), "net").graph)
    (name,) = graph.inputs
    feeds = {name: np.random.default_rng(0).normal(size=(8, 8, 4, 4)).astype(np.float32)}
    recipe = Recipe.model_validate({"precision": "w8a16"})
    integer = quantize(Model("net", Imported(graph), Path()), recipe, TARGET, from_arrays("images", feeds, graph))
    (layer,) = (node for node in integer.nodes if node.op == "conv2d")
    q = integer.type(layer.inputs[1]).q
    assert q is not None
    np.testing.assert_allclose(q.scale, np.abs(net[0].weight.detach().numpy()).max((1, 2, 3)) / 127, rtol=1e-5)
