"""Language models from Hugging Face and llama2.c: the decoder computes what transformers computes, or says why not."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeforge.errors import InvalidInput
from edgeforge.frontend.families import decoder_config
from edgeforge.frontend.huggingface import from_folder
from edgeforge.llm.steps import positions_and_masks
from edgeforge.models import load_model
from edgeforge.sim.evaluate import run_float

TINYLM = Path(__file__).parents[1] / "models" / "tinylm"
DATA = Path(os.environ.get("EDGEFORGE_DATA", Path(__file__).parents[2] / "shared" / "data"))
STORIES260K = DATA / "lm_stories260k" / "stories260K.bin"
CONTEXT, VOCAB = 24, 61

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.1],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
#: family -> (transformers' class stem, what its small config says beyond `SMALL`).
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_tied_bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi4_mini": ("Phi3", {"rope_parameters": LONGROPE, "head_dim": 16, "max_position_embeddings": 256}),
    "stablelm": (
        "StableLm",
        {"use_qkv_bias": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ),
}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


def words(count: int = VOCAB) -> str:
    """tokenizer.json with ``count`` words."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, count)}}
    model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab}
    return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model})


def random_model(stem: str, extra: dict):
    """A transformers model with random weights, norm gains off 1 and logits that spread."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{stem}{'Text' if stem == 'Gemma3' else ''}Config")(**{**SMALL, **extra})
    torch.manual_seed(7)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.35 if "norm" in name or p.ndim == 1 else 0.18)
            if "norm" in name and name.endswith("weight") and "Gemma" not in stem:
                p.add_(1.0)
    return model


def saved(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(words(model.config.vocab_size))
    return folder


def stepwise(language, ids: torch.Tensor, chunk: int, run=None) -> torch.Tensor:
    """Logits of all tokens, ``chunk`` at a time (the first chunk padded on the left), through the cache."""
    decoder, c = language.decoder(CONTEXT), language.config
    past = CONTEXT - chunk
    keys = [torch.zeros(1, c.kv_heads, c.head_dim, CONTEXT) for _ in range(c.layers)]
    values = [torch.zeros(1, c.kv_heads, CONTEXT, c.head_dim) for _ in range(c.layers)]
    start, logits, total = 0, [], ids.shape[1]
    while start < total:
        count = (total - start) % chunk or chunk
        padded = torch.zeros(1, chunk, dtype=torch.int64)
        padded[:, chunk - count :] = ids[:, start : start + count]
        positions, *masks = map(torch.from_numpy, positions_and_masks([start], chunk, count, past, c.masks))
        cache = [t for k, v in zip(keys, values, strict=True) for t in (k[..., :past], v[:, :, :past])]
        y, *new = (run or decoder)(padded, positions, *masks, *cache)
        for layer in range(c.layers):
            keys[layer][..., start : start + count] = new[2 * layer][..., chunk - count :]
            values[layer][:, :, start : start + count] = new[2 * layer + 1][:, :, chunk - count :]
        logits.append(y[:, chunk - count :])
        start += count
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_in_chunks_and_token_by_token(family, tmp_path):
    model = random_model(*FAMILIES[family])
    language = from_folder(saved(model, tmp_path), "m")
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits
        assert wanted.std() >= 1
        for chunk in (8, 1):
            got = stepwise(language, ids, chunk)
            assert (got - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))
            assert torch.equal(got.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("chunk", [8, 1])
def test_the_graph_computes_what_the_module_computes(family, chunk, tmp_path):
    language = from_folder(saved(random_model(*FAMILIES[family]), tmp_path), "m")
    graph = language.graph("step", chunk, CONTEXT)
    ids = torch.arange(3, 20)[None]

    def run(*tensors):
        feeds = {name: t.numpy() for name, t in zip(graph.inputs, tensors, strict=True)}
        found = run_float(graph, feeds)
        return [torch.from_numpy(found[name]) for name in graph.outputs]

    with torch.no_grad():
        torch.testing.assert_close(
            stepwise(language, ids, chunk, run), stepwise(language, ids, chunk), atol=1e-4, rtol=1e-4
        )


def test_prefill_and_decode_name_the_same_values(tmp_path):
    language = from_folder(saved(random_model(*FAMILIES["gemma2"]), tmp_path), "m")
    prefill, decode = language.graph("prefill", 8, CONTEXT, last_only=True), language.graph("decode", 1, CONTEXT)
    assert {n.output for n in decode.nodes} <= {n.output for n in prefill.nodes}
    assert prefill.type("logits").shape == decode.type("logits").shape == (1, 1, VOCAB)
    assert prefill.inputs == decode.inputs and prefill.outputs == decode.outputs


def test_a_sharded_checkpoint_is_read_and_a_missing_shard_is_named(tmp_path):
    model = random_model(*FAMILIES["qwen2"])
    folder = saved(model, tmp_path, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = from_folder(folder, "m").weights
    torch.testing.assert_close(whole["norm.weight"], model.model.norm.weight.detach())
    shards[1].unlink()
    with pytest.raises(InvalidInput, match=rf"shard {shards[1].name} is missing"):
        from_folder(folder, "m")


def _rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(random_model(*FAMILIES["llama"]), tmp_path_factory.mktemp("llama"))


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "is missing": lambda t: t.pop(Q),
    "is \\(64, 63\\), config.json makes it \\(64, 64\\)": lambda t: t.update({Q: t[Q][:, 1:].contiguous()}),
    "holds NaN or infinity": lambda t: t[Q].view(-1)[5].fill_(float("nan")),
    "has no use for model.layers.1.extra": lambda t: t.update({"model.layers.1.extra": torch.ones(2)}),
    "holds torch.int8": lambda t: t.update({Q: t[Q].to(torch.int8)}),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_tensor(message, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "m")
    _rewrite(folder, DAMAGE[message])
    with pytest.raises(InvalidInput, match=message):
        from_folder(folder, "m")


def test_a_tokenizer_of_another_model_is_refused(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "m")
    (folder / "tokenizer.json").write_text(words(VOCAB + 3))
    with pytest.raises(InvalidInput, match=f"ids up to {VOCAB + 2}, the embedding has {VOCAB} rows"):
        from_folder(folder, "m")


def test_truncated_weights_and_pickles_are_refused(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="cannot be read"):
        from_folder(folder, "m")
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="only pickled weights"):
        from_folder(folder, "m")


def test_what_is_not_covered_is_refused_by_name():
    base = {**SMALL, "model_type": "llama"}
    with pytest.raises(InvalidInput, match="'mixtral' is not covered"):
        decoder_config({**base, "model_type": "mixtral"})
    with pytest.raises(InvalidInput, match="'yarn' is not covered"):
        decoder_config({**base, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    with pytest.raises(InvalidInput, match="use_parallel_residual is not covered"):
        decoder_config({**base, "model_type": "stablelm", "use_parallel_residual": True})
    with pytest.raises(InvalidInput, match="'hidden_size' is missing"):
        decoder_config({k: v for k, v in base.items() if k not in ("hidden_size", "head_dim")})


def test_a_repository_that_cannot_be_fetched_is_said(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match="nobody/nothing cannot be fetched from the hub"):
        load_model("nobody/nothing")


def test_a_longer_context_than_the_model_has_is_refused(llama):
    with pytest.raises(InvalidInput, match=r"context 65 is not in 2\.\.64"):
        from_folder(llama, "m").decoder(65)


def test_the_folder_of_an_embedded_model_is_a_language_model_where_it_has_a_config():
    assert load_model(str(TINYLM), traced=False).language is not None
    assert load_model("tinylm").language is None
    assert load_model(str(TINYLM.parent / "digits")).name == "digits"


def test_the_embedded_model_reads_as_a_hugging_face_folder():
    """The fixed-window module of models/tinylm is the other implementation."""
    from edgeforge.pipeline import load

    ids = np.arange(100, 140)[None]
    window = np.zeros((1, 64), np.int64)
    window[:, :40] = ids
    (wanted,) = run_float(load("tinylm").imported.graph, {"ids": window}).values()
    language = from_folder(TINYLM, "tinylm")
    with torch.no_grad():
        positions, mask = map(torch.from_numpy, positions_and_masks([0], 40, 40, 0, (None,)))
        c = language.config
        past = [torch.zeros(1, c.kv_heads, c.head_dim, 0), torch.zeros(1, c.kv_heads, 0, c.head_dim)] * c.layers
        got = language.decoder(64)(torch.from_numpy(ids), positions, mask, *past)[0]
    np.testing.assert_allclose(got[0].numpy(), wanted[0, :40], atol=2e-4)


needs_260k = pytest.mark.skipif(not STORIES260K.is_file(), reason="real weights are not here")


def independent():
    """The reader of this file format that models/tinylm was trained with."""
    spec = importlib.util.spec_from_file_location("tinylm_train", TINYLM / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_260k
def test_the_llama2c_tokenizer_gives_the_ids_of_its_own_algorithm():
    from tokenizers import Tokenizer

    from edgeforge.frontend.llama2c import from_bin

    train = independent()
    teacher = train.Teacher()
    tokenizer = Tokenizer.from_str(from_bin(STORIES260K).tokenizer)
    for story in [*train.stories(slice(600, 630)), "naïve café, 日本", "a\n\nb"]:
        ids = tokenizer.encode(story, add_special_tokens=False).ids
        assert [1, *ids] == teacher.encode(story)
        assert tokenizer.decode(ids) == story


@needs_260k
def test_the_llama2c_model_writes_its_published_sample():
    """karpathy/llama2.c, doc/stories260K.md: the text at temperature 0."""
    from tokenizers import Tokenizer

    from edgeforge.frontend.llama2c import from_bin

    language = from_bin(STORIES260K)
    ids = torch.tensor([[1]])
    with torch.no_grad():
        while ids.shape[1] < CONTEXT:
            ids = torch.cat([ids, stepwise(language, ids, 1)[:, -1].argmax(-1, keepdim=True)], 1)
    text = Tokenizer.from_str(language.tokenizer).decode(ids[0].tolist())
    sample = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert sample.startswith(text) and len(text) > 60


@needs_260k
def test_a_llama2c_file_that_is_cut_or_alone_is_refused(tmp_path):
    from edgeforge.frontend.llama2c import from_bin

    source = STORIES260K
    (tmp_path / "m.bin").write_bytes(source.read_bytes())
    with pytest.raises(InvalidInput, match="no tokenizer"):
        from_bin(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(source.read_bytes()[:-8])
    with pytest.raises(InvalidInput, match="its header makes them"):
        from_bin(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(b"short")
    with pytest.raises(InvalidInput, match=r"is no llama2\.c checkpoint"):
        from_bin(tmp_path / "m.bin")
