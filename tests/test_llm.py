"""A language model with a cache: two graphs with one set of encodings, text, perplexity; a small Llama throughout."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compress_models import block
from conftest import Failed

from edgeforge import backends, cli
from edgeforge.bundle import load_bundle
from edgeforge.compress.channels import find_channels
from edgeforge.errors import BackendFailed, InvalidInput
from edgeforge.frontend.decoder import Decoder, DecoderConfig, Rope
from edgeforge.frontend.language import Language
from edgeforge.llm.evaluate import (
    all_logits,
    artifact_scorer,
    float_scorer,
    multiple_choice,
    perplexity,
    read_questions,
    scoring,
    simulator_scorer,
    text_of,
    windows,
)
from edgeforge.llm.export import calibration_tokens
from edgeforge.llm.generate import Sampling, choose, continued, in_template, prompt_tokens
from edgeforge.llm.prefix import prefix_of
from edgeforge.llm.quantize import encoded, first_logits, quantize_language, read_texts
from edgeforge.llm.session import Session, opened
from edgeforge.llm.steps import BLOCKED, pieces, positions_and_masks, where_it_matters
from edgeforge.llm.windows import window_graph
from edgeforge.models import load_model
from edgeforge.pipeline import export, read_recipe
from edgeforge.sim.evaluate import run_float, simulate
from edgeforge.target import load_target
from edgeforge.validate import validate

TARGET = "snapdragon-8-gen-3"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} w5{% endif %}"
)
SHAPE = ("language.context=24", "language.chunk=8", "calibration.samples=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder: a random two-layer Llama over 96 words."""
    from safetensors.torch import save_file

    place, vocab, width, kv = tmp_path_factory.mktemp("hf") / "small", 96, 64, 32
    place.mkdir()
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    (place / "chat_template.jinja").write_text(TEMPLATE)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "[": 3, "]": 4, "user": 94, **{f"w{i}": i for i in range(5, 94)}}
    special = [
        {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for word, i in (("<s>", 1), ("</s>", 2))
    ]  # fmt: skip
    model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": words}
    tokenizer = {"version": "1.0", "added_tokens": special, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(3)
    shapes = {"embed_tokens": (vocab, width), "norm": (width,)}
    for i in range(2):
        parts = {"q_proj": width, "k_proj": kv, "v_proj": kv}
        shapes |= {f"layers.{i}.self_attn.{part}": (rows, width) for part, rows in parts.items()}
        shapes |= {f"layers.{i}.self_attn.o_proj": (width, width), f"layers.{i}.mlp.down_proj": (width, 96)}
        shapes |= {f"layers.{i}.mlp.{part}": (96, width) for part in ("gate_proj", "up_proj")}
        shapes |= {f"layers.{i}.{part}": (width,) for part in ("input_layernorm", "post_attention_layernorm")}
    tensors = {
        f"model.{name}.weight": torch.randn(shape) * 0.2 + (1 if len(shape) == 1 else 0)
        for name, shape in shapes.items()
    }
    tensors["lm_head.weight"] = torch.randn(vocab, width) * 0.3
    save_file(tensors, place / "model.safetensors")
    rng = np.random.default_rng(0)
    text = "\n".join(" ".join(f"w{i}" for i in rng.integers(5, 94, 22)) for _ in range(9))
    (place / "calibration.txt").write_text(text)
    return place


@pytest.fixture(scope="module", params=["w8a8", "w4a16-b32"])
def bundle(request, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("llm") / request.param
    return export(str(folder), TARGET, out, "embedded", request.param, ("simulator", "onnx_qdq"), assignments=SHAPE)


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("llm") / "small"
    names = ("simulator", "onnx_qdq", "executorch_xnnpack")
    return export(str(folder), TARGET, out, "embedded", "w8a8", names, assignments=SHAPE)


def simulated(bundle, batch: int = 1) -> Session:
    graphs = {part.part: part.graph for part in bundle.parts}
    steps = {name: lambda feeds, graph=graph: simulate(graph, feeds) for name, graph in graphs.items()}
    return Session(graphs, steps, bundle.manifest.language.windows, prefix_of(bundle), batch)


# ----------------------------------------------------------------------------------------- the graphs


def test_prefill_and_decode_have_the_same_encodings_and_constants(bundle):
    prefill, decode = (part.graph for part in bundle.parts)
    for node in decode.nodes:
        assert decode.type(node.output).q == prefill.type(node.output).q, node.output
    for value in decode.constants():
        np.testing.assert_array_equal(value.data, prefill.values[value.name].data)


def test_the_cache_is_uint8_around_128_and_tied(bundle):
    graph = bundle.graph
    for layer in range(2):
        for part in ("keys", "values"):
            past, new = graph.type(f"past_{part}.{layer}"), graph.type(f"{part}.{layer}")
            assert past.dtype == new.dtype == "u8" and past.q == new.q and past.q.zero == 128
    assert graph.type("keys.0").shape == (1, 2, 16, 1) and graph.type("past_keys.0").shape == (1, 2, 16, 23)


def test_the_mask_blocks_by_saturation(bundle):
    """A blocked score gets the lowest code, whatever it was; the others keep the range that they need."""
    graph = bundle.graph
    for node in graph.nodes:
        if "mask.0" in node.inputs:
            scores, total = graph.type(node.inputs[0]).q, graph.type(node.output).q
            highest, lowest = (65535 - scores.zero) * scores.scale, -total.zero * total.scale
            mask = graph.type("mask.0").q
            assert highest - mask.zero * mask.scale <= lowest + total.scale
            assert total.scale < scores.scale + 16 / 65000


def test_chunks_and_single_tokens_give_the_same_integers(bundle):
    ids = [1, *range(20, 40)]
    whole, single = simulated(bundle), simulated(bundle)
    wanted = whole.feed(ids)
    for token in ids:
        got = single.feed([token])
    np.testing.assert_array_equal(got, wanted)
    for name, codes in whole.cache.items():
        np.testing.assert_array_equal(codes, single.cache[name])


def test_weights_are_stored_once(bundle):
    from edgeforge.bundle import load_arrays

    stored = load_arrays(bundle.path / "graph.safetensors")
    named = [name for name in stored if "q_proj.weight" in name and "|" not in name]
    assert len(named) == 2


def test_the_recipe_keeps_head_and_residual_stream_wide(bundle):
    graph = bundle.graph
    head = graph.producers()["logits"]
    assert graph.type(head.inputs[1]).dtype == "i8" and graph.type("logits").dtype == "u16"
    assert {graph.type(n.output).dtype for n in graph.nodes if n.op == "add" and n.source.count(".") == 1} == {"u16"}


def test_perplexity_of_float_fake_quantized_and_integer_agree(bundle, folder):
    text = text_of(bundle, 0)
    data = windows([(folder / "calibration.txt").read_text()], text, None, 4)
    language = load_model(str(folder)).language
    wanted = perplexity(float_scorer(language, 24), data)
    bound = 0.25 if "w4" in bundle.manifest.precision else 0.08
    for fake in (True, False):
        assert abs(perplexity(simulator_scorer(bundle, fake), data) / wanted - 1) < bound
    few = windows([(folder / "calibration.txt").read_text()], text, None, 1)
    wanted = perplexity(simulator_scorer(bundle), few)
    assert perplexity(artifact_scorer(simulated(bundle)), few) == pytest.approx(wanted, rel=1e-12)
    with scoring(bundle, "simulator") as session:
        assert session.graphs["prefill"].type("logits").shape == (1, 8, 96)
        assert perplexity(artifact_scorer(session), few) == pytest.approx(wanted, rel=1e-12)


def test_onnx_runtime_takes_both_graphs(bundle):
    for result in validate(bundle, only=("onnx_qdq",)):
        assert result.ran and result.part in ("prefill", "decode") and result.identical > 0.8 and result.max_lsb <= 4


# ---------------------------------------------------------------------------------------------- masks


def test_masks_let_through_what_comes_before_and_nothing_else():
    positions, full, sliding = positions_and_masks([3], chunk=4, count=2, past=6, windows=(None, 3))
    np.testing.assert_array_equal(positions, [[1, 2, 3, 4]])
    seen = full[0, 0] == 0
    #            cache rows 0..5      padding  tokens 3, 4
    assert seen[2].tolist() == [True, True, True, False, False, False, False, False, True, False]
    assert seen[3].tolist() == [True, True, True, False, False, False, False, False, True, True]
    assert (sliding[0, 0, 3] == 0).tolist() == [False, False, True, False, False, False, False, False, True, True]
    assert full.min() == BLOCKED and (seen[:2].sum(1) >= 1).all()


@pytest.mark.parametrize(
    ("count", "start", "wanted"),
    [(1, 0, [1]), (8, 0, [8]), (11, 0, [3, 8]), (17, 0, [1, 8, 8]), (5, 17, [1] * 5), (5, 16, [5]), (7, 17, [1] * 7)],
)
def test_steps_cover_the_prompt_with_the_partial_chunk_first(count, start, wanted):
    assert pieces(count, start, chunk=8, context=24) == wanted


# ----------------------------------------------------------------------------------------------- text


def test_a_bundle_holds_a_golden_generation_that_it_reproduces(bundle):
    record = bundle.manifest.language
    assert record.bos == 1 and record.stop == (2,) and record.chunk == 8 and record.context == 24
    session, tokens, made = simulated(bundle), list(record.prompt), []
    for _ in record.greedy:
        tokens = [int(session.feed(tokens).argmax())]
        made += tokens
    assert tuple(made) == record.greedy and len(made) == 16


@pytest.mark.parametrize("name", ["simulator", "onnx_qdq", "executorch_xnnpack"])
def test_every_backend_continues_a_prompt(small, name):
    ids = prompt_tokens(small, "w9 w8 w7")
    assert ids[0] == 1
    with opened(small, name) as session:
        found = list(continued(small, session, ids, 6))
    assert len(found) == 6 and all(text.strip().startswith(("w", "[", "]", "u", "<")) for _, text in found)


def test_a_full_context_ends_the_text_and_a_longer_prompt_is_refused(small):
    with opened(small, "simulator") as session:
        assert len(list(continued(small, session, prompt_tokens(small, "w9 " * 20), 50))) <= 4
        session.restart()
        with pytest.raises(InvalidInput, match="do not fit the context of 24"):
            next(continued(small, session, prompt_tokens(small, "w9 " * 30), 1))


def test_sampling_is_repeatable_and_follows_the_probabilities():
    logits = np.log(np.array([0.6, 0.3, 0.08, 0.02]))
    rng = np.random.default_rng(0)
    drawn = np.bincount([choose(logits, Sampling(1.0), rng) for _ in range(2000)], minlength=4) / 2000
    np.testing.assert_allclose(drawn, [0.6, 0.3, 0.08, 0.02], atol=0.03)
    assert {choose(logits, Sampling(1.0, 0.7), rng) for _ in range(200)} == {0, 1}
    assert choose(logits, Sampling(), rng) == 0
    with pytest.raises(InvalidInput, match="0 < top_p <= 1"):
        Sampling(1.0, 0.0)


def test_a_chat_template_wraps_the_prompt_and_may_refuse(small):
    assert prompt_tokens(small, "w9 w8", chat=True) == [1, 3, 94, 4, 9, 8, 5]
    with pytest.raises(InvalidInput, match="chat template: no system here"):
        in_template("{{ raise_exception('no system here') }}", "hi", None, None, ())


def test_questions_are_answered_by_likelihood(small, tmp_path):
    file = tmp_path / "q.jsonl"
    lines = [
        {"goal": "w9 w8", "sol1": "w7 w6", "sol2": "w5", "label": 1},
        {"question": "w9", "choices": ["w5", "w6", "w7"], "answer": 2},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    questions = read_questions(file, None)
    best = {1: 5, 2: 7}

    def score(ids: np.ndarray) -> np.ndarray:
        return np.where(np.isin(ids[:, 1:], list(best.values())), -0.1, -5.0)

    assert multiple_choice(score, questions[:1], text_of(small, 0))["accuracy"] == 1
    file.write_text(json.dumps({"goal": "x", "sol1": "y"}))
    with pytest.raises(InvalidInput, match="item 1: 'sol2' is missing"):
        read_questions(file, None)


def test_windows_score_every_token_once_with_the_longest_past(small):
    text = text_of(small, 0)
    words = " ".join(f"w{5 + i}" for i in range(50))
    for stride in (None, 10, 1):
        assert windows([words], text, stride, None).tokens == 50
    with pytest.raises(InvalidInput, match=r"stride 24 is not in 1\.\.23"):
        windows([words], text, 24, None)


# --------------------------------------------------------------------------------------- command line


def command(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["edgeforge", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    out, err = capsys.readouterr()
    return done.value.code or 0, out, err


def test_generate_and_eval_print_one_json_document(small, folder, monkeypatch, capsys):
    place = str(small.path)
    code, out, _ = command(monkeypatch, capsys, "generate", place, "--prompt", "w9 w8", "--max-tokens", "3", "--json")
    found = json.loads(out)
    assert code == 0 and len(found["tokens"]) == 3 and found["source"].startswith("simulated")
    assert found["prefill_ms"] > 0 and found["decode_tokens_per_second"] > 0
    words = ["eval", place, "--text", str(folder / "calibration.txt"), "--limit", "2", "--model", str(folder), "--json"]
    code, out, _ = command(monkeypatch, capsys, *words, "--backend", "onnx_qdq")
    found = json.loads(out)
    assert code == 0 and [r["engine"] for r in found["results"]] == ["float", "fake-quant", "simulator", "onnx_qdq"]
    assert "context 24" in found["protocol"] and all(r["perplexity"] > 1 for r in found["results"])


def test_what_cannot_be_done_is_said(small, folder, tmp_path, monkeypatch, capsys):
    out = ("export", str(folder), "--target", TARGET, "--calibration", "random", "--out", str(tmp_path / "x"))
    refused = {
        "no artifact of ort_qnn": ("generate", str(small.path), "--prompt", "w9", "--backend", "ort_qnn"),
        "--task perplexity --text FILE": ("eval", str(small.path), "--task", "mmlu"),
        "eval --text FILE": ("validate", str(small.path), "--data", str(folder / "calibration.txt")),
        "language.chunk 24 is not below": (*out, "--set", "language.context=24", "--set", "language.chunk=24"),
        "context 65 is not in 2..64": (*out, "--set", "language.context=65"),
    }
    for message, words in refused.items():
        code, _, err = command(monkeypatch, capsys, *words)
        assert code == 2 and message in err and "Traceback" not in err, err
    assert not (tmp_path / "x").exists()


def test_a_text_too_short_for_a_prefill_step_is_refused(folder, tmp_path):
    (tmp_path / "short.txt").write_text("w9 w8")
    with pytest.raises(InvalidInput, match="no text of 8 tokens"):
        export(str(folder), TARGET, tmp_path / "x", str(tmp_path / "short.txt"), assignments=SHAPE)


def test_the_readme_of_a_bundle_names_files_that_exist(small):
    text = (small.path / "README.txt").read_text()
    for name in ("onnx_qdq/decode/model.onnx", "executorch_xnnpack/model.pte"):
        assert f"artifacts/{name}" in text and (small.path / "artifacts" / name).is_file()


def test_a_flipped_byte_in_the_prefill_graph_is_found(small, tmp_path):
    copy = shutil.copytree(small.path, tmp_path / "b")
    text = (copy / "prefill.txt").read_text()
    (copy / "prefill.txt").write_text(text.replace('"start": 8', '"start": 9', 1))
    with pytest.raises(InvalidInput, match=r"prefill\.txt is not the file"):
        load_bundle(copy)


# -------------------------------------------------------------------------------- parts by themselves


def test_padding_the_mlp_keeps_the_function():
    config = DecoderConfig("t", 11, 8, 6, 1, 2, 1, 4, 1e-5, 16, (Rope((1.0, 0.1)),), (0,), (None,), mlp_bias=True)
    torch.manual_seed(0)
    weights = {name: torch.randn(p.shape) * 0.5 for name, p in Decoder(config, 8).named_parameters()}
    plain = Language("t", config, weights, "")
    wide = plain.padded(16)
    assert wide.config.hidden == 16
    ids = np.array([[1, 2, 3, 4]])
    np.testing.assert_allclose(float_scorer(wide, 8)(ids), float_scorer(plain, 8)(ids), atol=1e-5)


def test_a_child_that_dies_becomes_an_error_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the log stays
    from edgeforge.backends._child import served

    with (
        pytest.raises(BackendFailed, match="stopped with exit code 1; log: "),
        served(
            "probe",
            "edgeforge.backends._qnn_worker",
            {"action": "serve", "model": "none.onnx", "soc": 57, "options": {}},
        ) as step,
    ):
        step({"x": np.zeros(1)})


def test_the_scoring_graph_keeps_every_logit(small):
    prefill = small.parts[0].graph
    graph = all_logits(prefill)
    assert graph.type("logits").shape == (1, 8, 96) and prefill.type("logits").shape == (1, 1, 96)
    session = simulated(small)
    tokens = np.arange(10, 18)[None]
    session.steps = {**session.steps, "prefill": lambda feeds: simulate(graph, feeds)}
    ((_, logits),) = session.walk(tokens)
    np.testing.assert_array_equal(logits[0, -1], simulated(small).feed(tokens[0].tolist()))


needs_qnn = pytest.mark.skipif(bool(backends.backend("executorch_qnn").missing()), reason="needs the vendor's packages")


# ------------------------------------------------------------------------------- weights of both graphs once


def test_xnnpack_has_one_program_that_holds_equal_constants_once(small, tmp_path):
    (file,) = small.manifest.backends["executorch_xnnpack"].files
    chosen, decode = backends.backend("executorch_xnnpack"), small.parts[1]
    chosen.compile(decode.graph, small.target, tmp_path)
    alone = (tmp_path / "model.pte").stat().st_size
    assert (small.path / file).stat().st_size < 1.5 * alone
    feeds = decode.golden_part("input")
    wanted = chosen.run(tmp_path, decode.graph, small.target, feeds)
    for name, codes in chosen.run(decode.artifact(chosen.name), decode.graph, small.target, feeds).items():
        np.testing.assert_array_equal(codes, wanted[name])


@needs_qnn
def test_a_shared_context_is_smaller_and_not_for_the_emulator(small, tmp_path):
    """Should it load one day, it can stand for the two contexts that are built beside it."""
    chosen, graphs = backends.backend("ort_qnn"), {part.part: part.graph for part in small.parts}
    made = backends.compile_parts(chosen, graphs, small.target, tmp_path, shared=True)
    shared = [tmp_path / file for file in made.files if file.startswith("shared/")]
    assert [file.name for file in shared] == ["decode_ctx.onnx", "prefill_ctx.onnx", "prefill_ctx_qnn.bin"]
    apart = sum((tmp_path / part / "model_ctx_qnn.bin").stat().st_size for part in graphs)
    assert shared[2].stat().st_size < 0.8 * apart
    assert all(b"prefill_ctx_qnn.bin" in file.read_bytes() for file in shared[:2])
    (tmp_path / "decode" / "model_ctx.onnx").write_bytes(shared[0].read_bytes())
    (tmp_path / "decode" / "prefill_ctx_qnn.bin").write_bytes(shared[2].read_bytes())
    with pytest.raises(BackendFailed, match="QNN_COMMON_ERROR_NOT_SUPPORTED"):
        chosen.run(tmp_path / "decode", graphs["decode"], small.target, small.golden_part("input"))


def test_a_target_that_shares_no_weights_says_so(folder, tmp_path):
    with pytest.raises(InvalidInput, match=r"shares no weights.*shared_context=false"):
        export(
            str(folder), "snapdragon-8-gen-1", tmp_path / "x", "embedded",
            assignments=(*SHAPE, "language.shared_context=true"),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ 8da4w


@pytest.fixture(scope="module")
def dynamic(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("llm") / "dynamic"
    names = ("simulator", "executorch_xnnpack")
    return export(str(folder), TARGET, out, "embedded", "8da4w-b32", names, assignments=SHAPE)


def test_dynamic_linears_have_4_bits_in_groups_and_the_head_8(dynamic):
    graph = dynamic.graph
    linears = [node for node in graph.nodes if node.op == "linear"]
    assert graph.level == "float" and all(node.attrs["dynamic"] for node in linears)
    kinds = {node.source: graph.type(node.inputs[1]) for node in linears}
    assert kinds["lm_head"].dtype == "i8" and kinds["lm_head"].q.block is None
    del kinds["lm_head"]
    assert {(kind.dtype, kind.q.block) for kind in kinds.values()} == {("i4", 32)}
    for kind in kinds.values():
        assert not (kind.q.scale.view(np.uint32) & 0xFFFF).any()  # bfloat16


def test_xnnpack_computes_dynamic_linears_as_the_simulator_does(dynamic, folder):
    assert dynamic.manifest.backends["executorch_xnnpack"].islands
    for part in dynamic.parts:
        chosen, golden = backends.backend("executorch_xnnpack"), part.golden_part("output")
        got = chosen.run(part.artifact(chosen.name), part.graph, part.target, part.golden_part("input"))
        for name, y in got.items():
            assert np.abs(y - golden[name]).max() < 0.02 * golden[name].std()
    text = text_of(dynamic, 0)
    data = windows([(folder / "calibration.txt").read_text()], text, None, 4)
    wanted = perplexity(float_scorer(load_model(str(folder)).language, 24), data)
    assert abs(perplexity(simulator_scorer(dynamic), data) / wanted - 1) < 0.25


def test_rows_are_rounded_as_torch_does():
    import torch.ao.quantization.fx._decomposed

    from edgeforge.ops.linear import round8

    made = torch.ops.quantized_decomposed
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    x[0], x[1] = x[0].abs(), -x[1].abs()
    scale, zero = made.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = made.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    wanted = made.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)
    off = (round8(torch, x) - wanted).abs() / scale
    assert off.max() < 1.01 and (off > 0.01).float().mean() < 1e-3  # ties: x / scale against x * (1 / scale)


@pytest.mark.parametrize("name", ["onnx_qdq", "ort_qnn", "executorch_qnn"])
def test_other_backends_refuse_dynamic_linears(dynamic, name):
    chosen = backends.backend(name)
    reason = backends.refusals(chosen, [dynamic.graph], dynamic.target)[0]
    assert reason.why == f"{name} takes static encodings only" and "w8a8" in reason.remedy


def test_dynamic_precision_is_for_whole_language_models(run, folder, tmp_path):
    out = ("--target", TARGET, "--calibration", "embedded", "--out", tmp_path / "x")
    with pytest.raises(Failed, match="offered for language models with a cache") as failed:
        run("export", "digits", *out, "--precision", "8da4w-b32")
    assert failed.value.code == 2
    with pytest.raises(Failed, match="onnx_qdq takes static encodings only") as failed:
        shape = [word for entry in SHAPE for word in ("--set", entry)]
        run("export", folder, *out, *shape, "--precision", "8da4w-b32", "--backend", "onnx_qdq")
    assert failed.value.code == 2
    with pytest.raises(Failed, match="is for a whole model, not for a layer") as failed:
        run("export", folder, *out, "--set", "overrides=[{match: lm_head, precision: 8da4w-b32}]")
    assert failed.value.code == 2


# --------------------------------------------------------------------------------------------------- bad input


def _config(place: Path, **changes) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **changes}))


def _weights(place: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors")


def _index(place: Path) -> None:
    from safetensors import safe_open

    with safe_open(place / "model.safetensors", "pt") as stored:
        places = dict.fromkeys(stored.keys(), "model.safetensors")
    places["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "missing shard": (_index, "shard model-00002-of-00002.safetensors is missing"),
    "tensor shape": (lambda p: _weights(p, lambda t: t.update({Q: t[Q][:, 1:].contiguous()})), "is (64, 63)"),
    "NaN": (lambda p: _weights(p, lambda t: t[Q].view(-1)[5].fill_(float("nan"))), f"{Q} holds NaN or infinity"),
    "vocabulary": (lambda p: _config(p, vocab_size=90), "ids up to 94, the embedding has 90 rows"),
    "architecture": (lambda p: _config(p, model_type="mixtral"), "'mixtral' is not covered"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_ends_the_export_with_exit_code_2(what, run, folder, tmp_path):
    damage, message = BAD[what]
    copy = shutil.copytree(folder, tmp_path / "m")
    damage(copy)
    if what == "vocabulary":
        tables = ("model.embed_tokens.weight", "lm_head.weight")
        _weights(copy, lambda t: t.update({name: t[name][:90].contiguous() for name in tables}))
    with pytest.raises(Failed) as failed:
        run("export", copy, "--target", TARGET, "--calibration", "embedded", "--out", tmp_path / "x")
    assert failed.value.code == 2 and message in failed.value.said and "Traceback" not in failed.value.said
    assert not (tmp_path / "x").exists()


def test_a_prompt_longer_than_the_context_ends_with_exit_code_2(run, small):
    with pytest.raises(Failed, match="do not fit the context of 24 -> a shorter prompt") as failed:
        run("generate", small.path, "--prompt", "w9 " * 30)
    assert failed.value.code == 2


@pytest.mark.slow
@needs_qnn
def test_the_hexagon_emulator_runs_both_graphs_from_one_child_each(folder, tmp_path):
    names = ("ort_qnn", "executorch_qnn")
    shape = ("language.context=24", "language.chunk=4", "calibration.samples=8")
    bundle = export(str(folder), TARGET, tmp_path / "q", "embedded", "w8a8", names, assignments=shape)
    ids, texts = prompt_tokens(bundle, "w9 w8 w7 w6 w5 w20 w21 w22 w23 w24"), {}
    for name in names:
        with opened(bundle, name) as session:
            texts[name] = [token for token, _ in continued(bundle, session, ids, 5)]
    assert texts["ort_qnn"] == texts["executorch_qnn"] and len(texts["ort_qnn"]) == 5
    for result in validate(bundle, only=names):
        assert result.ran and result.identical == 1, result


# --------------------------------------------------------------------------------- prefix and compression


METHODS = (
    "language.prefix=true",
    "compress=[{method: rotate}, {method: smooth, samples: 4}]",
    "train={steps: 4, batch: 2, check: 2}",
    "weights=gptq",
)


@pytest.fixture(scope="module")
def compressed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("llm") / "compressed"
    names = ("simulator", "onnx_qdq")
    return export(str(folder), TARGET, out, "embedded", "w8a8", names, assignments=(*SHAPE, *METHODS))


def test_compression_behind_a_prefix_leaves_the_float_logits(folder):
    model = load_model(str(folder), traced=False)
    language, recipe = model.language, read_recipe(model, None, "w8a8", (*SHAPE, *METHODS))
    sequences = [s for s in calibration_tokens(model, recipe, "embedded")[0] if len(s) == 24]
    found = encoded(language, recipe, load_target(TARGET), sequences).found
    assert any(not torch.equal(weight, language.weights[name]) for name, weight in found.language.weights.items())
    graph, data = window_graph(found.language, sequences, found.first)
    ids, masks = (
        torch.tensor(sequences),
        positions_and_masks([0] * len(sequences), 24, 24, 0, (None,)),
    )
    empty = [torch.zeros(len(ids), 2, 16, 0), torch.zeros(len(ids), 2, 0, 16)] * 2
    with torch.no_grad():
        wanted = language.decoder(24)(ids, *map(torch.from_numpy, masks), *empty)[0].numpy()
    got = run_float(graph, data.stacked())["logits"]
    np.testing.assert_allclose(got, wanted[:, 1:], atol=2e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(first_logits(language, 24), wanted[0, 0], atol=1e-4 * np.abs(wanted).max())


def test_every_layer_has_free_scales_between_queries_and_keys(folder):
    """The first layer had none once: its queries were tied to the rotary tables."""
    language = load_model(str(folder), traced=False).language
    graph, _ = window_graph(language, [list(range(1, 25))], ())
    pairs = [group for group in find_channels(graph).groups if any(name.endswith("k_proj") for name in group.down)]
    assert len(pairs) == language.config.layers


def test_weights_chosen_layer_by_layer_reach_both_graphs(folder):
    """In a decoder whose layers have no bias."""
    model, target = load_model(str(folder), traced=False), load_target(TARGET)
    sequences, _ = calibration_tokens(model, read_recipe(model, None, "w4a8", SHAPE), "embedded")
    found = []
    for lines in ((), ("weights=gptaq",)):
        recipe = read_recipe(model, None, "w4a8", (*SHAPE, *lines))
        parts = quantize_language(model.language, recipe, target, sequences).parts
        prefill, decode = (parts[name].graph for name in ("prefill", "decode"))
        (name,) = (n.inputs[1] for n in decode.nodes if n.op == "linear" and n.source.endswith("0.mlp.down_proj"))
        assert prefill.values[name].data is decode.values[name].data
        found.append(decode.values[name])
    plain, chosen = found
    assert chosen.type.dtype == plain.type.dtype == "i4" and not np.array_equal(chosen.data, plain.data)
    assert not np.array_equal(chosen.type.q.scale, plain.type.q.scale)


def test_a_prefix_is_never_computed_and_every_text_continues_it(compressed, folder):
    record, prefix = compressed.manifest.language, prefix_of(compressed)
    assert record.prefix in compressed.manifest.sha256 and prefix.token == record.bos
    assert [int(part.golden["input/positions"].min()) for part in compressed.parts] == [1, 1]
    session = simulated(compressed)
    assert session.start == 1
    assert np.array_equal(session.feed([record.bos]), prefix.arrays["logits"][0, 0]) and session.start == 1
    whole = session.feed([7, 8, 9])
    session.restart()
    assert np.array_equal(session.feed([record.bos, 7, 8, 9]), whole)
    session.restart()
    assert np.array_equal(session.feed([7, 8, 9]), whole) and session.start == 4
    data = windows(read_texts(folder / "calibration.txt"), text_of(compressed, 0), None, 4)
    language = load_model(str(folder), traced=False).language
    exact, codes = (perplexity(s, data) for s in (float_scorer(language, 24), simulator_scorer(compressed)))
    assert abs(codes / exact - 1) < 0.03
    assert perplexity(simulator_scorer(compressed, fake=True), data) == pytest.approx(codes, rel=0.03)


def test_a_backend_starts_from_the_prefix(compressed):
    ids = prompt_tokens(compressed, "w9 w8 w7")
    found = {}
    for name in ("simulator", "onnx_qdq"):
        with opened(compressed, name) as session:
            found[name] = [token for token, _ in continued(compressed, session, ids, 4)]
            assert session.prefix is not None and session.start == len(ids) + 3
    assert len(found["simulator"]) == len(found["onnx_qdq"]) == 4
    report = validate(compressed, only=("onnx_qdq",))
    assert report and all(result.cosine is None or result.cosine > 0.98 for result in report)


def test_dynamic_linears_begin_behind_the_prefix_too(folder, tmp_path):
    shape = (*SHAPE, "language.prefix=true")
    bundle = export(str(folder), TARGET, tmp_path / "x", "embedded", "8da4w-b32", ("simulator",), assignments=shape)
    ids = [1, 9, 8, 7, 6]
    language = load_model(str(folder), traced=False).language
    plain = export(str(folder), TARGET, tmp_path / "y", "embedded", "8da4w-b32", ("simulator",), assignments=SHAPE)
    assert prefix_of(plain) is None and language.bos == 1
    near = [simulated(b).feed(ids) for b in (bundle, plain)]
    assert np.corrcoef(*near)[0, 1] > 0.97


def test_gates_keep_no_codes_for_what_silu_takes_to_nothing():
    graph = block()
    ranges = {node.output: (-40.0, 5.0) for node in graph.nodes} | {name: (-40.0, 5.0) for name in graph.inputs}
    (silu,) = (node for node in graph.nodes if node.op == "silu")
    bits = dict.fromkeys(ranges, 8)
    cut = where_it_matters(graph, ranges, bits)
    low, high = cut.pop(silu.inputs[0])
    assert high == 5 and -8 < low < -2 and abs(low / (1 + np.exp(-low))) >= 45 / 510 * 0.9
    assert cut == {name: limits for name, limits in ranges.items() if name != silu.inputs[0]}
    assert where_it_matters(graph, ranges, dict.fromkeys(ranges, 16)) == ranges
