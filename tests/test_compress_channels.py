"""Free scales: found by structure, and the function is the same for any of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeforge.compress.channels import find_channels
from edgeforge.compress.rotate import apply, orthogonal
from edgeforge.data import Dataset, from_arrays
from edgeforge.frontend.torch import from_module
from edgeforge.ir.graph import Graph
from edgeforge.ir.types import TensorType, Value
from edgeforge.ir.verify import verify
from edgeforge.passes import optimize
from edgeforge.recipe import Recipe, Rotate
from edgeforge.sim.evaluate import run_float
from edgeforge.target import load_target

tf = pytest.importorskip("transformers")

IDS = torch.arange(12)[None] % 50


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(ids)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


def llama() -> Graph:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=50)
    config = tf.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8, use_cache=False, **sizes)
    return imported(Logits(tf.LlamaForCausalLM(config)), IDS)


def bert() -> Graph:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=50)
    return imported(Logits(tf.BertModel(tf.BertConfig(num_attention_heads=4, **sizes))), IDS)


class Inverted(nn.Module):
    """A stem and two inverted residuals, the second with a skip around it, as in MobileNetV2 but with plain ReLU."""

    def __init__(self, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), act())
        self.a, self.b = self.block(8, 12, 2, act), self.block(12, 12, 1, act)
        self.head = nn.Linear(12, 5)

    @staticmethod
    def block(inputs: int, outputs: int, stride: int, act: type[nn.Module]) -> nn.Sequential:
        wide = inputs * 2
        expand = nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), act())
        depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide), act(), nn.MaxPool2d(3, 1, 1))
        return nn.Sequential(expand, depthwise, nn.Conv2d(wide, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(self.stem(x))
        return self.head((x + self.b(x)).mean((2, 3)))


def imported(module: nn.Module, example: torch.Tensor) -> Graph:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1) * 0.7
    return optimize(from_module(module.eval(), (example,), "net").graph)


MODELS = {
    "llama": llama,
    "bert": bert,
    "cnn": lambda: imported(Inverted(), torch.zeros(1, 3, 16, 16)),
    "relu6": lambda: imported(Inverted(nn.ReLU6), torch.zeros(1, 3, 16, 16)),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def graph(request) -> Graph:
    return MODELS[request.param]()


def feed(graph: Graph) -> dict[str, np.ndarray]:
    (name,), rng = graph.inputs, np.random.default_rng(1)
    kind = graph.type(name)
    shape = (3, *kind.shape[1:])
    return {name: rng.integers(0, 50, shape) if kind.dtype == "i64" else rng.normal(size=shape).astype(np.float32)}


def far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def test_any_scales_leave_the_function_as_it_was(graph):
    channels, x = find_channels(graph), feed(graph)
    wanted = run_float(graph, x)
    for seed in range(3):
        scaled = verify(channels.rescale(graph, np.random.default_rng(seed).normal(0, 1, channels.count)))
        got = run_float(scaled, x)
        assert far(wanted[graph.outputs[0]], got[graph.outputs[0]]) < 1e-5


def test_every_scale_changes_the_activations_that_its_group_names(graph):
    channels, x = find_channels(graph), feed(graph)
    before: dict[str, np.ndarray] = {}
    run_float(graph, x, lambda node, y: before.update({node.output: y.numpy()}))
    for group in channels.groups:
        step = np.zeros(channels.count)
        step[group.span] = 0.5
        after: dict[str, np.ndarray] = {}
        scaled = channels.rescale(graph, step)
        run_float(scaled, x, lambda node, y, after=after: after.update({node.output: y.numpy()}))
        changed = {name for name, y in before.items() if far(y, after[name]) > 1e-3}
        assert changed == set(group.values)


def pairs(graph: Graph) -> set[tuple[tuple[str, ...], int]]:
    """The modules of each group's nodes (last part of their names), and its number of scales."""
    module = {node.output: node.source.rpartition(".")[2] for node in graph.nodes}
    return {
        ((*(module[n] for n in (*g.up, *g.down)), "->", *(module[n] for n in g.readers)), g.last - g.first)
        for g in find_channels(graph).groups
    }


def test_a_decoder_has_the_five_known_pairs_and_its_head():
    assert pairs(llama()) == {
        (("input_layernorm", "->", "q_proj", "k_proj", "v_proj"), 32),
        (("q_proj", "k_proj", "->"), 2 * 4),  # key/value heads x rotary pairs
        (("v_proj", "->", "o_proj"), 2 * 8),  # key/value heads x head size
        (("post_attention_layernorm", "->", "gate_proj", "up_proj"), 32),
        (("up_proj", "->", "down_proj"), 48),
        (("norm", "->", "lm_head"), 32),
    }


def test_an_encoder_scales_queries_against_keys_and_values_into_the_output():
    assert pairs(bert()) == {(("query", "key", "->"), 32), (("value", "->", "dense"), 32)}


def test_a_cnn_chains_through_relu_depthwise_and_skips():
    widths = sorted(g.last - g.first for g in find_channels(MODELS["cnn"]()).groups)
    assert widths == [8, 12, 16, 16, 24, 24]
    assert [g.last - g.first for g in find_channels(MODELS["relu6"]()).groups] == [12], "ReLU6 fixes the scale"


def test_rotating_the_residual_stream_leaves_a_decoder_as_it_was_and_spreads_its_outliers():
    graph = llama()
    table = next(node.inputs[0] for node in graph.nodes if node.op == "gather")
    data = graph.values[table].data.copy()
    data[:, 3] *= 30
    graph = graph.rebuild(values={**graph.values, table: Value(table, TensorType(data.shape), data)})
    turned = verify(apply(graph, Rotate(), Recipe(), load_target("snapdragon-8-gen-3"), from_ids(graph)))
    before, after = {}, {}
    wanted = run_float(graph, feed(graph), lambda node, y: before.update({node.output: y.numpy()}))
    got = run_float(turned, feed(graph), lambda node, y: after.update({node.output: y.numpy()}))
    assert far(wanted[graph.outputs[0]], got[graph.outputs[0]]) < 1e-4
    stream = next(node.output for node in graph.nodes if node.op == "gather")
    crest = [np.abs(x[stream]).max() / x[stream].std() for x in (before, after)]
    assert crest[1] < 0.6 * crest[0]


def test_rotating_the_bottlenecks_of_a_cnn_leaves_it_as_it_was():
    class Closed(Inverted):
        """Only layers read the sum."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(self.stem(x))
            return self.head(self.last(x + self.b(x)).mean((2, 3)))

        def __init__(self) -> None:
            super().__init__(nn.ReLU6)
            self.last = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU6())

    graph = imported(Closed(), torch.zeros(1, 3, 16, 16))
    turned = verify(apply(graph, Rotate(), Recipe(), load_target("snapdragon-8-gen-3"), from_ids(graph)))
    before, after = {}, {}
    wanted = run_float(graph, feed(graph), lambda node, y: before.update({node.output: y.numpy()}))
    got = run_float(turned, feed(graph), lambda node, y: after.update({node.output: y.numpy()}))
    assert far(wanted[graph.outputs[0]], got[graph.outputs[0]]) < 1e-4
    moved = {node.output for node in graph.nodes if far(before[node.output], after[node.output]) > 0.1}
    outputs = {node.output for node in graph.nodes if node.op == "conv2d" and "clamp" not in node.attrs}
    assert moved == outputs | {node.output for node in graph.nodes if node.op == "add"} and len(moved) == 3


def test_a_sum_that_a_depthwise_layer_or_an_activation_reads_is_not_rotated():
    class Read(nn.Module):
        def __init__(self, last: nn.Module):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    for last in (nn.Conv2d(4, 4, 3, groups=4), nn.Sequential(nn.Hardswish(), nn.Conv2d(4, 4, 1))):
        graph = imported(Read(last), torch.zeros(1, 3, 8, 8))
        turned = apply(graph, Rotate(), Recipe(), load_target("snapdragon-8-gen-3"), from_ids(graph))
        for node in graph.nodes:
            for i in range(1, len(node.inputs)):
                np.testing.assert_array_equal(graph.values[node.inputs[i]].data, turned.values[node.inputs[i]].data)


def from_ids(graph: Graph) -> Dataset:
    return from_arrays("ids", feed(graph), graph)


@pytest.mark.parametrize("size", [1, 8, 12, 7])
def test_rotations_are_orthogonal(size):
    q = orthogonal(size, np.random.default_rng(0))
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_rotated_values_and_output_projections_cancel_head_by_head(name):
    graph = MODELS[name]()
    turned = verify(apply(graph, Rotate(), Recipe(), load_target("snapdragon-8-gen-3"), from_ids(graph)))
    before, after = {}, {}
    wanted = run_float(graph, feed(graph), lambda node, y: before.update({node.output: y.numpy()}))
    got = run_float(turned, feed(graph), lambda node, y: after.update({node.output: y.numpy()}))
    assert far(wanted[graph.outputs[0]], got[graph.outputs[0]]) < 1e-4
    values = [node.output for node in graph.nodes if node.source.endswith(("v_proj", "value"))]
    assert len(values) == 2 and all(far(before[n], after[n]) > 0.1 for n in values)
    heads = [np.square(x[n]).reshape(*x[n].shape[:-1], -1, 8).sum(-1) for x in (before, after) for n in values]
    np.testing.assert_allclose(heads[:2], heads[2:], rtol=1e-3)


def test_an_encoder_with_norms_behind_its_sums_keeps_its_residual_stream():
    graph = bert()
    turned = apply(graph, Rotate(), Recipe(), load_target("snapdragon-8-gen-3"), from_ids(graph))
    before, after = {}, {}
    run_float(graph, feed(graph), lambda node, y: before.update({node.output: y.numpy()}))
    run_float(turned, feed(graph), lambda node, y: after.update({node.output: y.numpy()}))
    assert all(far(before[n.output], after[n.output]) < 1e-4 for n in graph.nodes if n.op in ("add", "layer_norm"))


def test_weights_that_two_layers_share_stay_as_they_are():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(torch.relu(self.first(x)))))

    assert find_channels(imported(Twice(), torch.zeros(1, 6))).count == 0
