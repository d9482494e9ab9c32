"""config.json -> `DecoderConfig`: what each family of language models means by its keys, and what is not covered."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from edgeforge.errors import InvalidInput
from edgeforge.frontend.decoder import DecoderConfig, Rope

Raw = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "none",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
}


def decoder_config(raw: Raw) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises InvalidInput naming the family, and what of it is missing here."""
    family = str(raw.get("model_type", ""))
    if family == "gemma3" and "text_config" in raw:
        raw, family = {**raw["text_config"], **{k: raw[k] for k in ("eos_token_id",) if k in raw}}, "gemma3_text"
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, 2)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise InvalidInput(
            f"model_type {family or 'none'!r} is not covered -> one of {', '.join(FAMILIES)}{hint}, or add its keys to "
            "edgeforge/frontend/families.py"
        )
    try:
        return _config(raw, family)
    except KeyError as error:
        raise InvalidInput(f"config.json of {family}: {error} is missing") from None


def _config(raw: Raw, family: str) -> DecoderConfig:
    heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or raw["hidden_size"] // heads)
    layers, activation = int(raw["num_hidden_layers"]), raw.get("hidden_activation") or raw.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise InvalidInput(f"{family}: activation {activation!r} is not covered -> one of {', '.join(ACTIVATIONS)}")
    windows = _windows(raw, family, layers)
    tables, ropes = _ropes(raw, family, head_dim, windows)
    stop = raw.get("eos_token_id")
    plain: dict[str, Any] = {
        "vocab": int(raw["vocab_size"]),
        "width": int(raw["hidden_size"]),
        "hidden": int(raw["intermediate_size"]),
        "layers": layers,
        "heads": heads,
        "kv_heads": int(raw.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "eps": float(raw.get("rms_norm_eps", 1e-6)),
        "context": int(raw["max_position_embeddings"]),
        "activation": ACTIVATIONS[activation],
        "qkv_bias": bool(raw.get("attention_bias", False)),
        "output_bias": bool(raw.get("attention_bias", False)),
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "tied": bool(raw.get("tie_word_embeddings", False)),
        "bos": raw.get("bos_token_id"),
        "stop": tuple(stop) if isinstance(stop, list) else () if stop is None else (int(stop),),
    }
    return DecoderConfig(family, tables=tables, ropes=ropes, windows=windows, **{**plain, **FAMILIES[family](raw)})


# ------------------------------------------------------------------------------------- what the families do differently


def _llama(raw: Raw) -> dict[str, Any]:
    return {}


def _qwen2(raw: Raw) -> dict[str, Any]:
    return {"qkv_bias": True, "output_bias": False}


def _qwen3(raw: Raw) -> dict[str, Any]:
    return {"qk_norm": True}


def _gemma(raw: Raw) -> dict[str, Any]:
    # The default of every Gemma is to tie; its config.json leaves the key out.
    return {
        "gain_offset": 1.0,
        "embedding_scale": math.sqrt(raw["hidden_size"]),
        "activation": ACTIVATIONS[raw.get("hidden_activation") or "gelu_pytorch_tanh"],
        "tied": bool(raw.get("tie_word_embeddings", True)),
    }


def _gemma2(raw: Raw) -> dict[str, Any]:
    return {
        **_gemma(raw),
        "output_norms": True,
        "attention_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": raw.get("attn_logit_softcapping"),
        "logit_softcap": raw.get("final_logit_softcapping"),
    }


def _gemma3(raw: Raw) -> dict[str, Any]:
    if raw.get("use_bidirectional_attention"):
        raise InvalidInput("gemma3: bidirectional attention is not covered -> a causal checkpoint")
    return {**_gemma2(raw), "qk_norm": True}


def _stablelm(raw: Raw) -> dict[str, Any]:
    for key in ("qk_layernorm", "use_parallel_residual"):
        if raw.get(key):
            raise InvalidInput(f"stablelm with {key} is not covered -> a checkpoint without it (StableLM 2 1.6B)")
    return {
        "layer_norm": True,
        "eps": float(raw.get("layer_norm_eps", 1e-5)),
        "qkv_bias": bool(raw.get("use_qkv_bias", False)),
        "output_bias": False,
    }


#: model_type -> what its config says beyond Llama's keys.
FAMILIES: dict[str, Callable[[Raw], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _llama,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _llama,
    "stablelm": _stablelm,
}


def _windows(raw: Raw, family: str, layers: int) -> tuple[int | None, ...]:
    """Per layer the attention window; transformers' defaults where ``layer_types`` is absent."""
    window, kinds = raw.get("sliding_window"), raw.get("layer_types")
    if window is None or (family in ("qwen2", "qwen3", "smollm3") and not raw.get("use_sliding_window", False)):
        return (None,) * layers
    if kinds is None:
        first, every = int(raw.get("max_window_layers", 28)), int(raw.get("sliding_window_pattern", 6))
        local: dict[str, Callable[[int], bool]] = {
            "mistral": lambda i: True,
            "phi3": lambda i: True,
            "gemma2": lambda i: i % 2 == 0,
            "gemma3_text": lambda i: (i + 1) % every != 0,
            "smollm3": lambda i: not _rotates(raw, i),
        }
        return tuple(int(window) if local.get(family, lambda i: i >= first)(i) else None for i in range(layers))
    return tuple(int(window) if kinds[i] == "sliding_attention" else None for i in range(layers))


def _rotates(raw: Raw, layer: int) -> bool:
    """Whether a layer has a rotary embedding; SmolLM3 leaves it out of every fourth."""
    if (listed := raw.get("no_rope_layers")) is not None:
        return bool(listed[layer])
    return raw.get("model_type") != "smollm3" or (layer + 1) % int(raw.get("no_rope_layer_interval", 4)) != 0


def _ropes(
    raw: Raw, family: str, head_dim: int, windows: tuple[int | None, ...]
) -> tuple[tuple[Rope, ...], tuple[int | None, ...]]:
    """The distinct rotary embeddings, and each layer's; configs of transformers 4 and 5."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    partial = {"stablelm": 0.25}.get(family, 1.0)
    plain = {
        "rope_theta": raw.get("rope_theta", 1e6 if family == "gemma3_text" else 1e4),
        "partial_rotary_factor": raw.get("partial_rotary_factor", partial),
    }
    if family == "gemma3_text":
        everywhere = given.get("full_attention", given if "sliding_attention" not in given else {})
        local = given.get("sliding_attention", {"rope_theta": raw.get("rope_local_base_freq", 1e4)})
        pair = tuple(_rope(raw, {**plain, **part}, head_dim) for part in (everywhere, local))
        tables = tuple(dict.fromkeys(pair))
        return tables, tuple(tables.index(pair[0 if window is None else 1]) for window in windows)
    table = _rope(raw, {**plain, **{k: v for k, v in given.items() if v is not None}}, head_dim)
    return (table,), tuple(0 if _rotates(raw, i) else None for i in range(len(windows)))


def _rope(raw: Raw, given: Raw, head_dim: int) -> Rope:
    """Inverse frequencies as in transformers' modeling_rope_utils: default, linear, llama3, longrope."""
    kind = given.get("rope_type") or given.get("type") or "default"
    size = int(head_dim * given["partial_rotary_factor"])
    inverse = [given["rope_theta"] ** (-2 * j / size) for j in range(size // 2)]
    if kind == "default":
        return Rope(tuple(inverse))
    if kind == "linear":
        return Rope(tuple(f / given["factor"] for f in inverse))
    if kind == "llama3":
        return Rope(tuple(_llama3(f, given) for f in inverse))
    if kind in ("longrope", "su"):
        return _longrope(raw, given, inverse)
    raise InvalidInput(f"rotary embedding {kind!r} is not covered -> default, linear, llama3 or longrope")


def _llama3(frequency: float, given: Raw) -> float:
    """Long waves are stretched by ``factor``, short ones stay, those between are blended."""
    original, factor = given["original_max_position_embeddings"], given["factor"]
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = original * frequency / (2 * math.pi)
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _longrope(raw: Raw, given: Raw, inverse: list[float]) -> Rope:
    """The factors for contexts up to the original one; beyond, transformers takes others, depending on the prompt."""
    longest = raw["max_position_embeddings"]
    original = given.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or longest
    ratio = given.get("factor") or longest / original
    factor = given.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    stretched = tuple(f / stretch for f, stretch in zip(inverse, given["short_factor"], strict=True))
    return Rope(stretched, factor, int(original))
