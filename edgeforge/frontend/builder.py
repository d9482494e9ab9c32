"""A float graph under construction: what the torch and the ONNX frontend share. Each method appends the nodes of one
idea of the frameworks (batch norm, padded pooling, attention ...) in terms of the op table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeforge.errors import InvalidGraph, InvalidInput, Reason, Unsupported
from edgeforge.ir.graph import Graph, Node, NodeView
from edgeforge.ir.types import TensorType, Value, is_finite
from edgeforge.ir.verify import verify
from edgeforge.ops import OPS
from edgeforge.passes.dead import remove_dead
from edgeforge.passes.moves import MASKED

#: Numbers beyond this are "minus infinity" in additive masks (frameworks use -inf or the dtype's lowest number).
UNBOUNDED = 1e9

#: Elements that one tensor may have (a damaged file can ask for any number).
LARGEST = 2**31


class Refused(Exception):
    """One node cannot be imported: why, and what the user can do."""

    def __init__(self, why: str, remedy: str = "replace the op in the model"):
        self.why, self.remedy = why, remedy
        super().__init__(why)


@dataclass(frozen=True)
class Act:
    """An activation: a value that depends on the graph's inputs."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class Const:
    """A constant with the name it will have in the graph; the same object is stored once. ``kind``: the type whose
    codes the file held in its place (q None: codes that no QParams can describe)."""

    data: np.ndarray
    name: str = ""
    kind: TensorType | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def rank(self) -> int:
        return self.data.ndim


Tensor = Act | Const
Operand = Act | Const | np.ndarray | float


def clean(name: str) -> str:
    """A name that the text form can hold: letters, digits, ``_``, ``.`` and ``-``."""
    return re.sub(r"[^\w.-]", "_", name.replace("/", ".").replace("::", "."), flags=re.ASCII).strip(".") or "value"


class Builder:
    """Nodes in order, values by name, and the reasons against the nodes that could not be imported.

    ``where`` is the module the current node comes from: new nodes carry it as their source, and new names begin
    with it."""

    def __init__(self, name: str):
        self.name = clean(name)
        self.where = ""
        self.inputs: list[str] = []
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.reasons: list[Reason] = []
        self.encodings: dict[str, TensorType] = {}
        self._stored: dict[Const, str] = {}
        self.transposed: dict[Const, Const] = {}
        self._not_finite: list[str] = []

    # ------------------------------------------------------------------------------------------------------ plumbing

    def unique(self, name: str) -> str:
        """``name``, or with the first free suffix."""
        name, number = clean(name), 0
        found = name
        while found in self.values:
            number += 1
            found = f"{name}_{number}"
        return found

    def input(self, name: str, shape: Sequence[int], dtype: str) -> Act:
        """A graph input of ``dtype`` f32 or i64."""
        name = self.unique(name)
        self.inputs.append(name)
        self.values[name] = Value(name, TensorType(tuple(shape), dtype))
        return Act(name, tuple(shape))

    def refuse(self, op: str, why: str, remedy: str) -> None:
        self.reasons.append(Reason(self.where or "(top)", op, why, remedy))

    def store(self, operand: Operand) -> str:
        """The value name of an operand; numbers become constants of shape [1]. NaN and infinities are remembered."""
        if isinstance(operand, Act):
            return operand.name
        const = operand if isinstance(operand, Const) else Const(np.atleast_1d(np.asarray(operand)))
        if const not in self._stored:
            data = np.ascontiguousarray(const.data, np.float32)
            name = self.unique(const.name or (f"{self.where}.constant" if self.where else "constant"))
            self.values[name] = Value(name, TensorType(data.shape), data)
            if not is_finite(data):
                self._not_finite.append(name)
            if const.kind is not None:
                self.encodings[name] = const.kind
            self._stored[const] = name
        return self._stored[const]

    def emit(self, op: str, *operands: Operand, **attrs: Any) -> Act:
        """Append a node; its shape comes from the op table. Raises Refused where the op's preconditions fail."""
        names = tuple(self.store(operand) for operand in operands)
        for name in names:
            if self.values[name].type.dtype != "f32" and not (op == "gather" and name == names[1]):
                raise Refused(
                    f"computes on {name}, which holds integers", "compute indices and masks outside the model"
                )
        output = self.unique(f"{self.where}.{op}" if self.where else op)
        node = Node(op, names, output, attrs, self.where)
        self.values[output] = Value(output, TensorType((), "f32"))
        try:
            graph = Graph(self.name, "float", (), (), (), self.values)
            shape = tuple(int(size) for size in OPS[op].infer(NodeView(graph, node)))
        except InvalidGraph as error:
            del self.values[output]
            raise Refused(str(error).partition(": ")[2]) from None
        if math.prod(shape) > LARGEST:
            raise Refused(f"makes {math.prod(shape)} elements", "phones hold fewer: use smaller tensors")
        self.values[output] = Value(output, TensorType(shape, "f32"))
        self.nodes.append(node)
        return Act(output, shape)

    def rename(self, act: Act, name: str) -> Act:
        """Give the value that the last node defines a better name."""
        if not self.nodes or self.nodes[-1].output != act.name:
            return act
        if clean(name) == act.name:
            return act
        name, last = self.unique(name), self.nodes[-1]
        self.nodes[-1] = Node(last.op, last.inputs, name, last.attrs, last.source)
        self.values[name] = Value(name, self.values.pop(act.name).type)
        return Act(name, act.shape)

    def producer(self, act: Act) -> Node | None:
        return next((node for node in reversed(self.nodes) if node.output == act.name), None)

    def poison(self, shape: Sequence[int]) -> Act:
        """Stands for a result that could not be imported, so that later nodes can still be judged."""
        name = self.unique("refused")
        self.values[name] = Value(name, TensorType(tuple(shape), "f32"))
        return Act(name, tuple(shape))

    def finish(self, outputs: Sequence[Any]) -> Graph:
        """The verified float graph. Raises Unsupported with every reason, InvalidInput on NaN in the weights or
        outputs that no input reaches."""
        if self.reasons:
            raise Unsupported(f"{self.name} cannot be imported", self.reasons)
        names = []
        for position, output in enumerate(outputs):
            if not isinstance(output, Act) or output.name in self.inputs:
                what = "an input" if isinstance(output, Act) else "a constant"
                raise InvalidInput(f"{self.name}: output {position} is {what} -> remove it from the model's outputs")
            names.append(output.name)
        if not names:
            raise InvalidInput(f"{self.name}: the model has no tensor output")
        graph = Graph(
            self.name, "float", tuple(self.inputs), tuple(self.nodes), tuple(dict.fromkeys(names)), self.values
        )
        graph = remove_dead(graph)
        bad = [name for name in self._not_finite if name in graph.values]
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise InvalidInput(f"{self.name}: NaN or infinity in {', '.join(bad[:5])}{more} -> repair the weights")
        return verify(graph)

    # --------------------------------------------------------------------------------------------------- element-wise

    def binary(self, op: str, a: Operand, b: Operand) -> Act:
        """add, sub, mul, with the neutral element left out where that keeps the shape."""
        if op == "add" and isinstance(a, Const):
            a, b = b, a
        if isinstance(b, Const | np.ndarray | float | int) and op in ("add", "sub", "mul"):
            data = b.data if isinstance(b, Const) else np.asarray(b)
            neutral = bool(np.all(data == (1 if op == "mul" else 0)))
            if neutral and isinstance(a, Act) and np.broadcast_shapes(a.shape, data.shape) == a.shape:
                return a
        return self.emit(op, a, b)

    def add(self, a: Operand, b: Operand) -> Act:
        return self.binary("add", a, b)

    def mul(self, a: Operand, b: Operand) -> Act:
        return self.binary("mul", a, b)

    def div(self, a: Operand, b: Operand) -> Act:
        """Division by a constant is a multiplication; else a times 1 / b."""
        if isinstance(b, Act):
            return self.mul(a, self.emit("reciprocal", b))
        data = b.data if isinstance(b, Const) else np.asarray(b)
        return self.mul(a, Const(np.atleast_1d(1.0 / data.astype(np.float64)).astype(np.float32)))

    def power(self, x: Act, exponent: float) -> Act:
        """x to a constant power in {1, 2, 3, 4, 1/2, -1/2, -1}."""
        if exponent in (1.0, 2.0, 3.0, 4.0):
            squared = self.emit("mul", x, x) if exponent > 1 else x
            return squared if exponent < 3 else self.emit("mul", squared, x if exponent == 3 else squared)
        op = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(exponent)
        if op is None:
            raise Refused(f"power {exponent}", "use a power of 1, 2, 3, 4, 1/2, -1/2 or -1")
        return self.emit(op, x)

    def clip(self, x: Act, low: float | None, high: float | None) -> Act:
        """Clamp; a missing bound is float32's."""
        if low == 0 and high is None:
            return self.emit("relu", x)
        top = float(np.finfo(np.float32).max)
        return self.emit(
            "clip", x, low_real=float(-top if low is None else low), high_real=float(top if high is None else high)
        )

    def masked(self, x: Act, mask: np.ndarray, value: float) -> Act:
        """``value`` where the constant ``mask`` is true, else x. Very negative values are added (attention)."""
        if value < -UNBOUNDED / 1e5:
            return self.add_mask(x, np.where(mask, -np.inf, 0.0))
        kept = self.mul(x, Const((~mask).astype(np.float32)))
        return self.add(kept, Const((mask * value).astype(np.float32)))

    def add_mask(self, x: Act, mask: np.ndarray) -> Act:
        """Attention scores plus an additive mask whose lowest numbers are cut at MASKED."""
        return self.add(x, Const(np.maximum(mask, MASKED).astype(np.float32)))

    def bounded(self, data: Const) -> Const:
        """A constant addend whose "minus infinity" (in additive attention masks) is cut at MASKED."""
        if data.data.dtype.kind == "f" and data.data.size and (data.data < -UNBOUNDED).any():
            return Const(np.where(data.data < -UNBOUNDED, np.float32(MASKED), data.data), data.name)
        return data

    # ------------------------------------------------------------------------------------------------- moving elements

    def reshape(self, x: Act, shape: Sequence[int]) -> Act:
        """``shape`` may hold one -1."""
        shape = [int(size) for size in shape]
        if -1 in shape:
            rest = math.prod(size for size in shape if size != -1)
            shape[shape.index(-1)] = math.prod(x.shape) // max(rest, 1)
        return x if tuple(shape) == x.shape else self.emit("reshape", x, shape=tuple(shape))

    def unsqueeze(self, x: Act, axis: int) -> Act:
        axis = axis % (x.rank + 1)
        return self.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))

    def transpose(self, x: Act, perm: Sequence[int]) -> Act:
        perm = tuple(int(axis) % x.rank for axis in perm)
        return x if perm == tuple(range(x.rank)) else self.emit("transpose", x, perm=perm)

    def swap(self, x: Act, a: int, b: int) -> Act:
        perm = list(range(x.rank))
        perm[a], perm[b] = perm[b], perm[a]
        return self.transpose(x, perm)

    def slice(self, x: Act, axis: int, start: int | None, end: int | None, step: int = 1) -> Act:
        """``x[start:end:step]`` along ``axis`` with Python's meaning of negative bounds; step > 0."""
        if step < 1:
            raise Refused(f"slice with step {step}", "reverse the weights instead")
        axis = axis % x.rank
        low, high, step = slice(start, end, step).indices(x.shape[axis])
        if (low, high, step) == (0, x.shape[axis], 1):
            return x
        return self.emit("slice", x, axis=axis, start=low, end=high, step=step)

    def select(self, x: Act, axis: int, index: int) -> Act:
        """``x[..., index, ...]``: the axis goes away."""
        axis, index = axis % x.rank, index % x.shape[axis % x.rank]
        return self.reshape(self.slice(x, axis, index, index + 1), (*x.shape[:axis], *x.shape[axis + 1 :]))

    def split(self, x: Act, sizes: Sequence[int], axis: int) -> list[Act]:
        ends = np.cumsum(sizes).tolist()
        return [self.slice(x, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def take(self, x: Act, axis: int, index: np.ndarray) -> Act:
        """Elements of ``x`` at constant indices [n] (or a number, whose axis goes away)."""
        axis = axis % x.rank
        index = np.where(index < 0, index + x.shape[axis], index).astype(np.int64)
        if index.ndim == 0:
            return self.select(x, axis, int(index))
        if index.ndim > 1 or index.size == 0:
            raise Refused(f"indices of shape {index.shape}", "index with one list of numbers")
        steps = np.unique(np.diff(index))
        if index.size == 1 or (steps.size == 1 and steps[0] > 0):
            return self.slice(x, axis, int(index[0]), int(index[-1]) + 1, int(steps[0]) if steps.size else 1)
        if index.size > 32:
            raise Refused(f"gathers {index.size} irregular positions of an activation", "use regular slices")
        return self.concat([self.slice(x, axis, int(i), int(i) + 1) for i in index], axis)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Act:
        parts = [part for part in parts if part.shape != (0,)]
        if len(parts) == 1 and isinstance(parts[0], Act):
            return parts[0]
        return self.emit("concat", *parts, axis=axis % parts[0].rank)

    def expand(self, x: Act, shape: Sequence[int]) -> Act:
        """Broadcast; -1 keeps a dimension."""
        shape = [int(size) for size in shape]
        x = self.reshape(x, (*[1] * (len(shape) - x.rank), *x.shape))
        shape = tuple(own if size == -1 else size for own, size in zip(x.shape, shape, strict=True))
        return x if shape == x.shape else self.emit("expand", x, shape=shape)

    def repeat_each(self, x: Act, count: int, axis: int) -> Act:
        """Every element ``count`` times along ``axis`` (the key and value heads of grouped-query attention)."""
        if count == 1:
            return x
        axis = axis % x.rank
        before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        wide = self.expand(self.unsqueeze(x, axis + 1), (*before, size, count, *after))
        return self.reshape(wide, (*before, size * count, *after))
