"""A language model of Llama-3.2-1B's shape with random weights, as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

SHAPE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def write_model(folder: Path, layers: int) -> int:
    """A Hugging Face folder with random bfloat16 weights, one shard per layer; the number of parameters."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    width, hidden, kv = 2048, 8192, 512
    places, count = {}, 0

    def shard(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal count
        made = {
            name: (torch.ones(s) if len(s) == 1 else torch.randn(s) * s[1] ** -0.5).bfloat16()
            for name, s in shapes.items()
        }
        save_file(made, folder / file)
        places.update(dict.fromkeys(shapes, file))
        count += sum(t.numel() for t in made.values())

    torch.manual_seed(0)
    shard("embed.safetensors", {"model.embed_tokens.weight": (128256, width), "model.norm.weight": (width,)})
    for i in range(layers):
        p = f"model.layers.{i}"
        attention = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
        shapes: dict[str, tuple[int, ...]] = {f"{p}.self_attn.{n}_proj.weight": s for n, s in attention.items()}
        shapes |= {f"{p}.mlp.{n}_proj.weight": (hidden, width) for n in ("gate", "up")}
        shapes |= {f"{p}.mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{p}.{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
        shard(f"layer{i}.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    vocab = {"<unk>": 0, **{f"w{i}": i for i in range(1, 1000)}}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return count
