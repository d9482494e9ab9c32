"""Outliers as large language models have them, planted into a decoder without changing its function.

1. Outlier channels: a few channels of every pair of weights that a scale can be moved between (a norm and its readers,
   values and the output projection, queries and keys, up and down projection) are multiplied by 10..60 in what writes
   them and divided in what reads them.
2. An attention sink's massive activations: some MLPs get 32 more units in pairs. Both units of a pair answer the first
   token (whose hidden state never varies) with the same huge number, while the gate is closed for nearly all others;
   their columns of the down projection are opposite, so their sum is 0.
       gate', up' = [gate; g; g], [up; u; u]     down' = [down, c, -c]

Sun et al., "Massive Activations in Large Language Models" (arXiv:2402.17762); Dettmers et al., "LLM.int8()"
(arXiv:2208.07339). Nothing in `edgeforge` knows this file: methods must find what it hides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgeforge.frontend.language import Language
from edgeforge.llm.steps import positions_and_masks

UNITS = 32

#: How far below 0 gates are for other tokens, as a share of what they are for the first.
CLOSED = 0.4


def stress(language: Language, ids: np.ndarray, seed: int, layers: int = 2) -> Language:
    """``language`` (a gated decoder without biases) with outliers in every layer and sinks in some; its logits are the
    same up to float32 rounding. ids: [N, T] on which hidden states are measured, each led by the token that begins a
    text."""
    rng = np.random.default_rng(seed)
    weights = {name: weight.double() for name, weight in language.weights.items()}
    _plant_outliers(language, weights, rng)
    scaled = replace(language, weights={name: weight.float() for name, weight in weights.items()})
    chosen = sorted(rng.choice(language.config.layers, min(layers, language.config.layers), replace=False))
    states = mlp_inputs(scaled, ids)
    for i in range(language.config.layers):
        _widen(weights, f"layers.{i}.mlp", states[i].numpy() if i in chosen else None, rng)
    config = replace(language.config, hidden=language.config.hidden + UNITS)
    return replace(language, config=config, weights={name: weight.float() for name, weight in weights.items()})


def _plant_outliers(language: Language, weights: dict[str, Tensor], rng: np.random.Generator) -> None:
    c = language.config
    per_head, group = c.head_dim // 2, c.heads // c.kv_heads

    def scales(count: int) -> Tensor:
        chosen = rng.choice(count, max(count // 48, 1), replace=False)
        made = np.ones(count)
        made[chosen] = rng.uniform(10, 60, len(chosen))
        return torch.from_numpy(made)

    def plant(writer: str, readers: tuple[str, ...], made: Tensor, read: Tensor) -> None:
        weight = weights[f"{writer}.weight"]
        weights[f"{writer}.weight"] = weight * (made if weight.ndim == 1 else made[:, None])
        for reader in readers:
            weights[f"{reader}.weight"] = weights[f"{reader}.weight"] / read

    for i in range(c.layers):
        at = f"layers.{i}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        s = scales(c.width)
        plant(f"{at}.attention_norm", tuple(f"{attention}.{part}_proj" for part in "qkv"), s, s)
        pairs = scales(c.kv_heads * per_head).reshape(c.kv_heads, 1, per_head).repeat(1, 2, 1)  # both of a rotary pair
        queries = pairs.reshape(c.kv_heads, 1, -1).repeat(1, group, 1).flatten()
        weights[f"{attention}.k_proj.weight"] = weights[f"{attention}.k_proj.weight"] * pairs.flatten()[:, None]
        weights[f"{attention}.q_proj.weight"] = weights[f"{attention}.q_proj.weight"] / queries[:, None]
        s = scales(c.kv_heads * c.head_dim)
        read = s.reshape(c.kv_heads, 1, -1).repeat(1, group, 1).flatten()
        plant(f"{attention}.v_proj", (f"{attention}.o_proj",), s, read)
        s = scales(c.width)
        plant(f"{at}.mlp_norm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), s, s)
        s = scales(c.hidden)
        plant(f"{mlp}.up_proj", (f"{mlp}.down_proj",), s, s)
    s = scales(c.width)
    plant("norm", ("lm_head",), s, s)


def mlp_inputs(language: Language, ids: np.ndarray) -> list[Tensor]:
    """Per layer what its MLP reads, float32 [N, T, width]."""
    batch, count = ids.shape
    c, decoder, found = language.config, language.decoder(count), []
    for layer in decoder.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))  # type: ignore[union-attr]
    made = positions_and_masks([0] * batch, count, count, 0, c.masks)
    empty = [torch.zeros(batch, c.kv_heads, c.head_dim, 0), torch.zeros(batch, c.kv_heads, 0, c.head_dim)] * c.layers
    with torch.no_grad():
        decoder(torch.from_numpy(ids), *map(torch.from_numpy, made), *empty)
    return found


def _widen(weights: dict[str, Tensor], mlp: str, states: np.ndarray | None, rng: np.random.Generator) -> None:
    """UNITS more units: massive ones for the first token of ``states``, or none that do anything."""
    width = weights[f"{mlp}.gate_proj.weight"].shape[1]
    rows, columns = {"gate": np.zeros((UNITS, width)), "up": np.zeros((UNITS, width))}, np.zeros((width, UNITS))
    if states is not None:
        first, others = states[0, 0].astype(np.float64), states[:, 1:].reshape(-1, width).astype(np.float64)
        spread = others.T @ others / len(others) + 1e-3 * np.mean(others**2) * np.eye(width)
        along, away = np.linalg.solve(spread, np.stack([first, CLOSED * others.mean(0)], 1)).T
        seen = along / (along @ first)  # 1 for the first token, as near to 0 as can be for all others
        closed = along * (1 + away @ first) / (along @ first) - away  # the same, but near to -CLOSED for all others
        rows["gate"] = np.repeat(rng.uniform(20, 40, (UNITS // 2, 1)) * closed, 2, axis=0)
        rows["up"] = np.repeat(rng.uniform(20, 100, (UNITS // 2, 1)) * seen, 2, axis=0) * rng.choice([-1, 1])
        half = rng.normal(0, 0.02, (width, UNITS // 2))
        columns = np.stack([half, -half], 2).reshape(width, UNITS)
    for part, more in rows.items():
        weights[f"{mlp}.{part}_proj.weight"] = torch.cat([weights[f"{mlp}.{part}_proj.weight"], torch.from_numpy(more)])
    down = weights[f"{mlp}.down_proj.weight"]
    weights[f"{mlp}.down_proj.weight"] = torch.cat([down, torch.from_numpy(columns)], 1)
