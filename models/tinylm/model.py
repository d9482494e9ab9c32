"""The embedded language model: a small Llama in plain torch, for a fixed window of 64 tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WINDOW = 64


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        width = c["hidden_size"]
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q [B, heads, T, size]; k, v [B, kv_heads, T, size]. The query heads of one k/v head lie together, so they
        multiply it as one taller matrix and nothing is repeated."""
        b, h, t, d = q.shape
        scores = q.reshape(b, self.kv_heads, -1, d) @ k.transpose(2, 3) * d**-0.5
        weights = torch.softmax(scores.reshape(b, h, t, t) + mask, -1)
        return (weights.reshape(b, self.kv_heads, -1, t) @ v).reshape(b, h, t, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        out = self.attend(rope(q, cos, sin), rope(k, cos, sin), v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, self.heads * self.size))


class MLP(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(self, c: dict[str, Any], window: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        half, base = c["head_dim"] // 2, c["rope_parameters"]["rope_theta"]
        angle = torch.arange(window)[:, None] * base ** (-torch.arange(half) / half)
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1)[None, None], persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1)[None, None], persistent=False)
        mask = torch.full((window, window), -1e4).triu(1)
        self.register_buffer("mask", mask[None, None], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin, mask, t = self.cos, self.sin, self.mask, ids.shape[1]
        if t != mask.shape[-1]:
            cos, sin, mask = cos[:, :, :t], sin[:, :, :t], mask[:, :, :t, :t]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


class TinyLM(nn.Module):
    """Token ids int64 [B, T], T up to ``window``, to logits [B, T, V]."""

    def __init__(self, config: dict[str, Any], window: int = WINDOW) -> None:
        super().__init__()
        self.model = Backbone(config, window)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the two halves of the last axis against each other; ``sin`` carries the sign of the first half."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin


def load() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The trained model, float32 in eval mode, and example ids [1, 64]."""
    from safetensors.torch import load_file

    model = TinyLM(json.loads((HERE / "config.json").read_text("utf-8")))
    state = {name: value.float() for name, value in load_file(HERE / "model.safetensors").items()}
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model.eval(), (torch.arange(WINDOW)[None],)


def calibration() -> Path:
    """Text sampled from this model, for calibration."""
    return HERE / "calibration.txt"


def heldout() -> Path:
    """Text sampled from this model with another seed, for evaluation."""
    return HERE / "heldout.txt"
