"""The TOSA dialect: integer Graph -> TOSA graph, as the JSON form of its flatbuffer (schema ``tosa.fbs``, version 1.0).

Codes are signed: uint8 codes and their zero points - 128, uint16 codes - 32768 (these only move: TOSA's 16-bit
arithmetic has no zero points). Images are NHWC between two TRANSPOSEs. A node's result is named as its value; what it
is made of, ``<value>/<number>``. Multipliers and shifts are those in the node (`edgeforge.ir.rules.tosa`).

RESCALE wants sums below ``2**(shift - 1)``: the reference model stops at larger ones, which only encodings reach whose
outputs are saturated a million times over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from edgeforge.errors import Reason, Unsupported
from edgeforge.ir.graph import Graph, Node, NodeView
from edgeforge.ir.op import ACT, INDEX, OPS
from edgeforge.ir.rules.tosa import scale_32
from edgeforge.ir.types import NUMPY, RANGE, QParams, TensorType, pack_int4

VERSION = {"_major": 1, "_minor": 0, "_patch": 0, "_draft": False}
#: dtype of the graph -> TOSA's, and what is subtracted from a code.
STORED = {
    "u8": ("INT8", 128),
    "u16": ("INT16", 32768),
    "i64": ("INT32", 0),
    "i32": ("INT32", 0),
    "i8": ("INT8", 0),
    "i4": ("INT4", 0),
}
#: RESIZE takes no finer places.
MOST_UNITS = 2048
ELEMENT = {"INT4": np.int8, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32}


def to_stored(codes: np.ndarray, dtype: str) -> np.ndarray:
    """Codes of the graph as TOSA holds them."""
    kind, offset = STORED[dtype]
    return (codes.astype(np.int64) - offset).astype(ELEMENT[kind])


def from_stored(stored: np.ndarray, dtype: str) -> np.ndarray:
    """TOSA's elements as codes of the graph."""
    return (stored.astype(np.int64) + STORED[dtype][1]).astype(NUMPY[dtype])


class _Emitter:
    """The ``g`` of the op table's ``tosa`` column. ``g(op, inputs, shape, dtype, **attributes)`` adds an operator and
    returns the name of its result; what TOSA cannot hold is refused with Unsupported."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.operators: list[dict[str, Any]] = []
        self.tensors: dict[str, dict[str, Any]] = {}
        self.shapes: list[dict[str, Any]] = []
        self.node = graph.nodes[0]
        self.count = 0
        for name in graph.inputs:
            self.declare(name)

    def declare(self, name: str) -> None:
        """A tensor for a value of the graph."""
        kind = self.graph.type(name)
        self.tensor(name, kind.shape, STORED[kind.dtype][0])

    def emit(self, node: Node) -> None:
        self.node, self.count = node, 0
        op = OPS[node.op]
        if op.tosa is None:
            self.refuse("TOSA has no such operation", "run it on another backend")
        for i, name in enumerate(node.inputs):
            value = self.graph.values[name]
            if value.data is not None and op.port(i).role in (ACT, INDEX) and name not in self.tensors:
                self.constant(to_stored(value.data, value.type.dtype), STORED[value.type.dtype][0], name)
        result = op.tosa(self, self.graph.view(node), *node.inputs)
        assert self.operators[-1]["outputs"] == [result], node.op
        self.operators[-1]["outputs"] = [node.output]
        self.tensors[node.output] = {**self.tensors.pop(result), "name": node.output}

    def __call__(
        self, op: str, inputs: Sequence[str], shape: Sequence[int], dtype: str = "INT8", **attributes: Any
    ) -> str:
        result = self.tensor(self.fresh(), shape, dtype)
        return self.operator(op, inputs, result, **attributes)

    def operator(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        words = {"MATMUL": "MatMul"}.get(op) or "".join(word.capitalize() for word in op.split("_"))
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in attributes.items()}
        made = {"op": op, "attribute_type": f"{words}Attribute", "attribute": plain}
        self.operators.append({**made, "inputs": list(inputs), "outputs": [output]})
        return output

    def tensor(self, name: str, shape: Sequence[int], dtype: str, **more: Any) -> str:
        self.tensors[name] = {"name": name, "shape": [int(size) for size in shape], "type": dtype, **more}
        return name

    def fresh(self) -> str:
        self.count += 1
        return f"{self.node.output}/{self.count}"

    def refuse(self, why: str, remedy: str) -> NoReturn:
        reason = Reason(self.node.source or self.node.output, self.node.op, why, remedy)
        raise Unsupported("TOSA has no counterpart", [reason])

    # ------------------------------------------------------------------------------------------------------- constants

    def constant(self, data: np.ndarray | Sequence[int], dtype: str, name: str = "") -> str:
        array = np.ascontiguousarray(data, ELEMENT[dtype])
        raw = pack_int4(array) if dtype == "INT4" else array.tobytes()
        return self.operator("CONST", (), self.tensor(name or self.fresh(), array.shape, dtype, data=list(raw)))

    def numbers(self, numbers: Sequence[int]) -> str:
        """A constant of type shape."""
        name, data = self.fresh(), list(np.asarray(numbers, np.int64).tobytes())
        self.shapes.append({"name": name, "rank": len(numbers), "data": data})
        return self.operator("CONST_SHAPE", (), name)

    def zero(self, kind: TensorType) -> str:
        """The code of real 0."""
        assert kind.q is not None
        dtype, offset = STORED[kind.dtype]
        return self.constant([kind.q.zero - offset], dtype)

    def zero_point(self, kind: TensorType) -> str:
        """As arithmetic takes it."""
        self.narrow(kind)
        return self.zero(kind)

    def narrow(self, *kinds: TensorType) -> None:
        """Refuse 16-bit codes, which arithmetic is about to read or to write."""
        if any(kind.dtype == "u16" for kind in kinds):
            why = "16-bit codes have no zero point in TOSA's arithmetic, and its tables of them interpolate"
            self.refuse(why, "use 8-bit activations")

    # -------------------------------------------------------------------------------------------------------- movement

    def shape(self, x: str) -> list[int]:
        return self.tensors[x]["shape"]

    def move(self, op: str, x: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> str:
        """An operator whose result has the dtype of x."""
        return self(op, [x, *inputs], shape, self.tensors[x]["type"], **attributes)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        return self.move("RESHAPE", x, [self.numbers(shape)], shape)

    def transpose(self, x: str, perm: Sequence[int]) -> str:
        return self.move("TRANSPOSE", x, [], [self.shape(x)[axis] for axis in perm], perms=list(perm))

    def nhwc(self, x: str) -> str:
        return self.transpose(x, (0, 2, 3, 1))

    def nchw(self, x: str) -> str:
        return self.transpose(x, (0, 3, 1, 2))

    def slice(self, x: str, start: Sequence[int], size: Sequence[int]) -> str:
        return self.move("SLICE", x, [self.numbers(start), self.numbers(size)], size)

    def pad(self, x: str, widths: Sequence[int], kind: TensorType) -> str:
        """Real 0 before and after each dimension; ``widths`` in pairs."""
        shape = [size + widths[2 * i] + widths[2 * i + 1] for i, size in enumerate(self.shape(x))]
        return self.move("PAD", x, [self.numbers(widths), self.zero(kind)], shape)

    def of_rank(self, x: str, rank: int) -> str:
        """Leading dimensions of size 1 added: TOSA's operands have one rank."""
        shape = self.shape(x)
        return x if len(shape) == rank else self.reshape(x, [1] * (rank - len(shape)) + shape)

    def tile(self, x: str, shape: Sequence[int]) -> str:
        """Dimensions of size 1 repeated to those of ``shape``."""
        x = self.of_rank(x, len(shape))
        times = [size // own for size, own in zip(shape, self.shape(x), strict=True)]
        return self.move("TILE", x, [self.numbers(times)], shape)

    def fitted(self, x: str, reach: Sequence[int], stride: Sequence[int], pads: Sequence[int]) -> tuple[str, list[int]]:
        """x [N, H, W, C] and TOSA's padding (top, bottom, left, right) for windows of ``reach``, without the edge that
        no window covers: TOSA wants the last one to end where the image does. pads: (top, left, bottom, right)."""
        size, padding = list(self.shape(x)), []
        for axis in (0, 1):
            before, after = pads[axis], pads[axis + 2]
            surplus = (size[axis + 1] + before + after - reach[axis]) % stride[axis]
            size[axis + 1] -= max(surplus - after, 0)
            padding += [before, max(after - surplus, 0)]
        return (x if size == self.shape(x) else self.slice(x, [0] * 4, size)), padding

    # ------------------------------------------------------------------------------------------------------ arithmetic

    def rescale(self, x: str, mult: Any, shift: Any, kind: TensorType | None, to: TensorType | None) -> str:
        """RESCALE, with multipliers along the last dimension where there are several. kind: of the codes in x; to: of
        the codes wanted; None: int32 sums."""
        mult, shift = np.asarray(mult).reshape(-1), np.asarray(shift).reshape(-1)
        zeros = [self.constant([0], "INT32") if t is None else self.zero_point(t) for t in (kind, to)]
        constants = [self.constant(mult, "INT32"), self.constant(shift, "INT8"), *zeros]
        dtype = "INT32" if to is None else STORED[to.dtype][0]
        how = {"scale32": True, "rounding_mode": "SINGLE_ROUND", "per_channel": mult.size > 1}
        signed = {"input_unsigned": False, "output_unsigned": False}
        return self("RESCALE", [x, *constants], self.shape(x), dtype, **how, **signed)

    def centered(self, x: str, kind: TensorType) -> str:
        """int32 of code - zero point."""
        return self.rescale(x, *scale_32(1.0), kind, None)

    def finish(self, n: NodeView, acc: str) -> str:
        """The output codes of int32 sums: the node's RESCALE and its fused activation."""
        codes = self.rescale(acc, n.fixed["mult"], n.fixed["shift"], None, n.out)
        limits = (n.fixed["low"], n.fixed["high"])
        return codes if limits == RANGE[n.out.dtype] else self.clamp(codes, limits, n.out.dtype)

    def clamp(self, x: str, limits: tuple[int, int], dtype: str) -> str:
        low, high = (list(to_stored(np.array([code]), dtype).tobytes()) for code in limits)
        return self.move("CLAMP", x, [], self.shape(x), min_val=low, max_val=high, nan_mode="PROPAGATE")

    def function(self, n: NodeView, x: str) -> str:
        """A function of one operand: the table in the node, or its RESCALE."""
        self.narrow(n.type(0), n.out)
        if "mult" in n.fixed:
            return self.rescale(x, n.fixed["mult"], n.fixed["shift"], n.type(0), n.out)
        return self("TABLE", [x, self.constant(to_stored(n.fixed["table"], "u8"), "INT8")], n.out.shape)

    def bias(self, n: NodeView) -> np.ndarray:
        """int32 [O], zeros where the node has none."""
        data = n.data(2) if n.arity == 3 else None
        return np.zeros(n.shape(1)[0], np.int32) if data is None else data

    def convolution(
        self,
        n: NodeView,
        x: str,
        weights: np.ndarray,
        bias: np.ndarray,
        dtype: str,
        pads: Sequence[int] = (0, 0, 0, 0),
        op: str = "CONV2D",
    ) -> str:
        """int32 sums [N, H, W, O] of x [N, H, W, I] (`fitted`) with weights [O, KH, KW, I] (depthwise: [KH, KW, I, M])
        of TOSA's ``dtype``; stride and dilation are the node's."""
        stride, dilation = n.attrs.get("stride", (1, 1)), n.attrs.get("dilation", (1, 1))
        sides = weights.shape[1:3] if op == "CONV2D" else weights.shape[:2]
        batch, *size, _ = self.shape(x)
        height, width = (
            (size[i] + pads[2 * i] + pads[2 * i + 1] - dilation[i] * (sides[i] - 1) - 1) // stride[i] + 1
            for i in (0, 1)
        )
        windows = {"pad": list(pads), "stride": list(stride), "dilation": list(dilation)}
        shape, operands = (batch, height, width, len(bias)), self.operands(n, x, weights, bias, dtype)
        return self(op, operands, shape, "INT32", **windows, local_bound=False, acc_type="INT32")

    def operands(self, n: NodeView, x: str, weights: np.ndarray, bias: np.ndarray, dtype: str) -> list[str]:
        """What a convolution of x reads: weights, biases and both zero points."""
        constants = [self.constant(weights, dtype), self.constant(bias, "INT32")]
        return [x, *constants, self.zero_point(n.type(0)), self.constant([0], dtype)]

    def resize(
        self,
        x: str,
        places: Sequence[tuple[int, int, int]],
        size: Sequence[int],
        mode: str,
        to: TensorType | None = None,
    ) -> str:
        """RESIZE of x [N, H, W, C]: along both axes, place o of the output is ``(step * o + start) / unit``. to: of a
        mean, the encoding of its codes, which is that of x."""
        old, scale, offset, border = self.shape(x), [], [], []
        for axis, terms in enumerate(places):
            step, start, unit = (term // math.gcd(*terms) for term in terms)
            if unit > MOST_UNITS or step >= 16 * unit or step == 0:
                self.refuse(f"TOSA does not resize {old[axis + 1]} to {size[axis]}", "a simpler ratio of sizes")
            scale += [unit, step]
            offset.append(start)
            border.append(step * (size[axis] - 1) - (old[axis + 1] - 1) * unit + start)
        names = [self.numbers(numbers) for numbers in (scale, offset, border)]
        shape = (old[0], *size, old[3])
        if to is None:
            return self.move("RESIZE", x, names, shape, mode=mode)
        total = self("RESIZE", [x, *names], shape, "INT32", mode=mode)
        assert to.q is not None
        middle = replace(to, q=QParams(to.q.scale, STORED[to.dtype][1]))
        return self.rescale(total, *scale_32(1 / (scale[0] * scale[2])), None, middle)


def refusals(graph: Graph) -> list[Reason]:
    """What in an integer graph, rounded under the profile ``tosa``, has no counterpart in TOSA."""
    g, reasons = _Emitter(graph), []
    for node in graph.nodes:
        try:
            g.emit(node)
        except Unsupported as refused:
            reasons += refused.reasons
            g.declare(node.output)
    return reasons


def to_tosa(graph: Graph) -> dict[str, Any]:
    """The TOSA graph of an integer graph rounded under the profile ``tosa``: signed codes (int32 ids) in and out, fixed
    shapes. Raises Unsupported at the first of its `refusals`."""
    assert graph.level == "integer", graph.level
    g = _Emitter(graph)
    for node in graph.nodes:
        g.emit(node)
    block = {
        "name": "main",
        "operators": g.operators,
        "tensors": list(g.tensors.values()),
        "shapes": g.shapes,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
    }
    return {"version": VERSION, "regions": [{"name": "main", "blocks": [block]}]}
