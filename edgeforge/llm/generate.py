"""Greedy decoding with a fixed-window graph: the whole window is computed for each token, without a cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeforge.bundle import Bundle
from edgeforge.data import bos_id, load_tokenizer
from edgeforge.errors import InvalidInput
from edgeforge.recipe import TextData
from edgeforge.sim.evaluate import simulate


def generate(bundle: Bundle, prompt: str, max_tokens: int) -> Iterator[tuple[int, str]]:
    """(token id, the text it adds) one by one, from the simulator's integers; ends at the token that begins a text, for
    there another begins. Ties of logits go to the lowest id. When the window is full its oldest token falls out.

    Raises InvalidInput when the bundle is no language model or the prompt does not fit its window."""
    if not isinstance(bundle.recipe.data, TextData) or len(bundle.graph.inputs) != 1:
        raise InvalidInput(f"{bundle.path} is no language model (no tokenizer) -> export one, for example tinylm")
    tokenizer = load_tokenizer(bundle.path / bundle.recipe.data.tokenizer)
    (name,), (output,) = bundle.graph.inputs, bundle.graph.outputs
    window = bundle.graph.type(name).shape[1]
    bos = bos_id(tokenizer)
    head = [] if bos is None else [bos]
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not head + tokens or len(head + tokens) > window:
        raise InvalidInput(f"prompt of {len(tokens)} tokens does not fit the window of {window} -> shorten it")
    text = tokenizer.decode(tokens)
    for _ in range(max_tokens):
        kept = head + tokens[-(window - len(head)) :]
        ids = np.zeros((1, window), np.int64)
        ids[0, : len(kept)] = kept
        codes = simulate(bundle.graph, {name: ids})[output]
        token = int(codes[0, len(kept) - 1].argmax())
        if token == bos:
            return
        tokens.append(token)
        longer = tokenizer.decode(tokens)
        yield token, longer[len(text) :]
        text = longer
