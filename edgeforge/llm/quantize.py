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
from edgeforge.llm.steps import positions_and_masks
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

#: exp of it is nothing at 16 bits: how far blocked scores lie below all others.
MARGIN = 16.0


@dataclass(frozen=True)
class Steps:
    """The steps of ``chunk`` tokens that process each sequence, as one batch of feeds per sequence: the cache before
    each step comes from one pass of the float model. Tokens behind the last full chunk are left out."""

    language: Language
    sequences: Sequence[Sequence[int]]
    chunk: int
    context: int

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for ids in track(self.sequences, len(self.sequences), "calibrating"):
            yield self.feeds(ids, range(0, len(ids) - self.chunk + 1, self.chunk))

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

        c, count = self.language.config, len(ids)
        made = positions_and_masks([0], count, count, 0, c.masks)
        empty = [torch.zeros(1, c.kv_heads, c.head_dim, 0), torch.zeros(1, c.kv_heads, 0, c.head_dim)] * c.layers
        with torch.no_grad():
            decoder = self.language.decoder(self.context)
            decoder.last_only = True
            _, *rest = decoder(torch.tensor([list(ids)]), *map(torch.from_numpy, made), *empty)
        arrays = [tensor[0].numpy() for tensor in rest]
        return list(zip(arrays[::2], arrays[1::2], strict=True))


@dataclass(frozen=True)
class Part:
    """One of the two graphs, real and quantized."""

    real: Graph
    graph: Graph


def quantize_language(
    language: Language, recipe: Recipe, target: Target, sequences: Sequence[Sequence[int]], step: Step = at_once
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Both graphs, and notes on what was changed and measured. sequences: token ids, at least one full chunk each.
    step: see `edgeforge.steps`.

    Raises Unsupported with every node that the target cannot run as asked."""
    chunk, context = recipe.language.chunk, recipe.language.context
    if chunk >= context:
        raise InvalidInput(f"language.chunk {chunk} is not below language.context {context} -> --set language.chunk=N")
    if recipe.bias_correction:
        raise InvalidInput("bias_correction is not offered for language models -> --set bias_correction=0")
    precision = Precision(recipe.precision)
    padded, notes = language.padded(precision.block or 1), ()
    if padded is not language:
        notes = (f"MLP padded with zeros from {language.config.hidden} to {padded.config.hidden} features (blocks)",)
    language = padded
    if precision.dynamic:
        return _dynamic(language, recipe), notes

    def calibrated() -> dict[str, Range]:
        whole = language.graph("calibration", chunk, context)
        steps = Steps(language, [s for s in sequences if len(s) >= chunk][: recipe.calibration.samples], chunk, context)
        how, widths = recipe.calibration, bits(whole, recipe, target)
        return within_masks(whole, calibrate(whole, steps, how.method, widths, how.percentile))

    ranges = step("ranges", calibrated)
    parts: dict[str, Part] = {}
    for name, tokens in (("prefill", chunk), ("decode", 1)):
        real = language.graph(f"{language.name}-{name}", tokens, context, last_only=True)
        plan, first = assign(real, ranges, recipe, target), parts.get("prefill")
        made = convert(real, plan, target, recipe.weights, first and first.graph)
        parts[name] = Part(real, made)
    decode, measured = measure(parts["decode"].graph, target)
    parts["decode"] = replace(parts["decode"], graph=decode)
    parts["prefill"] = replace(parts["prefill"], graph=_with_tables(parts["prefill"].graph, decode))
    return parts, notes + measured


def _dynamic(language: Language, recipe: Recipe) -> dict[str, Part]:
    """Both graphs with dynamic linears, on the same codes."""
    parts: dict[str, Part] = {}
    for name, tokens in (("prefill", recipe.language.chunk), ("decode", 1)):
        real = language.graph(f"{language.name}-{name}", tokens, recipe.language.context, last_only=True)
        first = parts.get("prefill")
        parts[name] = Part(real, dynamic_linears(real, recipe, first and first.graph))
    return parts


def _with_tables(graph: Graph, measured: Graph) -> Graph:
    """``graph`` with the tables that the nodes of the same names in ``measured`` hold."""
    known = measured.producers()
    nodes = []
    for node in graph.nodes:
        other = known.get(node.output, node)
        nodes.append(replace(node, rule=other.rule, fixed=other.fixed) if "table" in other.fixed else node)
    return graph.rebuild(nodes)


def within_masks(graph: Graph, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges in which masks waste nothing: blocked scores get the lowest code, MARGIN below all others.

    The mask reaches far enough for that from the highest score: whatever is blocked has the same code, in prefill and
    in decode alike."""
    changed, reach = dict(ranges), {}
    for node in graph.nodes:
        masks = [name for name in node.inputs if name.startswith("mask.")]
        if node.op == "add" and masks:
            (scores,) = (name for name in node.inputs if name not in masks)
            low, high = ranges[scores]
            changed[node.output] = (low - MARGIN, high)
            reach[masks[0]] = min(reach.get(masks[0], 0.0), low - high - MARGIN)
    return changed | {mask: (low, 0.0) for mask, low in reach.items()}


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
