"""channels: where a float graph may be rescaled without changing its function, found by structure.

    y = linear(x, w); z = linear(relu(y), v)   =>   y = linear(x, w * s[:, None]); z = linear(relu(y), v / s)

Every channel that a constant makes (a row of a layer's weight, an entry of a norm's gain, a column of an
embedding) starts as a scale of its own. An array of signed scale numbers, shaped like the tensor, follows it through
the graph; numbers that must be equal (or inverse) are tied, and 0 stands for a scale that must stay 1:

    moves elements (reshape, transpose, slice, concat, expand)   the op itself runs on the array of numbers
    f(s x) = s f(x) for s > 0                                    numbers pass; those that meet in one result are tied
    (relu, neg, pools, means, resizing)
    add, sub                                                     numbers of both operands are tied (rotary embeddings
                                                                 tie the two channels they rotate)
    mul                                                          numbers of one operand pass, the other's stay 1
    matmul, both operands scaled                                 contracted channels are tied as inverses (q, k)
    matmul, one operand scaled                                   its numbers pass (attention weights times v)
    linear, convolutions                                         input channels are undone in the weight's columns
    concat with a constant (keys and values of a prefix)         every element of the constant is a new channel
    all else, and outputs                                        numbers become 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeforge.ir.graph import Graph, Node, NodeView
from edgeforge.ir.op import ACT, CONVOLUTIONS, LAYERS, OPS
from edgeforge.ir.types import row_blocks
from edgeforge.passes.constants import with_constants

NORMS = ("rms_norm", "layer_norm")


@dataclass(frozen=True)
class Group:
    """Scales ``first:last`` that the same nodes multiply (``up``), divide by (``down``), and undo in their weight's
    columns (``readers``); names of node outputs. ``values``: the activations that change with them."""

    first: int
    last: int
    up: tuple[str, ...]
    down: tuple[str, ...]
    readers: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join((*self.up, *(f"1/{n}" for n in self.down), "->", *self.readers))

    @property
    def span(self) -> slice:
        return slice(self.first, self.last)


@dataclass(frozen=True)
class Channels:
    """``count`` free scales. All numbers are signed and count from 1: +k is scaled by the k-th scale, -k by its
    inverse, 0 is not scaled.

    constants: (node output, input index) -> arrays of numbers, each broadcast to that constant, whose factors multiply.
    labels: value -> numbers, broadcast to its shape. contracted: matmuls whose operands' scales cancel."""

    count: int
    groups: tuple[Group, ...]
    constants: Mapping[tuple[str, int], tuple[np.ndarray, ...]]
    labels: Mapping[str, np.ndarray]
    contracted: tuple[str, ...]

    def rescale(self, graph: Graph, log_scale: np.ndarray) -> Graph:
        """``graph`` (in which these channels were found) with the scales exp(``log_scale``) folded into its constants;
        a constant that other nodes read too is copied."""
        nodes, scaled = graph.producers(), {}
        for (output, i), parts in self.constants.items():
            if any(part.any() for part in parts):
                data = graph.values[nodes[output].inputs[i]].data
                assert data is not None
                scaled[output, i] = _times(data, [part for part in parts if part.any()], log_scale)
        return with_constants(graph, scaled)


def _times(data: np.ndarray, parts: Sequence[np.ndarray], log_scale: np.ndarray) -> np.ndarray:
    """float32, multiplied in float64, a few rows at a time."""
    made = np.empty(data.shape, np.float32)
    for rows in row_blocks(data.shape):
        block = data[rows].astype(np.float64)
        for part in parts:
            block *= factors(part[rows] if len(part) > 1 else part, log_scale)
        made[rows] = block
    return made


def factors(numbers: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """The factor that each signed number stands for."""
    return np.exp(np.concatenate([[0.0], log_scale])[np.abs(numbers)] * np.sign(numbers))


class _Ties:
    """Union-find over scales with a sign: two of them are equal, or inverse, or both 1."""

    def __init__(self) -> None:
        self.parent = [0]

    def new(self, count: int) -> np.ndarray:
        first = len(self.parent)
        self.parent += range(first, first + count)
        return np.arange(first, first + count, dtype=np.int32)

    def find(self, number: int) -> int:
        """The signed number that stands for ``number``; 0 when its scale is fixed."""
        sign = 1
        while True:
            if number < 0:
                number, sign = -number, -sign
            above = self.parent[number]
            if above == number:
                return sign * number
            self.parent[number] = self._above(above)
            number = self.parent[number]

    def _above(self, number: int) -> int:
        up = self.parent[abs(number)]
        return up if number >= 0 else -up

    def resolve(self, numbers: np.ndarray) -> np.ndarray:
        known, where = np.unique(numbers, return_inverse=True)
        return np.array([self.find(int(n)) for n in known], np.int32)[where].reshape(numbers.shape)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Make ``a`` and ``b``, broadcast against each other, equal."""
        a, b = np.broadcast_arrays(a, b)
        for x, y in np.unique(np.stack([a.ravel(), b.ravel()], 1), axis=0):
            x, y = self.find(int(x)), self.find(int(y))
            if x == -y:
                self.parent[abs(x)] = 0
            elif x != y:
                low, high = sorted((x, y), key=abs)
                self.parent[abs(high)] = low if high > 0 else -low

    def along(self, numbers: np.ndarray, *axes: int) -> np.ndarray:
        """Tie what differs only in position along ``axes``, and keep one of each (axes of size 1)."""
        for axis in axes:
            first = numbers.take([0], axis)
            self.tie(numbers, first)
            numbers = first
        return numbers


def _thin(numbers: np.ndarray) -> np.ndarray:
    """The smallest array that broadcasts to the same."""
    for axis in range(numbers.ndim):
        first = numbers.take([0], axis)
        if numbers.shape[axis] > 1 and (numbers == first).all():
            numbers = first
    return numbers


class _Walk:
    """The graph, node by node, with what is known of every value's scales."""

    def __init__(self, graph: Graph):
        self.graph, self.ties = graph, _Ties()
        self.labels: dict[str, np.ndarray] = {}
        self.constants: dict[tuple[str, int], tuple[np.ndarray, ...]] = {}
        self.contracted: list[str] = []
        self.readers: dict[str, list[str]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node.op)

    def of(self, name: str) -> np.ndarray:
        """Numbers of a value, thin; inputs and constants have scale 1."""
        known = self.labels.get(name)
        return (
            np.zeros((1,) * len(self.graph.type(name).shape), np.int32) if known is None else self.ties.resolve(known)
        )

    def full(self, name: str) -> np.ndarray:
        return np.broadcast_to(self.of(name), self.graph.type(name).shape)

    def fix(self, numbers: np.ndarray) -> np.ndarray:
        self.ties.tie(numbers, np.zeros(1, np.int32))
        return np.zeros_like(numbers)

    def shared(self, node: Node, i: int) -> bool:
        """Whether another node of the same kind reads this constant: its codes are stored once, so they stay equal."""
        return sum(op == node.op or (op in LAYERS and node.op in LAYERS) for op in self.readers[node.inputs[i]]) > 1

    def step(self, node: Node) -> None:
        n = self.graph.view(node)
        numbers = RULES.get(node.op, _fixed)(self, n)
        if "clamp" in node.attrs and not _homogeneous(*node.attrs["clamp"]):
            numbers = self.fix(numbers)
        self.labels[node.output] = _thin(np.broadcast_to(numbers, n.out.shape))


def _homogeneous(low: float, high: float) -> bool:
    return low in (0.0, float("-inf")) and high == float("inf")


def _fixed(walk: _Walk, n: NodeView) -> np.ndarray:
    for i, name in enumerate(n.node.inputs):
        if OPS[n.node.op].port(i).role == ACT:
            walk.fix(walk.of(name))
    return np.zeros(1, np.int32)


def _move(walk: _Walk, n: NodeView) -> np.ndarray:
    return OPS[n.node.op].integer(None, n, *(walk.full(name) for name in n.node.inputs))


def _join(walk: _Walk, n: NodeView) -> np.ndarray:
    """concat: a constant of its own follows the scales of what it is joined with."""
    parts = []
    for i, name in enumerate(n.node.inputs):
        parts.append(walk.full(name))
        if walk.graph.values[name].const and not walk.shared(n.node, i):
            parts[i] = walk.ties.new(n.type(i).size).reshape(n.shape(i))
            walk.constants[n.node.output, i] = (parts[i],)
    return OPS["concat"].integer(None, n, *parts)


def _pass(walk: _Walk, n: NodeView) -> np.ndarray:
    return walk.of(n.node.inputs[0])


def _clip(walk: _Walk, n: NodeView) -> np.ndarray:
    return (_pass if _homogeneous(n["low_real"], n["high_real"]) else _fixed)(walk, n)


def _spatial(walk: _Walk, n: NodeView) -> np.ndarray:
    """Padding and windows over height and width: a padded 0 is 0 at any scale."""
    return walk.ties.along(walk.of(n.node.inputs[0]), 2, 3)


def _mean(walk: _Walk, n: NodeView) -> np.ndarray:
    numbers = walk.ties.along(walk.of(n.node.inputs[0]), *n["axes"])
    return numbers if n["keepdims"] else numbers.squeeze(tuple(n["axes"]))


def _sum(walk: _Walk, n: NodeView) -> np.ndarray:
    a, b = (walk.of(name) for name in n.node.inputs)
    walk.ties.tie(a, b)
    return walk.ties.resolve(np.broadcast_arrays(a, b)[0])


def _product(walk: _Walk, n: NodeView) -> np.ndarray:
    """Of two scaled operands the one with more readers is fixed: a table of the rotary embedding serves all layers."""
    rare, common = sorted(n.node.inputs, key=lambda name: len(walk.readers[name]))
    if walk.of(rare).any():
        walk.fix(walk.of(common))
    return walk.of(rare) if walk.of(rare).any() else walk.of(common)


def _matmul(walk: _Walk, n: NodeView) -> np.ndarray:
    a, b = (walk.of(name) for name in n.node.inputs)
    if not a.any():
        return walk.ties.along(b, -2)
    if not b.any():
        return walk.ties.along(a, -1)
    walk.contracted.append(n.node.output)
    walk.ties.tie(walk.ties.along(a, -2).swapaxes(-1, -2), -walk.ties.along(b, -1))
    return np.zeros(1, np.int32)


def _dot(walk: _Walk, n: NodeView) -> np.ndarray:
    """Layers: read the input's channels, make new ones."""
    axis = 1 if n.node.op in CONVOLUTIONS else len(n.shape(0)) - 1
    columns = walk.of(n.node.inputs[0])
    columns = walk.ties.along(columns, *(d for d in range(columns.ndim) if d != axis)).ravel()
    columns = np.broadcast_to(columns, n.shape(0)[axis])
    out, depth, *kernel = n.shape(1)
    if walk.shared(n.node, 1):
        rows = np.zeros(out, np.int32)
        walk.fix(columns)
    else:
        rows = walk.ties.new(out)
    groups = len(columns) // depth
    by_row = columns.reshape(groups, depth)
    if groups > 1:
        by_row = by_row.repeat(out // groups, 0)
    shape = (1,) * len(kernel)
    walk.constants[n.node.output, 1] = (rows.reshape(-1, 1, *shape), -by_row.reshape(-1, depth, *shape))
    if n.arity == 3:
        walk.constants[n.node.output, 2] = (rows,)
    return rows.reshape([-1 if d == axis else 1 for d in range(len(n.out.shape))])


def _norm(walk: _Walk, n: NodeView) -> np.ndarray:
    """rms_norm and layer_norm: the result is scaled by gain (and bias)."""
    walk.fix(walk.of(n.node.inputs[0]))
    rows = walk.ties.new(n.shape(1)[0])
    for i in range(1, n.arity):
        walk.constants[n.node.output, i] = (rows,)
    return rows


def _table(walk: _Walk, n: NodeView) -> np.ndarray:
    """gather: every column of the table is a channel."""
    rows = np.zeros(n.shape(0)[1], np.int32) if walk.shared(n.node, 0) else walk.ties.new(n.shape(0)[1])
    walk.constants[n.node.output, 0] = (rows[None],)
    return rows


RULES: dict[str, Callable[[_Walk, NodeView], np.ndarray]] = {
    **dict.fromkeys(("reshape", "transpose", "slice", "expand"), _move),
    **dict.fromkeys(("relu", "neg"), _pass),
    **dict.fromkeys(("pad", "max_pool", "avg_pool", "resize_nearest", "resize_bilinear"), _spatial),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(LAYERS, _dot),
    **dict.fromkeys(NORMS, _norm),
    "concat": _join,
    "clip": _clip,
    "reduce_mean": _mean,
    "mul": _product,
    "matmul": _matmul,
    "gather": _table,
}


def find_channels(graph: Graph) -> Channels:
    """Every free scale of a float graph, and what it multiplies."""
    assert graph.level == "float", graph.level
    walk = _Walk(graph)
    for node in graph.nodes:
        walk.step(node)
    for name in graph.outputs:
        walk.fix(walk.of(name))
    return _Numbering(walk).finish()


@dataclass
class _Scale:
    """One free scale: its sign among the tied ones, and where it occurs (node output, "up" | "down" | "read")."""

    sign: int
    uses: dict[tuple[str, str], None] = field(default_factory=dict)


class _Numbering:
    """Renumbers the tied scales so that those of one group are neighbors, each with + where it first occurs."""

    def __init__(self, walk: _Walk):
        self.walk = walk
        self.scales: dict[int, _Scale] = {}
        for (output, i), parts in walk.constants.items():
            for part, columns in zip(parts, (False, True), strict=False):
                for number in np.unique(walk.ties.resolve(part)):
                    if number:
                        self._use(int(number), output, i, columns)

    def _use(self, number: int, output: str, i: int, columns: bool) -> None:
        sign = 1 if number > 0 else -1
        scale = self.scales.setdefault(abs(number), _Scale(-sign if columns else sign))
        scale.uses[output, "read" if columns else "up" if sign == scale.sign else "down"] = None

    def finish(self) -> Channels:
        alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for root, scale in self.scales.items():
            alike.setdefault(tuple(scale.uses), []).append(root)
        new = np.zeros(len(self.walk.ties.parent), np.int32)
        spans, last = [], 0
        for uses, roots in alike.items():
            first, last = last, last + len(roots)
            new[roots] = np.arange(first + 1, last + 1) * [self.scales[root].sign for root in roots]
            spans.append((first, last, uses))

        def renumber(numbers: np.ndarray) -> np.ndarray:
            numbers = self.walk.ties.resolve(numbers)
            return new[np.abs(numbers)] * np.sign(numbers)

        labels = {name: renumber(numbers) for name, numbers in self.walk.labels.items()}
        labels = {name: numbers for name, numbers in labels.items() if numbers.any()}
        constants = {key: tuple(map(renumber, parts)) for key, parts in self.walk.constants.items()}
        groups = tuple(_group(first, last, uses, labels) for first, last, uses in spans)
        contracted = tuple(name for name in self.walk.contracted if self._cancels(name, labels))
        return Channels(last, groups, constants, labels, contracted)

    def _cancels(self, name: str, labels: Mapping[str, np.ndarray]) -> bool:
        return any(n.output == name and n.inputs[0] in labels for n in self.walk.graph.nodes)


def _group(first: int, last: int, uses: tuple[tuple[str, str], ...], labels: Mapping[str, np.ndarray]) -> Group:
    by_kind = {kind: tuple(output for output, k in uses if k == kind) for kind in ("up", "down", "read")}
    values = []
    for name, numbers in labels.items():
        found = np.abs(numbers)
        if ((found > first) & (found <= last)).any():
            values.append(name)
    return Group(first, last, by_kind["up"], by_kind["down"], by_kind["read"], tuple(values))
