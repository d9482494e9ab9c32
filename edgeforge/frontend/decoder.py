"""The decoder that every supported language model becomes: one static step, `chunk` tokens in, their logits out.

Families differ in data only (`DecoderConfig`). What can be folded into weights at load time is (attention scale,
Gemma's 1 + w gains and embedding scale, the order of rotary pairs): the graph has no node for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeforge.errors import InvalidInput


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: angle of position p and pair j is ``p * inverse[j]``; ``inverse`` has at most head_dim / 2
    numbers (fewer: the other pairs are not rotated). ``factor`` multiplies sine and cosine. ``limit``: positions that
    these frequencies are for, or None."""

    inverse: tuple[float, ...]
    factor: float = 1.0
    limit: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's dimensions and its family's choices. ropes: per layer an index into ``tables``, or None; windows: per
    layer how many positions it sees, or None for all. Softcaps: ``cap * tanh(x / cap)``. stop: ids that end a text."""

    family: str
    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    context: int
    tables: tuple[Rope, ...]
    ropes: tuple[int | None, ...]
    windows: tuple[int | None, ...]
    layer_norm: bool = False
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    output_norms: bool = False
    gain_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied: bool = False
    bos: int | None = None
    stop: tuple[int, ...] = field(default=())

    @property
    def scale(self) -> float:
        """What scores q @ k are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def masks(self) -> tuple[int | None, ...]:
        """The distinct attention windows, in the order of the mask inputs."""
        return tuple(dict.fromkeys(self.windows))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _norm(c: DecoderConfig, size: int) -> nn.Module:
    return nn.LayerNorm(size, c.eps) if c.layer_norm else RMSNorm(size, c.eps)


class Attention(nn.Module):
    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.softcap = c.heads, c.kv_heads, c.head_dim, c.attention_softcap
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, width]; turn: cosines and signed sines [B, 1, T, size]; mask [B, 1, T, P + T]; past keys [B,
        kv_heads, size, P] and values [B, kv_heads, P, size]. Returns y, and the new keys and values (P replaced by T).

        The query heads of one k/v head lie together, so they multiply it as one taller matrix: nothing is repeated."""
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, t, self.heads, self.size).transpose(1, 2))
        k = self.k_norm(self.k_proj(x).view(b, t, self.kv_heads, self.size).transpose(1, 2))
        v = self.v_proj(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        k = k.transpose(2, 3)
        scores = q.reshape(b, self.kv_heads, -1, self.size) @ torch.cat([keys, k], 3)
        scores = softcap(scores.reshape(b, self.heads, t, -1), self.softcap) + mask
        weights = torch.softmax(scores, -1).reshape(b, self.kv_heads, -1, scores.shape[-1])
        mixed = (weights @ torch.cat([values, v], 2)).reshape(b, self.heads, t, self.size)
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, -1)), k, v


class MLP(nn.Module):
    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.hidden, c.mlp_bias)
        self.up_proj = nn.Linear(c.width, c.hidden, c.mlp_bias)
        self.down_proj = nn.Linear(c.hidden, c.width, c.mlp_bias)
        self.activation = c.activation

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        active = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate=self.activation)
        return self.down_proj(active * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = _norm(c, c.width), _norm(c, c.width)
        self.attention_output_norm = _norm(c, c.width) if c.output_norms else nn.Identity()
        self.mlp_output_norm = _norm(c, c.width) if c.output_norms else nn.Identity()
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, k, v = self.self_attn(self.attention_norm(x), turn, mask, keys, values)
        x = x + self.attention_output_norm(y)
        return x + self.mlp_output_norm(self.mlp(self.mlp_norm(x))), k, v


class Decoder(nn.Module):
    """``forward(ids, positions, masks..., keys, values of layer 0, ...)`` -> logits, new keys and values of each layer.

    ids, positions: int64 [B, T]; masks [B, 1, T, P + T] are added to the scores, one per distinct window; shapes of
    keys and values as in `Attention`. ``last_only``: logits of the last token only."""

    def __init__(self, config: DecoderConfig, context: int) -> None:
        super().__init__()
        self.config, self.last_only = config, False
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = _norm(config, config.width)
        self.lm_head = nn.Linear(config.width, config.vocab, config.head_bias)
        with torch.device("cpu"):
            for i, rope in enumerate(config.tables):
                cosine, sine = rope_tables(rope, context, config.head_dim)
                self.register_buffer(f"cosine{i}", cosine, persistent=False)
                self.register_buffer(f"sine{i}", sine, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        masks = dict(zip(self.config.masks, rest, strict=False))
        past, made = rest[len(masks) :], []
        turns = [
            tuple(F.embedding(positions, self.get_buffer(f"{part}{i}")).unsqueeze(1) for part in ("cosine", "sine"))
            for i in range(len(self.config.tables))
        ]
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            rope = self.config.ropes[i]
            turn = None if rope is None else turns[rope]
            x, k, v = layer(x, turn, masks[self.config.windows[i]], past[2 * i], past[2 * i + 1])
            made += [k, v]
        if self.last_only:
            x = x[:, -1:]
        return (softcap(self.lm_head(self.norm(x)), self.config.logit_softcap), *made)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns the two halves of the last axis against each other; ``sine`` carries the sign of the first half."""
    half = x.shape[-1] // 2
    return x * cosine + torch.cat([x[..., half:], x[..., :half]], -1) * sine


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x * (1 / cap)) * cap


def rope_tables(rope: Rope, context: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [context, size]; pairs without a frequency stand still.

    Raises InvalidInput when the frequencies do not cover the context."""
    if rope.limit is not None and context > rope.limit:
        raise InvalidInput(
            f"context {context}: the rotary embedding (longrope) is covered up to {rope.limit} -> a shorter context"
        )
    inverse = torch.zeros(size // 2)
    inverse[: len(rope.inverse)] = torch.tensor(rope.inverse)
    angle = torch.arange(context)[:, None].float() * inverse
    moving = torch.arange(size // 2) < len(rope.inverse)
    cosine = torch.where(moving, angle.cos() * rope.factor, 1.0)
    sine = angle.sin() * rope.factor
    return torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)


def pair_order(size: int, rotary: int, adjacent: bool) -> list[int]:
    """Where the features of a head come from so that pair j is (j, j + size / 2), the rotated ones first.

    rotary: how many features the checkpoint rotates; adjacent: as pairs (2j, 2j + 1), else as (j, j + rotary / 2)."""
    turned = range(rotary)
    first, second = (turned[::2], turned[1::2]) if adjacent else (turned[: rotary // 2], turned[rotary // 2 :])
    still = range(rotary, size)
    middle = len(still) // 2
    return [*first, *still[:middle], *second, *still[middle:]]
