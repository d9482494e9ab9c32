"""What large models need: constants that are stored once, mapped, and written beside the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgeforge import backends
from edgeforge.backends._contexts import constant_bytes, split
from edgeforge.conformance.cases import make_case
from edgeforge.dialects import onnx as dialect
from edgeforge.frontend import huggingface
from edgeforge.ir.types import NUMPY
from edgeforge.ir.verify import verify
from edgeforge.llm.export import calibration_tokens
from edgeforge.llm.quantize import quantize_language
from edgeforge.models import load_model
from edgeforge.pipeline import read_recipe
from edgeforge.sim.evaluate import simulate
from edgeforge.target import load_target

TINYLM = Path(__file__).parents[1] / "models" / "tinylm"
SHORT = ("language.context=48", "language.chunk=16", "calibration.samples=1", "calibration.method=minmax")


@pytest.mark.parametrize("precision", ["w8a16", "w4a16-b32"])
def test_large_constants_lie_beside_the_model_on_pages_and_mean_the_same(precision, tmp_path, monkeypatch):
    case, target, runtime = make_case("linear", precision, 1, 2), load_target("x86-host"), backends.backend("onnx_qdq")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    runtime.compile(case.graph, target, tmp_path / "one")
    monkeypatch.setattr(dialect, "APART", 0)
    monkeypatch.setattr(dialect, "LARGE", 16)
    made = runtime.compile(case.graph, target, tmp_path / "two")
    assert made.files == ("model.onnx", "model.onnx.data")
    model = onnx.load(tmp_path / "two" / "model.onnx", load_external_data=False)
    apart = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    assert apart and all(p["location"] == made.files[1] and int(p["offset"]) % 4096 == 0 for p in apart)
    whole = onnx.load(tmp_path / "two" / "model.onnx")
    for a, b in zip(onnx.load(tmp_path / "one" / "model.onnx").graph.initializer, whole.graph.initializer, strict=True):
        assert (a.name, a.dims, a.raw_data) == (b.name, b.dims, b.raw_data)
    found = [runtime.run(tmp_path / name, case.graph, target, case.feeds) for name in ("one", "two")]
    for name, codes in found[0].items():
        np.testing.assert_array_equal(codes, found[1][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_tensor_becomes_aligned_float32_in_a_mapped_file(dtype, monkeypatch):
    monkeypatch.setattr(huggingface, "LARGE", 64)
    tensor = torch.randn(9, 9).to(dtype).flatten()[1:].reshape(8, 10)
    assert tensor.data_ptr() % 64
    made = huggingface.as_float32(tensor)
    assert made.dtype == torch.float32 and made.data_ptr() % 4096 == 0 and torch.equal(made, tensor.float())
    aligned = torch.randn(8, 10)
    assert huggingface.as_float32(aligned) is aligned


@pytest.fixture(scope="module")
def language():
    """tinylm's integer prefill and decode graphs."""
    model, target = load_model(str(TINYLM), traced=False), load_target("snapdragon-8-gen-3")
    recipe = read_recipe(model, None, "w8a8", SHORT)
    parts = quantize_language(model.language, recipe, target, calibration_tokens(model, recipe, "random")[0]).parts
    return {name: part.graph for name, part in parts.items()}


def test_prefill_and_decode_hold_one_copy_of_each_constant(language):
    prefill, decode = (language[name].values for name in ("prefill", "decode"))
    shared = [name for name in prefill if prefill[name].const and name in decode]
    assert any("embed" in name for name in shared) and any("down_proj" in name for name in shared)
    assert all(prefill[name].data is decode[name].data for name in shared if prefill[name].data.size > 1000)


def test_what_one_context_cannot_hold_is_refused_with_both_sizes_where_it_cannot_be_split():
    graph = make_case("linear", "w8a8", 1, 2).graph
    size = sum(value.type.nbytes for value in graph.constants())
    target = load_target("snapdragon-8-gen-3")
    assert target.context_bytes == 2**32
    for name in ("ort_qnn", "executorch_qnn"):
        chosen = backends.backend(name)
        assert not chosen.refusals(graph, target)
        (reason,) = chosen.refusals(graph, target.model_copy(update={"context_bytes": size - 1}))
        assert "GB of constants, one context of the NPU holds" in reason.why and "narrower weights" in reason.remedy
        assert not chosen.refusals(graph, target.model_copy(update={"context_bytes": size}))


@pytest.mark.parametrize("share", [0.7, 0.3, 0.12])
def test_parts_fit_their_contexts_and_compute_the_same(language, share):
    graph = language["decode"]
    most = int(share * constant_bytes(graph))
    parts = split(graph, most)
    assert len(parts) > 1 and all(constant_bytes(part) <= most for part in parts.values())
    feeds = {name: np.zeros(graph.type(name).shape, NUMPY[graph.type(name).dtype]) for name in graph.inputs}
    known = dict(feeds)
    for part in parts.values():
        known |= simulate(verify(part), {name: known[name] for name in part.inputs})
    for name, codes in simulate(graph, feeds).items():
        np.testing.assert_array_equal(known[name], codes)


def test_layers_are_cut_apart_at_the_residual_stream(language):
    graph = language["prefill"]
    _, *later = split(graph, int(0.3 * constant_bytes(graph))).values()
    (table,) = (
        graph.values[node.inputs[0]] for node in graph.nodes if node.op == "gather" and "embed" in node.inputs[0]
    )
    for part in later:
        carried = [graph.type(name) for name in part.inputs if name not in graph.inputs]
        wide = [kind for kind in carried if kind.shape[-1] == table.type.shape[1]]
        assert len(wide) == 1 and sum(kind.nbytes for kind in carried) < 2 * wide[0].nbytes  # the others: RoPE's


def test_sums_of_weights_bound_the_accumulator_exactly():
    from edgeforge.ir.fixed import dot_bound, signed_sums

    w, b = np.random.default_rng(0).integers(-127, 128, (3, 4)).astype(np.int8), np.array([5, -900, 7])
    x = np.stack(np.meshgrid(*[[-20, 235]] * 4), -1).reshape(-1, 4)
    assert dot_bound(signed_sums(w), b, -20, 235) == np.abs(x @ w.T.astype(np.int64) + b).max()


def test_methods_of_one_program_hold_one_copy_of_each_constant():
    from edgeforge.dialects.pt2e import SignedModule, share_constants

    graph, other = (make_case("linear", "w8a8", number, 2).graph for number in (1, 2))
    modules = [SignedModule(graph), SignedModule(graph), SignedModule(other)]
    before = [buffer.clone() for buffer in modules[2].buffers()]
    share_constants(modules)
    for name, buffer in modules[0].named_buffers():
        if name.startswith("c"):
            assert modules[1].get_buffer(name) is buffer
    assert all(torch.equal(a, b) for a, b in zip(before, modules[2].buffers(), strict=True))
