"""llama2.c checkpoints (version 0 ``.bin`` with its ``tokenizer.bin`` beside it) -> `Language`.

Layout (karpathy/llama2.c, export.py): seven int32 (width, hidden, layers, heads, kv_heads, vocab, context; a negative
vocab means a head of its own), then float32: embedding, and each stacked over layers: attention gains, q, k, v, o, MLP
gains, gate, down, up; then the last gain, two rotary tables, and the head. Rotary pairs are neighbors."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeforge.errors import InvalidInput
from edgeforge.frontend.decoder import DecoderConfig, Rope
from edgeforge.frontend.language import Language, folded

#: Ids of the vocabulary's first pieces.
UNKNOWN, BOS, EOS, BYTES = 0, 1, 2, range(3, 259)


def from_bin(path: Path) -> Language:
    """The model in ``path`` with the tokenizer beside it: ``tok*.bin``. Raises InvalidInput."""
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size >= 28 else np.zeros(0, np.uint8)
    header = struct.unpack("<7i", data[:28].tobytes()) if data.size else (0,) * 7
    width, hidden, layers, heads, kv_heads, vocab, context = header
    if min(width, hidden, layers, heads, kv_heads, abs(vocab), context) < 1 or width % heads or max(header) > 2**20:
        raise InvalidInput(f"{path.name} is no llama2.c checkpoint (header {header}) -> a version 0 .bin")
    size = width // heads
    rope = Rope(tuple(10000.0 ** (-2 * j / size) for j in range(size // 2)))
    config = DecoderConfig(
        "llama2.c", abs(vocab), width, hidden, layers, heads, kv_heads, size, 1e-5, context,
        (rope,), (0,) * layers, (None,) * layers, tied=vocab > 0, bos=BOS, stop=(BOS, EOS),
    )  # fmt: skip
    weights = folded(config, _weights(path, data[28:].view(np.float32), config), size, adjacent=True)
    return Language(path.stem, config, weights, _tokenizer(path, config.vocab))


def _weights(path: Path, data: np.ndarray, c: DecoderConfig) -> dict[str, Tensor]:
    q, kv, n = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.layers
    layout: dict[str, tuple[int, ...]] = {
        "embed_tokens": (c.vocab, c.width),
        "attention_norm": (n, c.width),
        "self_attn.q_proj": (n, q, c.width),
        "self_attn.k_proj": (n, kv, c.width),
        "self_attn.v_proj": (n, kv, c.width),
        "self_attn.o_proj": (n, c.width, q),
        "mlp_norm": (n, c.width),
        "mlp.gate_proj": (n, c.hidden, c.width),
        "mlp.down_proj": (n, c.width, c.hidden),
        "mlp.up_proj": (n, c.hidden, c.width),
        "norm": (c.width,),
        "": (2, c.context, c.head_dim // 2),
        "lm_head": (0 if c.tied else c.vocab, c.width),
    }
    if (wanted := sum(map(math.prod, layout.values()))) != data.size:
        raise InvalidInput(f"{path.name} holds {data.size} numbers, its header makes them {wanted} -> fetch it again")
    if not np.isfinite(data).all():
        raise InvalidInput(f"{path.name} holds NaN or infinity -> repair the checkpoint")
    made, at = {}, 0
    for name, shape in layout.items():
        part = torch.from_numpy(data[at : at + math.prod(shape)].reshape(shape).copy())
        at += math.prod(shape)
        if name in ("embed_tokens", "norm", "lm_head"):
            made[f"{name}.weight"] = part
        elif name:
            made |= {f"layers.{i}.{name}.weight": part[i] for i in range(n)}
    return {name: part for name, part in made.items() if part.numel()}


def _tokenizer(path: Path, vocab: int) -> str:
    """tokenizer.json of the pieces and scores beside ``path``: merging the pair with the best score is BPE whose merges
    are ordered by score."""
    files = sorted(path.parent.glob("tok*.bin"))
    if not files:
        raise InvalidInput(f"{path.parent}: no tokenizer (tok*.bin) beside {path.name}")
    raw, at = files[0].read_bytes(), 4
    pieces: list[str] = []
    scores: dict[str, float] = {}
    try:
        while at < len(raw):
            score, length = struct.unpack_from("<fi", raw, at)
            text = raw[at + 8 : at + 8 + length].decode("utf-8")
            number = len(pieces)
            pieces.append({UNKNOWN: "<unk>", BOS: "<s>", EOS: "</s>"}.get(number, text))
            if number in BYTES:
                pieces[-1] = f"<0x{number - BYTES.start:02X}>"
            elif number > BYTES.stop - 1:
                scores[text] = score
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise InvalidInput(f"{files[0].name} is no llama2.c tokenizer: {error}") from None
    if len(pieces) != vocab:
        raise InvalidInput(f"{files[0].name} has {len(pieces)} pieces, the embedding of {path.name} has {vocab} rows")
    merges = [(text[:i], text[i:]) for text in sorted(scores, key=lambda t: -scores[t]) for i in range(1, len(text))]
    merges = [pair for pair in merges if pair[0] in scores and pair[1] in scores]
    model: dict[str, Any] = {
        "type": "BPE",
        "unk_token": "<unk>",
        "byte_fallback": True,
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": merges,
    }
    special = [
        {"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i in (UNKNOWN, BOS, EOS)
    ]  # fmt: skip
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": special,
            "normalizer": {"type": "Prepend", "prepend": " "},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": model,
        }
    )
