"""A language model's two graphs, prefill and decode, quantized with one calibration: one encoding per value in both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph
from edgeforge.llm.prefix import Cache, Prefix, in_codes
from edgeforge.llm.steps import positions_and_masks, where_it_matters, within_masks
from edgeforge.llm.windows import Compressed, compressed
from edgeforge.measured import measure
from edgeforge.progress import track
from edgeforge.quantize.assign import assign, bits
from edgeforge.quantize.calibrate import Range, calibrate
from edgeforge.quantize.convert import convert
from edgeforge.quantize.dynamic import dynamic_linears
from edgeforge.recipe import Precision, Recipe
from edgeforge.steps import Step, at_once
from edgeforge.target import Target

if TYPE_CHECKING:
    from edgeforge.frontend.language import Language


@dataclass(frozen=True)
class Steps:
    """The steps of ``chunk`` tokens that process each sequence, as one batch of feeds per sequence: the cache before
    each step comes from one pass of the float model. Tokens behind the last full chunk are left out. ``first``: what is
    known of the prefix, which no step processes."""

    language: Language
    sequences: Sequence[Sequence[int]]
    chunk: int
    context: int
    first: Cache = ()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for ids in track(self.sequences, len(self.sequences), "calibrating"):
            yield self.feeds(ids, range(self.prefix, len(ids) - self.chunk + 1, self.chunk))

    @property
    def prefix(self) -> int:
        """Tokens that lie in the cache beforehand."""
        return int(len(self.first) > 0)

    def feeds(self, ids: Sequence[int], starts: Sequence[int]) -> dict[str, np.ndarray]:
        """One sample per start: the step that follows the first ``start`` tokens of ``ids``."""
        c, past = self.language.config, self.context - self.chunk
        positions, *masks = positions_and_masks(starts, self.chunk, self.chunk, past, c.masks)
        feeds = {"ids": np.array([ids[s : s + self.chunk] for s in starts], np.int64), "positions": positions}
        feeds |= {f"mask.{i}": mask for i, mask in enumerate(masks)}
        for layer, (keys, values) in enumerate(self.cache(ids[: max(starts) + 1])):
            wide = {"keys": (c.head_dim, past), "values": (past, c.head_dim)}
            rows = {part: np.zeros((len(starts), c.kv_heads, *shape), np.float32) for part, shape in wide.items()}
            for i, start in enumerate(starts):
                rows["keys"][i, ..., :start] = keys[..., :start]
                rows["values"][i, :, :start] = values[:, :start]
            feeds |= {f"past_{part}.{layer}": array for part, array in rows.items()}
        return feeds

    def cache(self, ids: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer float keys [kv_heads, head_dim, N] and values [kv_heads, N, head_dim] of all tokens."""
        import torch

        c, known = self.language.config, self.prefix
        count = len(ids) - known
        made = positions_and_masks([known], count, count, known, c.masks)
        empty = (np.zeros((c.kv_heads, c.head_dim, 0), np.float32), np.zeros((c.kv_heads, 0, c.head_dim), np.float32))
        first = self.first or [empty] * c.layers
        with torch.no_grad():
            decoder = self.language.decoder(self.context)
            decoder.last_only = True
            past = [torch.from_numpy(array[None]) for layer in first for array in layer]
            _, *rest = decoder(torch.tensor([list(ids[known:])]), *map(torch.from_numpy, made), *past)
        arrays = [tensor[0].numpy() for tensor in rest]
        new = zip(first, arrays[::2], arrays[1::2], strict=True)
        return [(np.concatenate([k, keys], 2), np.concatenate([v, values], 1)) for (k, v), keys, values in new]


@dataclass(frozen=True)
class Part:
    """One of the two graphs, real and quantized."""

    real: Graph
    graph: Graph


@dataclass(frozen=True)
class Encoded:
    """What every graph of a language model is made from: its weights and prefix, and the range of every value."""

    found: Compressed
    ranges: Mapping[str, Range]
    recipe: Recipe
    target: Target

    def part(self, name: str, tokens: int, made: Part | None = None, last_only: bool = True) -> Part:
        """The graph of a step of ``tokens`` tokens. made: another part, whose weights are taken."""
        language, recipe = self.found.language, self.recipe
        real = language.graph(f"{language.name}-{name}", tokens, recipe.language.context, last_only)
        if Precision(recipe.precision).dynamic:
            return Part(real, dynamic_linears(real, recipe, made and made.graph))
        graph, plan = self.found.applied(real, assign(real, self.ranges, recipe, self.target))
        method = "mse" if recipe.weights == "mse" else "minmax"
        return Part(real, convert(graph, plan, self.target, method, made and made.graph))


@dataclass(frozen=True)
class Quantized:
    """``parts``: "prefill" and "decode"."""

    parts: Mapping[str, Part]
    found: Compressed
    prefix: Prefix | None
    notes: tuple[str, ...]


def encoded(
    language: Language, recipe: Recipe, target: Target, sequences: Sequence[Sequence[int]], step: Step = at_once
) -> Encoded:
    """Weights by the recipe's methods and ranges by its estimator. sequences: token ids, at least one full chunk each,
    led by the model's BOS if the recipe wants a prefix."""
    chunk, context = recipe.language.chunk, recipe.language.context
    sequences = [s for s in sequences if len(s) >= chunk + recipe.language.prefix][: recipe.calibration.samples]
    first: Cache = ()
    if recipe.language.prefix and language.bos is not None:
        first = Steps(language, (), chunk, context).cache([language.bos])
    if Precision(recipe.precision).dynamic:
        return Encoded(Compressed(language, first), {}, recipe, target)
    found = compressed(language, recipe, target, sequences, first)
    recipe = recipe.model_copy(update={"overrides": found.overrides or recipe.overrides})

    def calibrated() -> dict[str, Range]:
        whole = found.language.graph("calibration", chunk, context)
        steps = Steps(found.language, sequences, chunk, context, found.first)
        how, widths = recipe.calibration, bits(whole, recipe, target)
        ranges = within_masks(whole, calibrate(whole, steps, how.method, widths, how.percentile))
        return ranges if how.method == "minmax" else where_it_matters(whole, ranges, widths)

    return Encoded(found, step("ranges", calibrated), recipe, target)


def quantize_language(
    language: Language, recipe: Recipe, target: Target, sequences: Sequence[Sequence[int]], step: Step = at_once
) -> Quantized:
    """Both graphs. sequences: see `encoded`; step: see `edgeforge.steps`.

    Raises Unsupported with every node that the target cannot run as asked."""
    chunk, context = recipe.language.chunk, recipe.language.context
    if chunk >= context:
        raise InvalidInput(f"language.chunk {chunk} is not below language.context {context} -> --set language.chunk=N")
    if recipe.bias_correction:
        raise InvalidInput("bias_correction is not offered for language models -> --set bias_correction=0")
    precision, notes = Precision(recipe.precision), ()
    padded = language.padded(precision.block or 1)
    if padded is not language:
        notes = (f"MLP padded with zeros from {language.config.hidden} to {padded.config.hidden} features (blocks)",)
    if precision.dynamic and (recipe.compress or recipe.train or recipe.weights != "minmax"):
        notes += (f"{precision.name}: weights as they are, compress, train and weights are for static activations",)
    made = encoded(padded, recipe, target, sequences, step)
    prefill = made.part("prefill", chunk)
    decode = made.part("decode", 1, prefill)
    if not precision.dynamic:
        measured, more = measure(decode.graph, target)
        decode, notes = replace(decode, graph=measured), notes + more
        prefill = replace(prefill, graph=_with_tables(prefill.graph, measured))
    prefix = None
    if made.found.first and language.bos is not None:
        prefix = in_codes(language.bos, made.found.first, first_logits(language, context), decode.graph)
    return Quantized({"prefill": prefill, "decode": decode}, made.found, prefix, notes)


def first_logits(language: Language, context: int) -> np.ndarray:
    """Float logits [vocab] behind BOS."""
    import torch

    c = language.config
    made = positions_and_masks([0], 1, 1, 0, c.masks)
    empty = [torch.zeros(1, c.kv_heads, c.head_dim, 0), torch.zeros(1, c.kv_heads, 0, c.head_dim)] * c.layers
    with torch.no_grad():
        logits, *_ = language.decoder(context)(torch.tensor([[language.bos]]), *map(torch.from_numpy, made), *empty)
    return logits[0, -1].numpy()


def _with_tables(graph: Graph, measured: Graph) -> Graph:
    """``graph`` with the tables that the nodes of the same names in ``measured`` hold."""
    known = measured.producers()
    nodes = []
    for node in graph.nodes:
        other = known.get(node.output, node)
        nodes.append(replace(node, rule=other.rule, fixed=other.fixed) if "table" in other.fixed else node)
    return graph.rebuild(nodes)


def read_texts(path: Path) -> list[str]:
    """Texts of a .txt (one) or a .json (a list of strings). Raises InvalidInput."""
    try:
        text = path.read_text("utf-8")
        texts = json.loads(text) if path.suffix == ".json" else [text]
    except (OSError, ValueError) as error:
        raise InvalidInput(f"text {path}: {error} -> a .txt, or a .json list of strings") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise InvalidInput(f"text {path.name}: expected a list of strings")
    return texts


def token_sequences(texts: Sequence[str], tokenizer: Any, bos: int | None, length: int) -> list[list[int]]:
    """Each text's tokens in pieces of up to ``length``, each led by the BOS token if there is one."""
    head = [] if bos is None else [bos]
    step, made = length - len(head), []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        made += [[*head, *ids[at : at + step]] for at in range(0, len(ids), step)]
    return made
