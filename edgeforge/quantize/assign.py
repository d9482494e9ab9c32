"""assign: which dtype and encoding every value gets. Nothing is rounded yet; `convert` does that."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgeforge.errors import Reason, Unsupported
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import ACT, LAYERS, OPS
from edgeforge.ir.types import BITS, RANGE, QParams, TensorType
from edgeforge.quantize.calibrate import Range
from edgeforge.recipe import Override, Precision, Recipe, Width
from edgeforge.target import Target

WIDTHS = {"a8": "u8", "a16": "u16", "a8s": "u8"}


@dataclass(frozen=True)
class Plan:
    """``types``: dtype and encoding of every activation, by value name. ``precision``: of every node.
    ``reads``: (node output, input index) -> the type it wants where that is not the value's own. ``constants``: the
    types of constants whose codes are given (see `keep`); the others get their own."""

    types: Mapping[str, TensorType]
    precision: Mapping[str, Precision]
    reads: Mapping[tuple[str, int], TensorType]
    constants: Mapping[str, TensorType] = field(default_factory=dict)


def _matches(override: Override, node: Node) -> bool:
    named = fnmatch.fnmatchcase(node.output, override.match) or fnmatch.fnmatchcase(node.source, override.match)
    return named and (override.op == node.op or (override.op is None and node.op != "input"))


def affine(limits: Range, dtype: str) -> QParams:
    """Asymmetric encoding of a range, widened to hold 0 exactly."""
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    top = RANGE[dtype][1]
    scale = np.float32(max((high - low) / top, 1e-10))
    return QParams(scale, int(np.clip(np.rint(-low / np.float64(scale)), 0, top)))


def symmetric(limits: Range, zero: int) -> QParams:
    """uint8 encoding with a prescribed zero point."""
    reach = max(-limits[0] / max(zero, 1), limits[1] / max(255 - zero, 1), 1e-10)
    return QParams(np.float32(reach), zero)


class Groups:
    """Union-find over values that must share one encoding."""

    def __init__(self, graph: Graph):
        self.parent = {name: name for name in graph.values}
        for node in graph.nodes:
            if OPS[node.op].shared:
                for i, name in enumerate(node.inputs):
                    if OPS[node.op].port(i).role == ACT:
                        self.parent[self.find(name)] = self.find(node.output)

    def find(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name


def assign(graph: Graph, ranges: Mapping[str, Range], recipe: Recipe, target: Target) -> Plan:
    """Encodings for every activation of a float graph.

    Raises Unsupported, with every node that the target cannot run as asked and the remedy for each."""
    precision, outputs = precisions(graph, recipe)
    wide = {name: WIDTHS[output] for name, output in outputs.items()}
    groups = Groups(graph)
    limits: dict[str, Range] = {}
    widths: dict[str, str] = {}
    for name, value in graph.values.items():
        if value.type.dtype != "f32" or not _is_activation(graph, groups, name, ranges):
            continue
        own = ranges[name] if not value.const else _data_range(value.data)
        root = groups.find(name)
        old = limits.get(root, own)
        limits[root] = (min(old[0], own[0]), max(old[1], own[1]))
        if not value.const:
            widths[root] = max(widths.get(root, "u8"), wide.get(name, "u8"), key=lambda w: RANGE[w][1])
    forced = _forced(graph, groups, target, widths)
    for root in {groups.find(name) for name, output in outputs.items() if output == "a8s"}:
        forced[root] = ("u8", symmetric(limits[root], 128))
    types = {}
    for name, value in graph.values.items():
        root = groups.find(name)
        if root in widths:
            dtype, q = forced.get(root) or (widths[root], affine(limits[root], widths[root]))
            types[name] = TensorType(value.type.shape, dtype, q)
    reads = _reads(graph, groups, precision, types, limits, target)
    _check(graph, precision, types, target)
    return Plan(types, precision, reads)


def bits(graph: Graph, recipe: Recipe, target: Target) -> dict[str, int]:
    """Bits of every activation under a recipe. Raises Unsupported as `assign` does, before anything is calibrated."""
    names = (*graph.inputs, *(node.output for node in graph.nodes))
    anything = {name: (-1.0, 1.0) for name in names if graph.type(name).dtype == "f32"}
    types = assign(graph, anything, recipe, target).types
    return {name: BITS[types[name].dtype] for name in anything}


def precisions(graph: Graph, recipe: Recipe) -> tuple[dict[str, Precision], dict[str, Width]]:
    """Per node its precision, and per value the width that the recipe asks of it."""
    default = Precision(recipe.precision)
    usual: Width = "a16" if default.activations == "u16" else "a8"
    precision, outputs = {}, dict.fromkeys(graph.inputs, usual)
    for node in (*(Node("input", (), name) for name in graph.inputs), *graph.nodes):
        chosen, output = default, usual
        for override in recipe.overrides:
            if _matches(override, node):
                chosen = Precision(override.precision) if override.precision else chosen
                output = override.output or output
        precision[node.output], outputs[node.output] = chosen, output
    return precision, outputs


def _data_range(data: np.ndarray | None) -> Range:
    assert data is not None
    return float(data.min()), float(data.max())


def _is_activation(graph: Graph, groups: Groups, name: str, ranges: Mapping[str, Range]) -> bool:
    """Node outputs, inputs, and constants that share an encoding with one of these."""
    if name in ranges:
        return True
    return graph.values[name].const and groups.find(name) != name


def _forced(graph: Graph, groups: Groups, target: Target, widths: Mapping[str, str]) -> dict[str, tuple[str, QParams]]:
    """Encodings that hardware dictates, by group."""
    forced: dict[str, tuple[str, QParams]] = {}
    for node in graph.nodes:
        root = groups.find(node.output)
        rule = target.encodings.get(node.op, {}).get("a8" if widths[root] == "u8" else "a16")
        if rule is not None:
            forced[root] = (widths[root], QParams(np.float32(1 / rule.steps), rule.zero))
    return forced


def _reads(
    graph: Graph,
    groups: Groups,
    precision: Mapping[str, Precision],
    types: dict[str, TensorType],
    limits: Mapping[str, Range],
    target: Target,
) -> dict[tuple[str, int], TensorType]:
    """Inputs that a node reads under another encoding than the value's own (a requantize node goes between)."""
    reads = {}
    for node in graph.nodes:
        if OPS[node.op].numerics != "dot":
            continue
        name = node.inputs[0]
        wanted = precision[node.output].activations
        if node.op != "matmul" and types[name].dtype != wanted:
            encoding = affine(limits[groups.find(name)], wanted)
            reads[node.output, 0] = TensorType(types[name].shape, wanted, encoding)
        if node.op == "matmul" and target.second_operand_zero is not None:
            name = node.inputs[1]
            encoding = symmetric(limits[groups.find(name)], target.second_operand_zero)
            if (types[name].dtype, types[name].q) != ("u8", encoding):
                reads[node.output, 1] = TensorType(types[name].shape, "u8", encoding)
    _push_up(graph, groups, types, reads)
    return reads


def _push_up(
    graph: Graph, groups: Groups, types: dict[str, TensorType], reads: dict[tuple[str, int], TensorType]
) -> None:
    """Where every reader outside a group wants one other encoding of it, the group itself takes that encoding, and
    no requantize node is needed."""
    wants: dict[str, list[TensorType | None]] = {}
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            inside = OPS[node.op].shared and OPS[node.op].port(i).role == ACT
            if name in types and not inside:
                wants.setdefault(groups.find(name), []).append(reads.get((node.output, i)))
    outside = {groups.find(name) for name in (*graph.outputs, *graph.inputs)}
    for root, asked in wants.items():
        first = asked[0]
        if root in outside or first is None:
            continue
        if any(t is None or (t.dtype, t.q) != (first.dtype, first.q) for t in asked):
            continue
        for name in types:
            if groups.find(name) == root:
                types[name] = TensorType(types[name].shape, first.dtype, first.q)
        for key in [key for key in reads if groups.find(_input(graph, key)) == root]:
            del reads[key]


def _input(graph: Graph, key: tuple[str, int]) -> str:
    return graph.producers()[key[0]].inputs[key[1]]


def _check(graph: Graph, precision: Mapping[str, Precision], types: Mapping[str, TensorType], target: Target) -> None:
    reasons = []
    for node in graph.nodes:
        where = node.source or node.output
        if node.op in target.unsupported:
            reasons.append(Reason(where, node.op, target.unsupported[node.op], "replace the op in the model"))
        name = precision[node.output].name
        if node.op in LAYERS and name not in target.precisions:
            remedy = f'set overrides for "{where}" to {nearest(name, target.precisions)}'
            offers = ", ".join(target.precisions)
            reasons.append(Reason(where, node.op, f"{name} is not offered (offers {offers})", remedy))
        rank = len(graph.type(node.output).shape)
        if rank > target.max_rank:
            why = f"rank {rank} exceeds max_rank {target.max_rank}"
            reasons.append(Reason(where, node.op, why, "fold the batch dimension"))
    if reasons:
        raise Unsupported(f"{graph.name} cannot run on {target.name} as asked", reasons)


def nearest(name: str, offered: tuple[str, ...]) -> str:
    """The offered precision most like ``name``: same activations first, then same weight bits, then no blocks."""
    asked = Precision(name)

    def distance(candidate: str) -> tuple[bool, bool, bool]:
        other = Precision(candidate)
        return (other.activations != asked.activations, other.weights != asked.weights, other.block != asked.block)

    return min(offered, key=distance)
