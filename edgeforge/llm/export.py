"""What a language model's bundle holds besides its graphs: tokenizer, template, golden steps, golden generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeforge.bundle import LanguageRecord, load_arrays, port
from edgeforge.data import load_tokenizer
from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph
from edgeforge.llm.prefix import FILE as PREFIX
from edgeforge.llm.prefix import Prefix
from edgeforge.llm.quantize import Quantized, Steps, read_texts, token_sequences
from edgeforge.llm.session import Session
from edgeforge.models import Model
from edgeforge.recipe import Recipe
from edgeforge.sim.evaluate import quantize_feeds, run_float, simulate

if TYPE_CHECKING:
    from edgeforge.frontend.language import Language

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
#: Samples per graph whose codes a bundle keeps (each holds a whole cache), and tokens of the golden generation.
GOLDEN, PROMPT, GREEDY = 2, 8, 16


def calibration_tokens(model: Model, recipe: Recipe, source: str | Mapping[str, Any]) -> tuple[list[list[int]], str]:
    """Token sequences that ``source`` (a .txt, a .json list of texts, ``embedded`` or ``random``) names, and its name.

    Raises InvalidInput when no text fills a prefill step."""
    language, shape = model.language, recipe.language
    assert language is not None
    if source == "random":
        rng = np.random.default_rng(0)
        found = rng.integers(0, language.config.vocab, (8, shape.context)).tolist()
        return [ids if language.bos is None else [language.bos, *ids[1:]] for ids in found], "random ids"
    if not isinstance(source, str):
        raise InvalidInput("a language model is calibrated on text -> a .txt, a .json list of strings, or random")
    path = Path(str(model.data("calibration"))) if source == "embedded" else Path(source)
    found = token_sequences(read_texts(path), language.encoder(), language.bos, shape.context)
    found = [ids for ids in found if len(ids) >= shape.chunk + shape.prefix]
    if not found:
        raise InvalidInput(
            f"text {path.name}: no text of {shape.chunk} tokens -> longer texts, or --set language.chunk=N"
        )
    return found, path.name


def golden_steps(made: Quantized, recipe: Recipe, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Inputs (real and codes), float outputs and the simulator's integers: a first step and the last of ``ids``; those
    of prefill under ``prefill/``."""
    found = {}
    for name, part in made.parts.items():
        chunk = part.graph.type("ids").shape[1]
        steps = Steps(made.found.language, (), chunk, recipe.language.context, made.found.first)
        real = steps.feeds(ids, sorted({steps.prefix, len(ids) - chunk})[:GOLDEN])
        codes = quantize_feeds(part.graph, real)
        arrays = {
            "real": real,
            "input": codes,
            "float": run_float(part.real, real),
            "output": simulate(part.graph, codes),
        }
        prefix = "prefill/" if name == "prefill" else ""
        found |= {f"{prefix}{kind}/{n}": array for kind, some in arrays.items() for n, array in some.items()}
    return found


def describe(
    language: Language, recipe: Recipe, graphs: Mapping[str, Graph], ids: Sequence[int], folder: Path
) -> LanguageRecord:
    """Write tokenizer and template into ``folder`` (where the prefix lies already); the record of the manifest, with a
    golden generation behind the first tokens of ``ids``."""
    (folder / TOKENIZER).write_text(language.tokenizer)
    if language.chat_template is not None:
        (folder / TEMPLATE).write_text(language.chat_template)
    load_tokenizer(folder / TOKENIZER)
    steps = {name: lambda feeds, graph=graph: simulate(graph, feeds) for name, graph in graphs.items()}
    file = folder / PREFIX
    prefix = Prefix(ids[0], load_arrays(file)) if file.is_file() else None
    session, prompt = Session(graphs, steps, language.config.masks, prefix), list(ids[:PROMPT])
    greedy: list[int] = []
    tokens = prompt
    for _ in range(min(GREEDY, recipe.language.context - len(prompt))):
        tokens = [int(session.feed(tokens).argmax())]
        greedy += tokens
    prefill = graphs["prefill"]
    return LanguageRecord(
        context=recipe.language.context,
        chunk=recipe.language.chunk,
        windows=language.config.masks,
        bos=language.bos,
        stop=language.config.stop,
        prefix=None if prefix is None else PREFIX,
        tokenizer=TOKENIZER,
        chat_template=None if language.chat_template is None else TEMPLATE,
        prompt=tuple(prompt),
        greedy=tuple(greedy),
        prefill_hash=prefill.hash(),
        prefill_inputs=tuple(port(n, prefill.type(n)) for n in prefill.inputs),
        prefill_outputs=tuple(port(n, prefill.type(n)) for n in prefill.outputs),
    )
