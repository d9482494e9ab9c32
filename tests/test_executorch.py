"""The two ExecuTorch backends: what they compile, what runs, and whose integers come out."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeforge.backends import backend
from edgeforge.backends._contexts import NOT_SHARED, constant_bytes
from edgeforge.dialects.pt2e import SignedModule
from edgeforge.errors import BackendFailed, InvalidInput
from edgeforge.frontend.torch import from_module
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import QParams, TensorType, Value
from edgeforge.passes import optimize
from edgeforge.quantize.assign import assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert, with_profile
from edgeforge.recipe import Override, Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.parity import sqnr_db
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")
XNNPACK, QNN, ORT_QNN = (backend(name) for name in ("executorch_xnnpack", "executorch_qnn", "ort_qnn"))

needs_executorch = pytest.mark.skipif(bool(XNNPACK.missing()), reason=XNNPACK.missing())
needs_qnn = pytest.mark.skipif(bool(QNN.missing()), reason=QNN.missing())

#: What keeps a language model accurate at w8a8: residual stream, softmax and everything that is added at 16 bits.
LANGUAGE = tuple(Override(op=op, output="a16") for op in ("add", "gather", "softmax"))


class Convolutions(torch.nn.Module):
    """Uneven and even padding, depthwise stride 2, a residual add, a padded max pool, global pooling."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = torch.nn.Conv2d(1, 8, 3, 2)
        self.body = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.head = torch.nn.Linear(8, 10)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.relu6(self.stem(torch.nn.functional.pad(x, (0, 1, 0, 1))))
        x = torch.nn.functional.max_pool2d(x + self.body(x), 3, 1, 1)
        return self.head(torch.relu(self.depthwise(x)).mean((2, 3)))


Case = tuple[Graph, Graph, dict[str, np.ndarray]]


def quantized(module: torch.nn.Module, feeds: torch.Tensor, recipe: Recipe) -> Case:
    """Float graph, integer graph, and the feeds by name."""
    graph = optimize(from_module(module.eval(), (feeds[:1],), "net").graph)
    named = {graph.inputs[0]: feeds.numpy()}
    return graph, convert(graph, assign(graph, calibrate(graph, [named]), recipe, TARGET), TARGET), named


@functools.cache
def convolutions() -> Case:
    return quantized(Convolutions(), torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1)), Recipe())


@functools.cache
def decoder(*overrides: Override, precision: str = "w8a8") -> Case:
    """A Llama of one layer with random weights, on ids [3, 16]."""
    transformers = pytest.importorskip("transformers")
    from frontend_models import VOCABULARY, Wrapped, _encoder

    torch.manual_seed(0)
    shape = {**_encoder(), "num_hidden_layers": 1, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **shape)
    model = Wrapped(transformers.LlamaForCausalLM(config), "input_ids")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "embed_tokens" in name else parameter.shape[1] ** -0.5)
    ids = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    return quantized(model, ids, Recipe(precision=precision, overrides=(*LANGUAGE, *overrides)))


def requantizes() -> Graph:
    """Behind a sigmoid, two in a row, and one as the graph's output."""
    encodings = {
        "x": ("u8", QParams(np.float32(0.05), 130)),
        "gate": ("u8", QParams(np.float32(1 / 256))),
        "wide": ("u16", QParams(np.float32(1 / 65536))),
        "coarse": ("u8", QParams(np.float32(0.0293), 11)),
        "again": ("u16", QParams(np.float32(0.0293) / np.float32(256), 11 * 256)),
    }
    values = {name: Value(name, TensorType((1, 4, 8), dtype, q)) for name, (dtype, q) in encodings.items()}
    ops = ("sigmoid", *["requantize"] * 3)
    nodes = [Node(op, (x,), y) for op, x, y in zip(ops, encodings, list(encodings)[1:], strict=False)]
    return with_profile(Graph("requantizes", "integer", ("x",), tuple(nodes), ("again",), values), TARGET.numerics)


def compiled(name: str, graph: Graph, feeds: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    chosen = backend(name)
    place = folder / name
    place.mkdir()
    chosen.compile(graph, TARGET, place)
    return chosen.run(place, graph, TARGET, feeds)


# ---------------------------------------------------------------------------------------------------------------- QNN


@needs_qnn
def test_qnn_computes_the_simulators_integers_and_its_bytes_are_reproducible(tmp_path: Path) -> None:
    _, graph, real = convolutions()
    codes = quantize_feeds(graph, real)
    found = compiled("executorch_qnn", graph, codes, tmp_path)
    assert found[graph.outputs[0]].dtype == np.uint8
    assert np.array_equal(found[graph.outputs[0]], simulate(graph, codes)[graph.outputs[0]])
    (tmp_path / "again").mkdir()
    QNN.compile(graph, TARGET, tmp_path / "again")
    assert (tmp_path / "again/model.pte").read_bytes() == (tmp_path / "executorch_qnn/model.pte").read_bytes()


@needs_qnn
def test_qnn_runs_a_mixed_width_decoder_with_the_integers_of_onnx_runtime(tmp_path: Path) -> None:
    _, graph, ids = decoder()
    found, expected = (compiled(name, graph, ids, tmp_path) for name in ("executorch_qnn", "ort_qnn"))
    assert np.array_equal(found[graph.outputs[0]], expected[graph.outputs[0]])


@needs_qnn
def test_qnn_keeps_every_requantize(tmp_path: Path) -> None:
    graph = requantizes()
    codes = {"x": np.arange(256, dtype=np.uint8).reshape(8, 4, 8)}
    found = compiled("executorch_qnn", graph, codes, tmp_path)["again"]
    assert found.dtype == np.uint16
    assert np.array_equal(found, simulate(graph, codes)["again"])


@needs_qnn
def test_qnn_refuses_feeds_of_another_dtype_instead_of_crashing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="expected uint8 codes, got float32"):
        QNN.run(tmp_path, requantizes(), TARGET, {"x": np.zeros((1, 4, 8), np.float32)})


def test_qnn_names_the_release_that_serves_both_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"executorch": "1.5.1", "onnxruntime": "1.32.0", "onnxruntime-qnn": "2.7.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("sys.platform", "linux")
    assert "pip install onnxruntime-qnn==2.5.0" in QNN.missing()
    versions["executorch"] = "1.6.0"
    assert "executorch 1.5.1 is needed, found 1.6.0" in QNN.missing()


@needs_qnn
def test_several_contexts_compute_as_one(tmp_path: Path) -> None:
    _, graph, real = convolutions()
    target = TARGET.model_copy(update={"context_bytes": constant_bytes(graph) // 2})
    artifact = ORT_QNN.compile(graph, target, tmp_path)
    contexts = sorted({file.partition("/")[0] for file in artifact.files})
    assert len(contexts) > 1 and artifact.notes == (f"to be run one after another: {', '.join(contexts)}",)
    codes = quantize_feeds(graph, real)
    (expected,) = simulate(graph, codes).values()
    assert np.array_equal(ORT_QNN.run(tmp_path, graph, target, codes)[graph.outputs[0]], expected)
    assert QNN.refusals(graph, target)


@needs_qnn
def test_graphs_that_one_context_cannot_hold_together_become_programs_of_their_own(tmp_path: Path) -> None:
    _, graph, real = convolutions()
    target = TARGET.model_copy(update={"context_bytes": constant_bytes(graph) * 3 // 2})
    artifact = QNN.compile_together({"prefill": graph, "decode": graph}, target, tmp_path, True)
    assert artifact.files == ("prefill/model.pte", "decode/model.pte") and artifact.notes == (NOT_SHARED,)
    codes = quantize_feeds(graph, real)
    (expected,) = simulate(graph, codes).values()
    assert np.array_equal(QNN.run(tmp_path / "decode", graph, target, codes)[graph.outputs[0]], expected)


# ------------------------------------------------------------------------------------------------------------ XNNPACK


@needs_executorch
def test_xnnpack_computes_the_simulators_integers_quietly_and_reproducibly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, graph, real = convolutions()
    codes = quantize_feeds(graph, real)
    capfd.readouterr()
    found = compiled("executorch_xnnpack", graph, codes, tmp_path)
    assert capfd.readouterr() == ("", "")
    expected = simulate(with_profile(graph, "xnnpack"), codes)
    assert np.array_equal(found[graph.outputs[0]], expected[graph.outputs[0]])
    (tmp_path / "again").mkdir()
    assert XNNPACK.compile(graph, TARGET, tmp_path / "again").islands == ()
    assert (tmp_path / "again/model.pte").read_bytes() == (tmp_path / "executorch_xnnpack/model.pte").read_bytes()


@needs_executorch
def test_xnnpack_runs_what_is_16_bit_as_float_islands(tmp_path: Path) -> None:
    """The head, asked for at w8a16, has a 16-bit output: it rounds its input itself; the other linears stay integer."""
    graph, integer, ids = decoder(Override(match="*lm_head", precision="w8a16", output="a16"))
    artifact = XNNPACK.compile(integer, TARGET, tmp_path)
    ops = {node.output: node.op for node in integer.nodes}
    linears = [name for name, op in ops.items() if op == "linear"]
    assert [name for name in linears if name in artifact.islands] == list(integer.outputs)
    assert {"softmax", "rms_norm", "matmul", "silu", "add"} <= {ops[name] for name in artifact.islands}
    assert integer.outputs[0] in [edit.where for edit in artifact.edits]
    found = XNNPACK.run(tmp_path, integer, TARGET, ids)
    wanted = run_float(graph, ids)[graph.outputs[0]]
    ours, simulated = (
        sqnr_db(wanted, dequantize_outputs(integer, codes)[graph.outputs[0]])
        for codes in (found, simulate(integer, ids))
    )
    assert found[integer.outputs[0]].dtype == np.uint16
    assert ours is not None and simulated is not None and ours > simulated - 1


def test_xnnpack_keeps_integer_weights_beside_16_bit_activations() -> None:
    """Of linears, and of a table that tokens are looked up in; both were float32 once, four and two times the size."""
    _, graph, feeds = decoder(Override(match="*lm_head", precision="w8a16", output="a16"))
    module, users = SignedModule(graph), graph.users()
    weights = [value for value in graph.constants() if users[value.name][0].op in ("linear", "gather")]
    assert {"i8", "u16"} <= {value.type.dtype for value in weights}
    assert any(module.wide(node) for node in graph.nodes if node.op == "linear")
    for value in (v for v in weights if len(v.type.shape) > 1):
        assert module.get_buffer(f"c{module.index[value.name]}").nbytes == value.type.nbytes
    (ids,) = feeds.values()
    (gather,) = (node for node in graph.nodes if node.op == "gather")
    table = graph.values[gather.inputs[0]]
    assert table.data is not None and table.type.q is not None
    rows = module.walk({graph.inputs[0]: torch.from_numpy(ids)})[gather.output]
    np.testing.assert_array_equal(rows.numpy(), table.type.q.dequantize(table.data[ids]))


def test_xnnpack_refuses_16_bit_layers_where_no_other_is_8_bit() -> None:
    _, graph, _ = decoder(precision="w4a16")
    reasons = XNNPACK.refusals(graph, TARGET)
    assert len(reasons) == sum(node.op == "linear" for node in graph.nodes)
    assert {reason.remedy for reason in reasons} == {"export at w4a8"}
    assert XNNPACK.refusals(decoder()[1], TARGET) == []


@needs_executorch
def test_a_damaged_program_is_an_error_that_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the log stays
    (tmp_path / "model.pte").write_bytes(b"not a program" * 100)
    _, graph, real = convolutions()
    with pytest.raises(BackendFailed, match=r"executorch_xnnpack: .*log: "):
        XNNPACK.run(tmp_path, graph, TARGET, quantize_feeds(graph, real))


@pytest.mark.parametrize("profile", ["xnnpack", "ort-cpu"])
def test_the_ratio_of_scales_is_formed_in_float32(profile: str) -> None:
    """Rounded once from float64 it has another last bit here (found on MobileNetV2: 54 % equal logits)."""
    x, w, y = (np.float32(value) for value in (0.0307, 0.0428, 0.0038))
    q = {"x": QParams(x, 7), "w": QParams(np.array([w]), 0, 0), "y": QParams(y, 3)}
    values = {
        "x": Value("x", TensorType((1, 4), "u8", q["x"])),
        "w": Value("w", TensorType((1, 4), "i8", q["w"]), np.ones((1, 4), np.int8)),
        "y": Value("y", TensorType((1, 1), "u8", q["y"])),
    }
    graph = Graph("net", "integer", ("x",), (Node("linear", ("x", "w"), "y"),), ("y",), values)
    fixed = with_profile(graph, profile).nodes[0].fixed
    assert np.ldexp(fixed["mult"].astype(np.float64), -fixed["shift"])[0] == x * w / y
    assert x * w / y != np.float32(np.float64(x) * np.float64(w) / np.float64(y))


@pytest.mark.parametrize(("features", "refused"), [(63, True), (64, False)])
def test_4_bit_linears_of_an_odd_width_are_refused_for_xnnpack(features, refused):
    float_graph = optimize(from_module(torch.nn.Linear(features, 8), (torch.zeros(1, features),), "linear").graph)
    recipe, samples = Recipe(precision="w4a8"), [{float_graph.inputs[0]: np.ones((1, features), np.float32)}]
    graph = convert(float_graph, assign(float_graph, calibrate(float_graph, samples, "minmax"), recipe, TARGET), TARGET)
    assert any("odd number" in reason.why for reason in XNNPACK.refusals(graph, TARGET)) == refused
