"""A language model in memory: configuration, weights as `Decoder` names them, tokenizer, chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgeforge.errors import InvalidInput
from edgeforge.frontend.decoder import Decoder, DecoderConfig, pair_order
from edgeforge.frontend.torch import from_module
from edgeforge.ir.graph import Graph
from edgeforge.passes import optimize


@dataclass(frozen=True, eq=False)
class Language:
    """weights: float32, by the names of `Decoder`. tokenizer: the text of a tokenizer.json; chat_template: Jinja, or
    None."""

    name: str
    config: DecoderConfig
    weights: Mapping[str, Tensor]
    tokenizer: str
    chat_template: str | None = None

    def encoder(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer)

    @property
    def bos(self) -> int | None:
        """The id that begins a text: what the tokenizer puts there; of tokenizers without a post-processor, the
        model's."""
        tokenizer = self.encoder()
        if tokenizer.post_processor is None:
            return self.config.bos
        first = tokenizer.encode("").ids[:1]
        return first[0] if first else None

    def hash(self) -> str:
        """sha256 over configuration, tokenizer, template and weights."""
        digest = hashlib.sha256(repr((self.name, self.config, self.tokenizer, self.chat_template)).encode())
        for name, weight in sorted(self.weights.items()):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(weight.contiguous().numpy().data)
        return digest.hexdigest()

    def decoder(self, context: int) -> Decoder:
        """The module for up to ``context`` tokens, on the same weights in memory.

        Raises InvalidInput when the model was not made for so many."""
        if not 2 <= context <= self.config.context:
            raise InvalidInput(
                f"{self.name}: context {context} is not in 2..{self.config.context} -> --set language.context=N"
            )
        with torch.device("meta"):
            made = Decoder(self.config, context)
        made.load_state_dict(dict(self.weights), strict=True, assign=True)
        return made.eval()

    def padded(self, multiple: int) -> Language:
        """The same function with the MLP's hidden size a multiple of ``multiple``: the features added are always 0."""
        more = -self.config.hidden % multiple
        if not more:
            return self
        weights = dict(self.weights)
        for name, weight in self.weights.items():
            part = name.split(".")[-2]
            if part in ("gate_proj", "up_proj"):
                weights[name] = torch.nn.functional.pad(weight, (0, 0) * (weight.ndim - 1) + (0, more))
            elif part == "down_proj" and weight.ndim == 2:
                weights[name] = torch.nn.functional.pad(weight, (0, more))
        return replace(self, config=replace(self.config, hidden=self.config.hidden + more), weights=weights)

    def graph(self, name: str, chunk: int, context: int, last_only: bool = False) -> Graph:
        """The float graph of one step of ``chunk`` tokens.

        inputs: ids, positions [1, chunk]; mask.I [1, 1, chunk, context] per attention window; past_keys.L [1, kv_heads,
        head_dim, context - chunk] and past_values.L [1, kv_heads, context - chunk, head_dim] per layer. outputs: logits
        [1, chunk or 1, vocab], keys.L, values.L of the chunk."""
        c, past = self.config, context - chunk
        decoder = self.decoder(context)
        decoder.last_only = last_only
        layer = ((1, c.kv_heads, c.head_dim, past), (1, c.kv_heads, past, c.head_dim))
        floats = [*[(1, 1, chunk, context)] * len(c.masks), *layer * c.layers]
        # A tensor of its own for each: torch.export takes one tensor in two places for one input.
        numbers = [torch.zeros(1, chunk, dtype=torch.int64) for _ in range(2)]
        graph = from_module(decoder, (*numbers, *map(torch.zeros, floats)), name).graph
        ports = [
            "ids",
            "positions",
            *(f"mask.{i}" for i in range(len(c.masks))),
            *(f"past_{part}.{layer}" for layer in range(c.layers) for part in ("keys", "values")),
        ]
        made = ["logits", *(f"{part}.{layer}" for layer in range(c.layers) for part in ("keys", "values"))]
        names = dict(zip((*graph.inputs, *graph.outputs), (*ports, *made), strict=True))
        return optimize(renamed(graph, names))


def renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The same graph with some values under other names."""

    def new(name: str) -> str:
        return names.get(name, name)

    nodes = [replace(n, inputs=tuple(map(new, n.inputs)), output=new(n.output)) for n in graph.nodes]
    values = {new(v.name): replace(v, name=new(v.name)) for v in graph.values.values()}
    inputs, outputs = (tuple(map(new, part)) for part in (graph.inputs, graph.outputs))
    return graph.rebuild(nodes, values, inputs=inputs, outputs=outputs)


def folded(config: DecoderConfig, weights: dict[str, Tensor], rotary: int, adjacent: bool = False) -> dict[str, Tensor]:
    """A checkpoint's weights under `Decoder`'s names -> what `Decoder` computes with: rotary pairs in its order, the
    attention scale in the queries, Gemma's 1 + w as gains, its embedding scale in the table.

    rotary, adjacent: how many features of a head the checkpoint rotates, and whether pairs are neighbors."""
    order, scaled = pair_order(config.head_dim, rotary, adjacent), "q_norm" if config.qk_norm else "q_proj"
    made = {}
    for name, weight in weights.items():
        if config.gain_offset and "norm" in name:
            weight = weight + config.gain_offset
        part = name.split(".")[-2] if "self_attn" in name else ""
        if part in ("q_proj", "k_proj", "q_norm", "k_norm") and order != list(range(config.head_dim)):
            weight = weight.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)
        if part == scaled and config.scale != 1:
            weight = weight * config.scale
        made[name] = weight
    if config.tied:
        made["lm_head.weight"] = made["embed_tokens.weight"]
    if config.embedding_scale != 1:
        made["embed_tokens.weight"] = made["embed_tokens.weight"] * config.embedding_scale
    return made
