"""Decoder language models: time per token and to the first token, from the dimensions alone.

decode:      weights / bandwidth + KV cache(context) / bandwidth + queries x context + output head + layers * overhead
first chunk: 128 tokens: MACs / rate + KV cache(context) / bandwidth + output head + layers * overhead"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeforge.errors import InvalidInput

CHUNK = 128
#: us per unit of `amounts`: where a fit starts (8 Elite, QAIRT, w4a16).
START = {
    "decode_weights": 16.0, "decode_kv": 25.0, "decode_queries": 10.0, "decode_layer": 100.0, "decode_head": 16.0,
    "chunk_mac": 60.0, "chunk_kv": 50.0, "chunk_layer": 300.0, "chunk_head": 16.0,
}  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """Dimensions of a Llama-like decoder."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    weight_bits: int = 4

    @property
    def body(self) -> int:
        """Weights that every token reads, without embedding and output head."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.hidden)

    @property
    def parameters(self) -> int:
        return self.body + self.width * self.vocab

    @property
    def embedding_bytes(self) -> float:
        """The table of token embeddings at 8 bits; one row is read per token."""
        return float(self.width * self.vocab)

    def token_bytes(self, context: int) -> float:
        """DRAM traffic of one decoded token: every weight and the whole cache."""
        return self.parameters * self.weight_bits / 8 + self.kv_bytes(context)

    def kv_bytes(self, context: int) -> int:
        """uint8 keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context


def read_config(path: Path) -> Decoder:
    """From a Hugging Face ``config.json``. Raises InvalidInput naming what is missing."""
    try:
        raw = json.loads(path.read_text())
        raw = raw.get("text_config", raw)
        heads = int(raw["num_attention_heads"])
        return Decoder(
            int(raw["num_hidden_layers"]),
            int(raw["hidden_size"]),
            int(raw["intermediate_size"]),
            heads,
            int(raw.get("num_key_value_heads") or heads),
            int(raw.get("head_dim") or raw["hidden_size"] // heads),
            int(raw["vocab_size"]),
        )
    except KeyError as error:
        raise InvalidInput(f"{path}: {error} is missing -> the config.json of a Llama-like decoder") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error} -> the config.json of a Llama-like decoder") from None


def amounts(model: Decoder, context: int) -> dict[str, float]:
    """Amounts of the terms of `START`, for one decoded token and one first chunk: MB of weights, cache and head;
    millions of query elements times context; GMACs; layers."""
    kv = model.kv_bytes(context) / 1e6
    heads = model.layers * model.heads
    head = model.width * model.vocab / 1e6
    return {
        "decode_weights": model.body * model.weight_bits / 8 / 1e6,
        "decode_kv": kv,
        "decode_queries": 2 * heads * model.head_dim * context / 1e6,
        "decode_layer": float(model.layers),
        "decode_head": head,
        "chunk_mac": model.body * CHUNK / 1e9,
        "chunk_kv": kv,
        "chunk_layer": float(model.layers),
        "chunk_head": head,
    }


def times_us(model: Decoder, context: int, rates: Mapping[str, float]) -> tuple[float, float]:
    """Microseconds per decoded token at the end of ``context``, and of the first 128-token chunk."""
    priced = {term: amount * rates[term] for term, amount in amounts(model, context).items()}
    decode = sum(us for term, us in priced.items() if term.startswith("decode"))
    return decode, sum(us for term, us in priced.items() if term.startswith("chunk"))


def bounds_ms(model: Decoder, context: int, rates: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of a decoded token by what they are bound by."""
    priced = {term: amount * rates[term] / 1e3 for term, amount in amounts(model, context).items()}
    ddr = priced["decode_weights"] + priced["decode_kv"] + priced["decode_head"]
    return {"compute": priced["decode_queries"], "overhead": priced["decode_layer"], "ddr": ddr}
