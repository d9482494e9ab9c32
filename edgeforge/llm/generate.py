"""Text from a language model's bundle: greedy or sampled, on any backend; and the fixed-window form without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeforge.bundle import Bundle
from edgeforge.data import bos_id, load_tokenizer
from edgeforge.errors import InvalidInput
from edgeforge.llm.session import Session
from edgeforge.recipe import TextData
from edgeforge.sim.evaluate import simulate


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token (ties: the lowest id); top_p: the likeliest tokens whose probabilities
    add up to it are drawn from."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InvalidInput(
                f"temperature {self.temperature}, top_p {self.top_p} -> temperature >= 0, 0 < top_p <= 1"
            )


def choose(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token from real (or, when greedy, integer) logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    chances = np.exp(scaled - scaled.max())
    chances /= chances.sum()
    order = np.argsort(-chances, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(chances[order]), sampling.top_p)) + 1]
    return int(rng.choice(kept, p=chances[kept] / chances[kept].sum()))


def prompt_tokens(bundle: Bundle, prompt: str, chat: bool = False) -> list[int]:
    """The ids of a prompt, with what begins a text; ``chat``: as the user's turn in the model's chat template.

    Raises InvalidInput when there is no template, or nothing to start from."""
    record = bundle.manifest.language
    assert record is not None
    tokenizer = load_tokenizer(bundle.path / record.tokenizer)
    if not chat:
        head = [] if record.bos is None else [record.bos]
        tokens = head + tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else head
    elif record.chat_template is None:
        raise InvalidInput(f"{bundle.path}: the model has no chat template -> leave --chat out")
    else:
        source = (bundle.path / record.chat_template).read_text()
        tokens = tokenizer.encode(
            in_template(source, prompt, tokenizer, record.bos, record.stop), add_special_tokens=False
        ).ids
    if not tokens:
        raise InvalidInput("the prompt is empty, and the model has no token that begins a text -> a prompt")
    return tokens


def in_template(source: str, prompt: str, tokenizer: Any, bos: int | None, stop: Sequence[int]) -> str:
    """The chat template's text for one turn of the user. Raises InvalidInput with the template's own complaint."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    names = {"bos_token": bos, "eos_token": stop[0] if stop else None}
    special = {key: "" if i is None else tokenizer.id_to_token(i) or "" for key, i in names.items()}
    try:
        return environment.from_string(source).render(
            messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **special
        )
    except TemplateError as error:
        raise InvalidInput(f"chat template: {error}") from None


def continued(
    bundle: Bundle, session: Session, tokens: Sequence[int], max_tokens: int, sampling: Sampling = Sampling()
) -> Iterator[tuple[int, str]]:
    """(token id, the text it adds) one by one, from a session's integers, until a stop token or a full context.

    Raises InvalidInput when the prompt does not fit the context."""
    from tokenizers.decoders import DecodeStream

    record = bundle.manifest.language
    assert record is not None
    tokenizer = load_tokenizer(bundle.path / record.tokenizer)
    kind = session.graphs["decode"].type("logits")
    rng, stream = np.random.default_rng(sampling.seed), DecodeStream(ids=list(tokens), skip_special_tokens=True)
    waiting = list(tokens)
    for _ in range(max_tokens):
        logits = session.feed(waiting)
        real = logits if sampling.temperature == 0 or kind.q is None else kind.q.dequantize(logits)
        token = choose(real, sampling, rng)
        if token in record.stop:
            return
        yield token, stream.step(tokenizer, token) or ""
        if session.start == session.context:
            return
        waiting = [token]


def generate(bundle: Bundle, prompt: str, max_tokens: int) -> Iterator[tuple[int, str]]:
    """(token id, the text it adds) one by one, from the simulator's integers of a fixed-window graph: the whole window
    is computed for each token. Ends at the token that begins a text, for there another begins. Ties of logits go to
    the lowest id. When the window is full its oldest token falls out.

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
