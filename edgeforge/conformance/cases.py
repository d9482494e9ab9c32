"""Cases: one-op integer graphs with random encodings and inputs, reproducible from (seed, op, precision, number).

What an op means is not known here: input encodings follow from its ports, the output's from its float reference."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeforge.conformance.samplers import Rng, Sample, sampler
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import ACT, BIAS, INDEX, OPS, WEIGHT
from edgeforge.ir.types import NUMPY, RANGE, QParams, TensorType, Value
from edgeforge.quantize.assign import affine
from edgeforge.quantize.weights import quantize_weight
from edgeforge.recipe import Precision
from edgeforge.target import Target

#: Precisions of ops with weights, of a linear (block-wise too), and of all others (whose weight bits say nothing).
WEIGHTED = ("w8a8", "w8a16", "w4a8", "w4a16")
BLOCKWISE = ("w4a8-b32", "w4a16-b32")
PLAIN = ("w8a8", "w8a16")
STYLES = ("generic", "decimal", "dyadic")
#: Every fourth case stands between two ReLUs.
CHAIN = 4


@dataclass(frozen=True)
class Case:
    """``graph`` carries no rounding constants (they depend on the runtime); ``feeds`` are codes by input name."""

    op: str
    precision: str
    number: int
    graph: Graph
    feeds: Mapping[str, np.ndarray]

    @property
    def row(self) -> tuple[str, str]:
        return self.op, self.precision


def precisions(op: str) -> tuple[str, ...]:
    if all(port.role != WEIGHT for port in OPS[op].ports):
        return PLAIN
    return WEIGHTED + (BLOCKWISE if op == "linear" else ())


def make_case(op: str, precision: str, number: int, seed: int, target: Target | None = None) -> Case:
    """target: the one whose forced encodings the graph must have (None: encodings are free)."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{op} {precision}".encode()), number])
    draw = sampler(OPS[op])
    assert draw is not None, f"op {op} has no sampler"
    wanted = Precision(precision)
    sample = draw(rng, wanted.activations, wanted.block)
    return _Maker(op, sample, wanted, rng, target).case(number)


class _Maker:
    """One graph under construction."""

    def __init__(self, op: str, sample: Sample, precision: Precision, rng: Rng, target: Target | None):
        self.op, self.sample, self.precision, self.rng, self.target = OPS[op], sample, precision, rng, target
        self.style = str(rng.choice(STYLES))
        self.values: dict[str, Value] = {}
        self.inputs: list[str] = []
        self.feeds: dict[str, np.ndarray] = {}

    def case(self, number: int) -> Case:
        names = [self.operand(i, shape) for i, shape in enumerate(self.sample.shapes)]
        node = Node(self.op.name, tuple(names), "y", self.sample.attrs)
        self.values["y"] = Value("y", self.output_type(node))
        nodes, output = [node], "y"
        if number % CHAIN == CHAIN - 1:
            nodes, output = self.chained(node)
        graph = Graph(self.op.name, "integer", tuple(self.inputs), tuple(nodes), (output,), self.values)
        return Case(self.op.name, self.precision.name, number, graph, self.feeds)

    # ---------------------------------------------------------------------------------------------------- operands

    def operand(self, i: int, shape: tuple[int, ...]) -> str:
        port = self.op.port(i)
        name = f"{port.name}{i}" if port.variadic else port.name
        if port.role == WEIGHT:
            self.values[name] = self.weight(name, shape)
        elif port.role == BIAS:
            self.values[name] = self.bias(name, shape)
        elif port.role == INDEX:
            rows = self.sample.shapes[0][0]
            self.values[name] = Value(name, TensorType(shape, "i64"))
            self.feed(name, self.rng.integers(0, rows, shape))
        else:
            kind = TensorType(shape, self.dtype(i), self.encoding(i))
            codes = self.codes(kind)
            self.values[name] = Value(name, kind, codes if port.const else None)
            if not port.const:
                self.feed(name, codes)
        return name

    def feed(self, name: str, codes: np.ndarray) -> None:
        self.inputs.append(name)
        self.feeds[name] = codes

    def dtype(self, i: int) -> str:
        if self.sample.dtypes is not None:
            return self.sample.dtypes[i]
        return "u8" if self.second_operand(i) else self.precision.activations

    def second_operand(self, i: int) -> bool:
        """The activation that takes the place of weights, where the target prescribes its encoding."""
        forced = self.target is not None and self.target.second_operand_zero is not None
        return forced and i == 1 and self.op.numerics == "dot" and self.op.port(1).role == ACT

    def encoding(self, i: int) -> QParams:
        first = next((v.type.q for v in self.values.values() if v.type.q is not None), None)
        if self.op.shared and first is not None:
            return first
        dtype = self.dtype(i)
        if i == 0 and self.sample.domain is not None:
            return self.styled(affine(self.sample.domain, dtype), dtype, free_zero=False)
        reach = 10.0 ** self.rng.uniform(-1, 1.3)
        low = -reach * self.rng.choice([1.0, self.rng.random(), 0.0])
        q = self.styled(affine((low, reach), dtype), dtype)
        if self.second_operand(i):
            assert self.target is not None and self.target.second_operand_zero is not None
            return QParams(q.scale, self.target.second_operand_zero)
        return q

    def styled(self, q: QParams, dtype: str, free_zero: bool = True) -> QParams:
        """Decimal and dyadic scales make ties; zero points at the ends and in the middle are special cases."""
        scale, top = float(q.scale), RANGE[dtype][1]
        if self.style == "decimal":
            scale = float(f"{scale:.1g}")
        if self.style == "dyadic":
            scale = 2.0 ** round(np.log2(scale))
        zero = int(self.rng.choice([0, top, (top + 1) // 2])) if free_zero and self.rng.random() < 0.4 else q.zero
        return QParams(np.float32(scale), zero)

    def codes(self, kind: TensorType) -> np.ndarray:
        """Uniform, normal about the zero point, or the extremes; every code where there is room."""
        assert kind.q is not None
        top, size = RANGE[kind.dtype][1], kind.size
        style = self.rng.choice(["uniform", "uniform", "normal", "extremes"])
        if style == "uniform":
            codes = self.rng.integers(0, top + 1, size)
            if size > top:
                codes[: top + 1] = np.arange(top + 1)
                self.rng.shuffle(codes)
        elif style == "normal":
            codes = np.rint(self.rng.normal(kind.q.zero, top / 6, size))
        else:
            codes = self.rng.choice([0, 1, kind.q.zero, top - 1, top], size)
        return np.clip(codes, 0, top).astype(NUMPY[kind.dtype]).reshape(kind.shape)

    def weight(self, name: str, shape: tuple[int, ...]) -> Value:
        real = self.rng.normal(0, 1, shape) * self.rng.uniform(0.2, 1, (shape[0],) + (1,) * (len(shape) - 1))
        real = (real / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        made = quantize_weight(name, real, self.precision.weights, self.precision.block, "minmax")
        q = made.type.q
        assert q is not None and made.data is not None
        if self.style == "generic" or q.block is not None:
            return made
        if self.style == "dyadic":
            scale = np.exp2(np.rint(np.log2(q.scale))).astype(np.float32)
        else:
            scale = np.array([float(f"{s:.1g}") for s in q.scale], np.float32)
        return Value(name, TensorType(shape, made.type.dtype, QParams(scale, 0, axis=0)), made.data)

    def bias(self, name: str, shape: tuple[int, ...]) -> Value:
        """At the scale of the products, about as large as they are."""
        from edgeforge.ir.fixed import channel_scale

        x, w = (value.type.q for value in list(self.values.values())[:2])
        assert x is not None and w is not None
        scale = np.broadcast_to(x.scale * channel_scale(w).astype(np.float32), shape).copy()
        q = QParams(scale, 0, axis=0)
        return Value(name, TensorType(shape, "i32", q), q.quantize(self.rng.normal(0, 1, shape), "i32"))

    # ------------------------------------------------------------------------------------------------------ output

    def output_type(self, node: Node) -> TensorType:
        """The float reference's range, at times cut (saturation) or widened; a forced encoding where there is one."""
        graph = Graph("probe", "integer", tuple(self.inputs), (node,), (), self.values)
        shape = self.op.infer(graph.view(node))
        dtype = self.precision.activations if self.sample.dtypes is None else self.sample.dtypes[-1]
        first = self.values[node.inputs[0]].type
        if self.op.shared:
            return TensorType(shape, dtype, first.q)
        if self.target is not None:
            forced = self.target.encodings.get(node.op, {}).get("a8" if dtype == "u8" else "a16")
            if forced is not None:
                return TensorType(shape, dtype, QParams(np.float32(1 / forced.steps), forced.zero))
        real = self.reference(graph, node)
        low, high = (
            float(x) for x in np.quantile(real, self.rng.choice([0.0, 0.02, 0.1]) * np.array([1, -1]) + [0, 1])
        )
        widen = self.rng.choice([1.0, 1.0, 1.7])
        q = affine((low * widen, high * widen if high - low > 1e-6 else low + 1.0), dtype)
        return TensorType(shape, dtype, self.styled(q, dtype))

    def reference(self, graph: Graph, node: Node) -> np.ndarray:
        """Finite real results of the op on this case's inputs, in float64: the last bit of a float32 sum depends on the
        number of threads, and with it the scale, so that one seed would make other cases elsewhere."""
        tensors = []
        for name in node.inputs:
            value = self.values[name]
            codes = value.data if value.data is not None else self.feeds[name]
            real = codes if value.type.q is None else value.type.q.dequantize(codes).astype(np.float64)
            tensors.append(torch.from_numpy(np.ascontiguousarray(real)))
        real = OPS[node.op].torch(torch, graph.view(node), *tensors).numpy()
        real = real[np.isfinite(real) & (np.abs(real) < 1e6)]
        return real if real.size else np.zeros(1)

    def chained(self, node: Node) -> tuple[list[Node], str]:
        """x -> op -> y   =>   x -> relu -> op -> y -> relu -> z, without change of encodings"""
        before = []
        for name in list(self.inputs):
            value = self.values[name]
            if value.type.q is None:
                continue
            made = f"{name}.relu"
            self.values[made] = Value(made, value.type)
            before.append(Node("relu", (name,), made))
        renamed = {n.inputs[0]: n.output for n in before}
        node = Node(node.op, tuple(renamed.get(name, name) for name in node.inputs), node.output, node.attrs)
        self.values["z"] = Value("z", self.values["y"].type)
        return [*before, node, Node("relu", ("y",), "z")], "z"


def union(cases: Sequence[Case]) -> tuple[Graph, dict[str, np.ndarray]]:
    """Many cases side by side in one graph; every value name is prefixed by `prefix`."""
    values: dict[str, Value] = {}
    nodes, inputs, outputs, feeds = [], [], [], {}
    for case in cases:
        mark = prefix(case)
        for value in case.graph.values.values():
            values[mark + value.name] = Value(mark + value.name, value.type, value.data)
        for node in case.graph.nodes:
            names = tuple(mark + name for name in node.inputs)
            nodes.append(Node(node.op, names, mark + node.output, node.attrs, node.source, node.rule, node.fixed))
        inputs += [mark + name for name in case.graph.inputs]
        outputs += [mark + name for name in case.graph.outputs]
        feeds |= {mark + name: codes for name, codes in case.feeds.items()}
    return Graph("cases", "integer", tuple(inputs), tuple(nodes), tuple(outputs), values), feeds


def prefix(case: Case) -> str:
    return f"{case.op}.{case.precision}.{case.number}."
