"""windows: a language model as one graph over a whole sequence, for methods that change its weights or learn encodings.

    prefill(ids, ..., past_keys.L, past_values.L)   =>   windows(ids, ...)      the past is a constant: the prefix

What these methods find is put into the weights of the model and into the plans of its two graphs, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeforge.compress import compress
from edgeforge.data import Batches, Dataset, from_arrays
from edgeforge.ir.graph import Graph
from edgeforge.ir.types import QParams, TensorType, Value
from edgeforge.llm.prefix import Cache
from edgeforge.llm.steps import positions_and_masks, where_it_matters, within_masks
from edgeforge.passes.constants import with_constants
from edgeforge.quantize.assign import Groups, Plan, assign, bits
from edgeforge.quantize.calibrate import Range, calibrate
from edgeforge.quantize.rounding import FROM_DATA, round_weights
from edgeforge.quantize.widen import widen
from edgeforge.recipe import Override, Recipe
from edgeforge.target import Target

if TYPE_CHECKING:
    from edgeforge.frontend.language import Language

#: Tokens of a window, at most; shorter where the context or the longest text is.
WINDOW = 128


@dataclass(frozen=True)
class Compressed:
    """``language``: the same function on other weights. ``first``: the prefix's keys and values, or (). ``rounded``
    constants by (node output, input index); ``weights`` encodings by node; ``learned`` encodings by value name or (node
    output, input index). ``overrides``: those of the recipe and what `widen` added, or ()."""

    language: Language
    first: Cache
    rounded: Mapping[tuple[str, int], np.ndarray] = field(default_factory=dict)
    weights: Mapping[str, TensorType] = field(default_factory=dict)
    learned: Mapping[str | tuple[str, int], QParams] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    def applied(self, graph: Graph, plan: Plan) -> tuple[Graph, Plan]:
        """A graph of ``language`` with the weights, and its plan with the encodings, that were found."""
        made = graph.producers()
        graph = with_constants(graph, {place: data for place, data in self.rounded.items() if place[0] in made})
        made, groups = graph.producers(), Groups(graph)
        constants = {made[node].inputs[1]: kind for node, kind in self.weights.items() if node in made}
        roots = {groups.find(str(name)): q for name, q in self.learned.items() if name in graph.values}
        types = {name: replace(kind, q=roots.get(groups.find(name), kind.q)) for name, kind in plan.types.items()}
        reads = {place: replace(kind, q=self.learned.get(place, kind.q)) for place, kind in plan.reads.items()}
        return graph, replace(plan, types=types, reads=reads, constants={**plan.constants, **constants})


def compressed(
    language: Language, recipe: Recipe, target: Target, sequences: Sequence[Sequence[int]], first: Cache
) -> Compressed:
    """The methods of the recipe on windows of ``sequences``. first: keys and values of the token that begins each."""
    chosen = recipe.weights in FROM_DATA
    if not (recipe.compress or recipe.train or recipe.widen or chosen):
        return Compressed(language, first)
    plain, data = window_graph(language, sequences, first)
    graph = compress(plain, recipe, target, data)
    found = Compressed(with_weights(language, plain, graph), first)
    if recipe.widen:
        recipe = widen(graph, planned(graph, recipe, target, data), recipe, data)
        found = replace(found, overrides=recipe.overrides)
    if recipe.train or chosen:
        ranged = recipe.train or recipe.weights != "gptq"  # GPTQ reads no ranges
        plan = planned(graph, recipe, target, data if ranged else data.head(1))
        if recipe.train:
            from edgeforge.compress.train import train

            graph, plan = train(graph, plan, recipe.train, target, data)
            narrow = [(place, kind) for part in (plan.types, plan.reads) for place, kind in part.items()]
            learned = {place: kind.q for place, kind in narrow if kind.dtype == "u8" and kind.q is not None}
            found = replace(found, language=with_weights(language, plain, graph), learned=learned)
        result = graph
        if chosen:
            result, plan = round_weights(graph, plan, recipe, data, "mse")
            linears = [node for node in result.nodes if node.op == "linear"]
            places = [(node, i) for node in linears for i in range(1, len(node.inputs))]
            found = replace(found, rounded={(node.output, i): _data(result, node.inputs[i]) for node, i in places})
        layers = {node.output: plan.constants.get(node.inputs[1]) for node in result.nodes if node.op == "linear"}
        found = replace(found, weights={name: kind for name, kind in layers.items() if kind is not None})
    keys, values = ([_data(graph, f"past_{part}.{i}")[0] for i in range(len(first))] for part in ("keys", "values"))
    return replace(found, first=list(zip(keys, values, strict=True)))


def _data(graph: Graph, name: str) -> np.ndarray:
    data = graph.values[name].data
    assert data is not None, name
    return data


def window_graph(language: Language, sequences: Sequence[Sequence[int]], first: Cache) -> tuple[Graph, Dataset]:
    """The float graph (ids, positions, masks -> logits) and feeds of all its windows: as many as fit each sequence,
    each led by its first token, of which only ``first`` is known to the graph if it is given."""
    head, past = len(first) > 0, 1
    longest = min(max(map(len, sequences)), language.config.context, WINDOW)
    tokens = longest - 1
    rows = []
    for ids in sequences:
        step = longest - 1
        for at in range(1, len(ids) - step + 1, step):
            piece = [ids[0], *ids[at : at + step]]
            rows.append(piece[1:] if head else piece[:-1])
    c = language.config
    positions, *masks = positions_and_masks([int(head)] * len(rows), tokens, tokens, past, c.masks)
    feeds = {"ids": np.array(rows, np.int64), "positions": positions}
    feeds |= {f"mask.{i}": mask for i, mask in enumerate(masks)}
    graph = language.graph(f"{language.name}-windows", tokens, tokens + past)
    graph = _with_past(graph, first)
    return graph, from_arrays("windows", feeds, graph)


def _with_past(graph: Graph, first: Cache) -> Graph:
    """Keys and values as constants: of the prefix, or zeros that masks hide."""
    values = dict(graph.values)
    for name in graph.inputs:
        if name.startswith("past_"):
            part, layer = name.removeprefix("past_").split(".")
            kind = graph.type(name)
            data = first[int(layer)][part == "values"][None] if first else np.zeros(kind.shape, np.float32)
            values[name] = Value(name, TensorType(kind.shape), np.ascontiguousarray(data, np.float32))
    inputs = tuple(name for name in graph.inputs if not name.startswith("past_"))
    return graph.rebuild(values=values, inputs=inputs, outputs=graph.outputs[:1])


def planned(graph: Graph, recipe: Recipe, target: Target, data: Dataset) -> Plan:
    """The encodings of a window graph, keys and values of the past being inputs as they are in prefill and decode."""
    past = [value for value in graph.constants() if value.name.startswith("past_")]
    values = {**graph.values, **{value.name: Value(value.name, value.type) for value in past}}
    whole = graph.rebuild(values=values, inputs=(*graph.inputs, *(value.name for value in past)))
    how, widths = recipe.calibration, bits(whole, recipe, target)
    ranges = calibrate(graph, Batches(data), how.method, widths, how.percentile)
    if how.method != "minmax":
        ranges = where_it_matters(graph, ranges, widths)
    known: dict[str, Range] = {value.name: (float(value.data.min()), float(value.data.max())) for value in past}  # type: ignore[union-attr]
    return assign(whole, within_masks(whole, ranges | known), recipe, target)


def with_weights(language: Language, before: Graph, after: Graph) -> Language:
    """``language`` with what was changed between its graph ``before`` and ``after``. Importing may have folded a
    factor into a weight; it is taken out again."""
    import torch

    old, weights = before.producers(), dict(language.weights)
    for node in after.nodes:
        for i, name in enumerate(node.inputs):
            key = f"{node.source}.{'bias' if i == 2 else 'weight'}"
            if after.values[name].const and not name.startswith("past_") and key in weights:
                was, now = _data(before, old[node.output].inputs[i]), _data(after, name)
                if was.shape == tuple(weights[key].shape) and not np.array_equal(was, now):
                    factor = float(weights[key].norm()) / max(float(np.linalg.norm(was)), 1e-30)
                    weights[key] = torch.from_numpy(now * np.float32(factor))
    return replace(language, weights=weights)
