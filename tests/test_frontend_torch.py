"""torch.export programs become float graphs that compute the same, and integer graphs that compute almost the same."""

from __future__ import annotations

import contextlib
import functools
import zipfile

import numpy as np
import pytest
import torch
from frontend_models import ARCHITECTURES, build, example
from torch import nn

from edgeforge.errors import EdgeForgeError, InvalidInput, Unsupported
from edgeforge.frontend.torch import from_exported, from_module, from_pt2
from edgeforge.ir.text import parse_graph, print_graph, tensors
from edgeforge.passes import optimize
from edgeforge.quantize.assign import assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert
from edgeforge.recipe import Override, Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.target import load_target

TOLERANCE = 1e-3


@functools.cache
def graph_of(name):
    return optimize(from_module(build(name), (example(name),), name).graph)


def relative_error(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


def sqnr_db(got, want):
    return float(10 * np.log10((want**2).sum() / ((got - want) ** 2).sum()))


def run_one(graph, *arrays):
    outputs = run_float(graph, dict(zip(graph.inputs, arrays, strict=True)))
    return [outputs[name] for name in graph.outputs]


def check(module, *arguments):
    """Import, optimize, run: every output within TOLERANCE. Gives the graph."""
    module = module.eval()
    graph = optimize(from_module(module, arguments, "model").graph)
    with torch.no_grad():
        want = module(*arguments)
    wanted = [want] if isinstance(want, torch.Tensor) else list(want)
    for got, real in zip(run_one(graph, *(a.numpy() for a in arguments)), wanted, strict=True):
        assert got.shape == tuple(real.shape)
        assert relative_error(got, real.numpy()) < TOLERANCE
    return graph


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *arguments):
        return self.function(self, *arguments)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_imported_architecture_computes_what_the_module_computes(name):
    graph = graph_of(name)
    for batch in (1, 3):
        x = example(name, batch, seed=1)
        with torch.no_grad():
            want = build(name)(x).numpy()
        error = relative_error(run_one(graph, x.numpy())[0], want)
        assert error < TOLERANCE, f"{name}: max relative error {error:.2e} at batch {batch}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_imported_graph_prints_and_parses_back(name):
    graph = graph_of(name)
    assert print_graph(parse_graph(print_graph(graph), tensors(graph))) == print_graph(graph)


#: Least SQNR in dB. Weights are random (a trained network does better), and the 52 random layers of MobileNetV2 add up
#: the error of 8-bit weights.
FLOORS = {
    "w8a8": dict.fromkeys(ARCHITECTURES, 15.0),
    "w8a16": {**dict.fromkeys(ARCHITECTURES, 30.0), "mobilenet_v2": 18.0},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_imported_architecture_quantizes_and_simulates(name):
    graph, target = graph_of(name), load_target("snapdragon-8-gen-3")
    feed = graph.inputs[0]
    batches = [{feed: example(name, 4, seed).numpy()} for seed in range(2, 6)]
    ranges = calibrate(graph, batches)
    test = {feed: example(name, 4, seed=3).numpy()}
    want = run_float(graph, test)[graph.outputs[0]]
    reached = {}
    for precision in ("w8a8", "w8a16"):
        integer = convert(graph, assign(graph, ranges, Recipe(precision=precision), target), target)
        codes = simulate(integer, quantize_feeds(integer, test))
        reached[precision] = sqnr_db(dequantize_outputs(integer, codes)[integer.outputs[0]], want)
        assert reached[precision] > FLOORS[precision][name], f"{name}: {reached}"
    assert reached["w8a16"] > reached["w8a8"], f"{name}: {reached}"


def test_sources_and_value_names_are_module_paths():
    graph = graph_of("llama")
    node = next(n for n in graph.nodes if n.source == "model.model.layers.0.mlp.down_proj")
    assert (node.op, node.output) == ("linear", "model.model.layers.0.mlp.down_proj")
    assert "model.model.layers.0.mlp.down_proj.weight" in graph.values
    assert {n.op for n in graph.nodes if "layernorm" in n.source} == {"rms_norm"}
    assert all(n.source for n in graph.nodes)


def test_names_are_stable_between_imports():
    again = optimize(from_module(build("vit"), (example("vit"),), "vit").graph)
    assert again.hash() == graph_of("vit").hash()


def test_override_by_module_path_reaches_the_node():
    graph, target = graph_of("llama"), load_target("snapdragon-8-gen-3")
    ranges = calibrate(graph, [{graph.inputs[0]: example("llama", 2).numpy()}])
    recipe = Recipe(overrides=(Override(match="*.down_proj", precision="w4a16"),))
    plan = assign(graph, ranges, recipe, target)
    assert plan.precision["model.model.layers.0.mlp.down_proj"].name == "w4a16"


def test_zero_padding_of_tensorflow_merges_into_the_convolution():
    graph = graph_of("mobilenet_v2")
    assert {n.op for n in graph.nodes} == {"conv2d", "add", "reduce_mean", "reshape", "linear"}
    assert (0, 0, 1, 1) in {n.attrs["pads"] for n in graph.nodes if n.op == "conv2d"}


def test_attention_scale_is_folded_into_the_query_projection():
    assert not [n for n in graph_of("vit").nodes if n.op == "mul"]


def test_causal_mask_is_bounded_so_that_the_scores_keep_codes():
    masks = [v.data.min() for v in graph_of("llama").constants() if v.data.shape == (1, 1, 16, 16)]
    assert masks and min(masks) == -100.0


A, B = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
MATRIX = torch.randn(8, 5)
CASES = {
    "division by a constant": lambda m, x: x / 3.0 + 1,
    "division by an activation": lambda m, x: x / (x * x + 1.0),
    "powers": lambda m, x: x**2 + x**3 + (x * x + 1) ** 0.5 + (x * x + 1) ** -0.5,
    "chunks and splits": lambda m, x: torch.cat([*x.chunk(2, -1)[::-1], *x.split([3, 5], -1)], 1 + 1),
    "select, stack, unbind": lambda m, x: torch.stack([x[:, 0], *x.unbind(1)[1:3]], 1),
    "irregular constant indices": lambda m, x: x[:, torch.tensor([4, 0, 3])],
    "variance": lambda m, x: x.var(-1, keepdim=True) + x.mean(1, keepdim=True) + x.sum(-1, keepdim=True),
    "masked fill": lambda m, x: x.masked_fill(torch.arange(8) > 5, 2.0),
    "where": lambda m, x: torch.where(torch.arange(8) > 5, x, -1.0),
    "matrix on the right": lambda m, x: x @ MATRIX,
    "matrix on the left": lambda m, x: torch.ones(3, 6) @ x,
    "activation product": lambda m, x: x @ x.transpose(1, 2),
    "einsum": lambda m, x: torch.einsum("bij,bkj->bik", x, x),
    "repeat": lambda m, x: x.repeat(1, 2, 1) + x.repeat_interleave(2, dim=1),
    "clamps": lambda m, x: x.clamp(min=0) + x.clamp(max=0.5) + x.clamp(-1, 1) + nn.functional.relu6(x),
    "constants of the model": lambda m, x: x + torch.full((8,), 2.0).cumsum(0) * torch.cos(torch.arange(8.0)),
    "layer norm by hand": lambda m, x: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, False, keepdim=True) + 1e-5),
    "rms norm": lambda m, x: nn.functional.rms_norm(x, (8,), torch.arange(8.0)),
    "causal attention": lambda m, x: nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
    "boolean mask": lambda m, x: nn.functional.scaled_dot_product_attention(x, x, x, torch.eye(6).bool()),
    "two outputs": lambda m, x: (x + 1, x * 2),
    "in place": lambda m, x: torch.relu_(x * 2).add_(1),
    "activations": lambda m, x: nn.functional.gelu(x, approximate="tanh") + nn.functional.silu(x) + torch.exp(-x * x),
    "halves": lambda m, x: x.to(torch.bfloat16).float() * 0 + x,
}


@pytest.mark.parametrize("case", CASES)
def test_expression_is_imported(case):
    torch.manual_seed(1)
    check(Call(CASES[case]), torch.randn(2, 6, 8))


IMAGES = {
    "stride and dilation": nn.Conv2d(4, 8, 3, 2, 2, 2),
    "same padding, groups": nn.Conv2d(4, 8, 4, padding="same", groups=2),
    "max pool, ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "average pool, ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average pool without its padding": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "adaptive pool": nn.AdaptiveAvgPool2d(5),
    "norm, flatten, linear": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)),
    "padded average": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2)),
}


@pytest.mark.parametrize("case", IMAGES)
def test_image_layer_is_imported(case):
    torch.manual_seed(1)
    check(IMAGES[case], torch.randn(1, 4, 10, 10))


def test_grouped_query_attention_is_imported():
    def attend(m, q, k):
        return nn.functional.scaled_dot_product_attention(q, k, k, scale=0.3, enable_gqa=True)

    check(Call(attend), torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8))


def test_one_dimensional_convolution_is_imported():
    check(nn.Conv1d(4, 6, 3, 2, 1), torch.randn(1, 4, 12))


def test_tied_embedding_and_head_share_one_constant():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)

        def forward(self, ids):
            return self.embed(ids) @ self.embed.weight.t()

    graph = check(Tied(), torch.tensor([[1, 2, 3]]))
    assert graph.type(graph.inputs[0]).dtype == "i64"


def test_training_mode_is_restored():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model[1].eval()
    from_module(model, (torch.randn(1, 4),), "model")
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_every_unsupported_node_is_reported_with_its_module():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.sort(x).values + torch.fft.rfft(x).abs().sum()

    with pytest.raises(Unsupported) as caught:
        from_module(nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 4), Odd()), (torch.randn(1, 4),), "model")
    found = [(reason.where, reason.op) for reason in caught.value.reasons]
    assert ("1", "aten.sort.default") in found and ("3", "aten.sort.default") in found
    assert len(found) >= 4 and all(reason.why and reason.remedy for reason in caught.value.reasons)


def test_dynamic_shape_names_the_dimension_and_the_remedy():
    sizes = {"x": {0: torch.export.Dim("batch")}}

    class Plain(nn.Module):
        def forward(self, x):
            return x * 2

    program = torch.export.export(Plain(), (torch.randn(2, 4),), dynamic_shapes=sizes)
    with pytest.raises(InvalidInput, match=r"input x: dimension 0 is dynamic .*without dynamic_shapes"):
        from_exported(program, "model")


def test_nan_weights_are_named():
    model = nn.Linear(4, 4)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match="NaN or infinity in weight"):
        from_module(model, (torch.randn(1, 4),), "model")


def test_boolean_input_and_constant_output_are_refused():
    with pytest.raises(InvalidInput, match="boolean"):
        from_module(Call(lambda m, x, mask: x * mask), (torch.randn(1, 4), torch.ones(1, 4).bool()), "model")
    with pytest.raises(InvalidInput, match="output 1 is a constant"):
        from_module(Call(lambda m, x: (x + 1, torch.ones(3))), (torch.randn(1, 4),), "model")


def test_untraceable_module_is_invalid_input():
    with pytest.raises(InvalidInput, match=r"torch\.export cannot trace"):
        from_module(Call(lambda m, x: x if x.sum() > 0 else -x), (torch.randn(1, 4),), "model")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.randn(1, 4),)), path)
    return path


def rewrite(source, target, change):
    """Copy an archive with the entries that ``change(name, data)`` gives."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            for entry, data in change(name, old.read(name)):
                new.writestr(entry, data)
    return target


def test_pt2_file_is_imported(saved):
    graph = optimize(from_pt2(saved).graph)
    assert graph.name == "tiny" and [n.op for n in graph.nodes] == ["linear"]
    assert graph.nodes[0].attrs["clamp"][0] == 0.0


def test_damaged_pt2_file_is_invalid_input(saved, tmp_path):
    data = saved.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 30):
        (tmp_path / "cut.pt2").write_bytes(data[:cut])
        with pytest.raises(InvalidInput, match=r"cut\.pt2"):
            from_pt2(tmp_path / "cut.pt2")
    source = np.random.default_rng(0)
    for _ in range(30):
        flipped = bytearray(data)
        flipped[source.integers(len(data))] ^= 1 << source.integers(8)
        (tmp_path / "flipped.pt2").write_bytes(flipped)
        with contextlib.suppress(EdgeForgeError):
            from_pt2(tmp_path / "flipped.pt2")


def test_pt2_file_with_pickled_code_is_refused_before_it_runs(saved, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    def with_bomb(name, data):
        yield name, pickle.dumps(Bomb()) if name.endswith("sample_inputs/model.pt") else data

    with pytest.raises(InvalidInput, match="more than tensors"):
        from_pt2(rewrite(saved, tmp_path / "bomb.pt2", with_bomb))
    assert not (tmp_path / "ran").exists()


def test_pt2_file_with_native_code_is_refused(saved, tmp_path):
    def with_library(name, data):
        yield name, data
        if name.endswith("archive_version"):
            yield name.partition("/")[0] + "/data/aotinductor/model/lib.so", b"\x7fELF"

    with pytest.raises(InvalidInput, match="native code"):
        from_pt2(rewrite(saved, tmp_path / "native.pt2", with_library))
