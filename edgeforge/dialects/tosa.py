"""The TOSA dialect: integer Graph -> TOSA graph, as the JSON form of its flatbuffer (schema ``tosa.fbs``, version 1.0).

Codes are signed: uint8 codes and their zero points - 128, uint16 codes - 32768 (these only move: TOSA's 16-bit
arithmetic has no zero points). Images are NHWC between two TRANSPOSEs. A node's result is named as its value; what it
is made of, ``<value>/<number>``. Multipliers and shifts are those in the node (`edgeforge.ir.rules.tosa`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgeforge.ir.fixed import dot_bound, expand_blocks
from edgeforge.ir.graph import Graph, Node, NodeView
from edgeforge.ir.op import ACT, INDEX, OPS
from edgeforge.ir.rules.tosa import apply_scale_32
from edgeforge.ir.types import RANGE, TensorType, pack_int4

VERSION = {"_major": 1, "_minor": 0, "_patch": 0, "_draft": False}
#: dtype of the graph -> TOSA's, the NumPy dtype of its elements, and what is subtracted from a code.
STORED = {
    "u8": ("INT8", np.int8, 128),
    "u16": ("INT16", np.int16, 32768),
    "i64": ("INT32", np.int32, 0),
    "i32": ("INT32", np.int32, 0),
    "i8": ("INT8", np.int8, 0),
    "i4": ("INT4", np.int8, 0),
}
BYTES = {"INT4": np.int8, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32}
#: Multiplier and shift of 1, by which RESCALE takes a zero point out.
ONE = (np.int64(1 << 30), np.int64(30))
NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def to_stored(codes: np.ndarray, dtype: str) -> np.ndarray:
    """Codes of the graph as TOSA holds them."""
    _, element, offset = STORED[dtype]
    return (codes.astype(np.int64) - offset).astype(element)


def from_stored(stored: np.ndarray, dtype: str) -> np.ndarray:
    """TOSA's elements as uint8 or uint16 codes of the graph."""
    return (stored.astype(np.int64) + STORED[dtype][2]).astype(np.uint8 if dtype == "u8" else np.uint16)


class _Emitter:
    """A TOSA block under construction. ``g(op, inputs, shape, dtype, **attributes)`` adds an operator and returns the
    name of its result."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.operators: list[dict[str, Any]] = []
        self.tensors: dict[str, dict[str, Any]] = {}
        self.shapes: list[dict[str, Any]] = []
        self.node = graph.nodes[0]
        self.count = 0

    def emit(self, node: Node) -> None:
        self.node, self.count = node, 0
        for i, name in enumerate(node.inputs):
            value = self.graph.values[name]
            if value.data is not None and OPS[node.op].port(i).role in (ACT, INDEX) and name not in self.tensors:
                self.constant(to_stored(value.data, value.type.dtype), STORED[value.type.dtype][0], name)
        result = EMIT[node.op](self, self.graph.view(node), *node.inputs)
        assert self.operators[-1]["outputs"] == [result], node.op
        self.operators[-1]["outputs"] = [node.output]
        self.tensors[node.output] = {**self.tensors.pop(result), "name": node.output}

    def __call__(
        self, op: str, inputs: Sequence[str], shape: Sequence[int], dtype: str = "INT8", **attributes: Any
    ) -> str:
        result = self.tensor(self.fresh(), shape, dtype)
        self.operator(op, inputs, result, attributes)
        return result

    def fresh(self) -> str:
        self.count += 1
        return f"{self.node.output}/{self.count}"

    def tensor(self, name: str, shape: Sequence[int], dtype: str, **more: Any) -> str:
        self.tensors[name] = {"name": name, "shape": [int(size) for size in shape], "type": dtype, **more}
        return name

    def operator(self, op: str, inputs: Sequence[str], output: str, attributes: dict[str, Any]) -> None:
        words = {"MATMUL": "MatMul"}.get(op) or "".join(word.capitalize() for word in op.split("_"))
        self.operators.append(
            {
                "op": op,
                "attribute_type": f"{words}Attribute",
                "attribute": {key: list(v) if isinstance(v, tuple) else v for key, v in attributes.items()},
                "inputs": list(inputs),
                "outputs": [output],
            }
        )

    def constant(self, data: np.ndarray | Sequence[int], dtype: str, name: str = "") -> str:
        array = np.ascontiguousarray(data, BYTES[dtype])
        raw = pack_int4(array) if dtype == "INT4" else array.tobytes()
        made = self.tensor(name or self.fresh(), array.shape, dtype, data=list(raw))
        self.operator("CONST", (), made, {})
        return made

    def numbers(self, numbers: Sequence[int]) -> str:
        """A constant of type shape."""
        name = self.fresh()
        data = list(np.asarray(numbers, np.int64).tobytes())
        self.shapes.append({"name": name, "rank": len(numbers), "data": data})
        self.operator("CONST_SHAPE", (), name, {})
        return name

    # --------------------------------------------------------------------------------------------- words of the emitters

    def shape(self, x: str) -> list[int]:
        return self.tensors[x]["shape"]

    def dtype(self, x: str) -> str:
        return self.tensors[x]["type"]

    def zero(self, kind: TensorType) -> str:
        """The zero point of ``kind`` as a constant."""
        assert kind.q is not None
        dtype, _, offset = STORED[kind.dtype]
        return self.constant([kind.q.zero - offset], dtype)

    def move(self, op: str, x: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> str:
        return self(op, [x, *inputs], shape, self.dtype(x), **attributes)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        return x if self.shape(x) == list(shape) else self.reshaped(x, shape)

    def reshaped(self, x: str, shape: Sequence[int]) -> str:
        return self.move("RESHAPE", x, [self.numbers(shape)], shape)

    def transpose(self, x: str, perm: Sequence[int]) -> str:
        return self.move("TRANSPOSE", x, [], [self.shape(x)[axis] for axis in perm], perms=list(perm))

    def slice(self, x: str, start: Sequence[int], size: Sequence[int]) -> str:
        return self.move("SLICE", x, [self.numbers(start), self.numbers(size)], size)

    def tile(self, x: str, shape: Sequence[int]) -> str:
        """Dimensions of size 1 repeated to those of ``shape``."""
        x = self.reshape(x, [1] * (len(shape) - len(self.shape(x))) + self.shape(x))
        times = [size // own for size, own in zip(shape, self.shape(x), strict=True)]
        return self.move("TILE", x, [self.numbers(times)], shape)

    def pad(self, x: str, widths: Sequence[int], kind: TensorType) -> str:
        """Zeros before and after each dimension, in pairs."""
        shape = [size + widths[2 * i] + widths[2 * i + 1] for i, size in enumerate(self.shape(x))]
        return self.move("PAD", x, [self.numbers(widths), self.zero(kind)], shape)

    def rescale(self, x: str, mult: Any, shift: Any, kind: TensorType | None, to: TensorType | None) -> str:
        """RESCALE along the last dimension. kind: codes that x holds; to: codes wanted; None: int32 sums."""
        mult, shift = np.asarray(mult).reshape(-1), np.asarray(shift).reshape(-1)
        dtype = "INT32" if to is None else STORED[to.dtype][0]
        before, after = (self.constant([0], "INT32") if t is None else self.zero(t) for t in (kind, to))
        constants = [self.constant(mult, "INT32"), self.constant(shift, "INT8"), before, after]
        attributes = {"scale32": True, "rounding_mode": "SINGLE_ROUND", "per_channel": mult.size > 1}
        unsigned = {"input_unsigned": False, "output_unsigned": False}
        return self("RESCALE", [x, *constants], self.shape(x), dtype, **attributes, **unsigned)

    def centered(self, x: str, kind: TensorType) -> str:
        """int32 of code - zero point."""
        return self.rescale(x, *ONE, kind, None)

    def finish(self, n: NodeView, acc: str) -> str:
        """The node's own RESCALE of int32 sums, and its fused activation."""
        return self.clamp(n, self.rescale(acc, n.fixed["mult"], n.fixed["shift"], None, n.out))

    def clamp(self, n: NodeView, x: str) -> str:
        limits = (n.fixed["low"], n.fixed["high"])
        return x if limits == RANGE[n.out.dtype] else self.limited(x, limits, n.out.dtype)

    def limited(self, x: str, limits: tuple[int, int], dtype: str) -> str:
        low, high = (list(to_stored(np.array([code]), dtype).tobytes()) for code in limits)
        return self.move("CLAMP", x, [], self.shape(x), min_val=low, max_val=high, nan_mode="PROPAGATE")

    def fitted(self, x: str, reach: Sequence[int], stride: Sequence[int], pads: Sequence[int]) -> tuple[str, list[int]]:
        """x [N, H, W, C] and its padding (top, bottom, left, right), without the edge that no window reaches: TOSA
        wants windows to end where the image does."""
        size, padding = self.shape(x), []
        for axis in (0, 1):
            before, after = pads[axis], pads[axis + 2]
            surplus = (size[axis + 1] + before + after - reach[axis]) % stride[axis]
            size = [*size[: axis + 1], size[axis + 1] - max(surplus - after, 0), *size[axis + 2 :]]
            padding += [before, max(after - surplus, 0)]
        return (x if size == self.shape(x) else self.slice(x, [0] * 4, size)), padding


# ------------------------------------------------------------------------------------------------------------------ ops


def _conv2d(g: _Emitter, n: NodeView, x: str, *names: str) -> str:
    """CONV2D, DEPTHWISE_CONV2D, or a CONV2D per group."""
    weights, bias, groups = n.data(1), _bias(n), n["groups"]
    assert weights is not None
    depth, sides = weights.shape[1], weights.shape[2:]
    reach = [(side - 1) * step + 1 for side, step in zip(sides, n["dilation"], strict=True)]
    x, pads = g.fitted(g.transpose(x, NHWC), reach, n["stride"], n["pads"])
    batch, _, height, width = n.out.shape

    def one(op: str, x: str, weights: np.ndarray, bias: np.ndarray) -> str:
        dtype = STORED[n.type(1).dtype][0]
        constants = [g.constant(weights, dtype), g.constant(bias, "INT32"), g.zero(n.type(0)), g.constant([0], dtype)]
        attributes = {"pad": pads, "stride": n["stride"], "dilation": n["dilation"], "acc_type": "INT32"}
        shape = (batch, height, width, len(bias))
        return g(op, [x, *constants], shape, "INT32", local_bound=False, **attributes)

    if groups == 1:
        acc = one("CONV2D", x, weights.transpose(0, 2, 3, 1), bias)
    elif depth == 1:
        acc = one("DEPTHWISE_CONV2D", x, weights.reshape(groups, -1, *sides).transpose(2, 3, 0, 1), bias)
    else:
        size = [*g.shape(x)[:3], depth]
        pieces = [g.slice(x, [0, 0, 0, i * depth], size) for i in range(groups)]
        parts = zip(pieces, np.split(weights, groups), np.split(bias, groups), strict=True)
        sums = [one("CONV2D", piece, w.transpose(0, 2, 3, 1), b) for piece, w, b in parts]
        acc = g("CONCAT", sums, (batch, height, width, len(bias)), "INT32", axis=3)
    return g.transpose(g.finish(n, acc), NCHW)


def _bias(n: NodeView) -> np.ndarray:
    data = n.data(2) if n.arity == 3 else None
    return np.zeros(n.shape(1)[0], np.int32) if data is None else data


def _linear(g: _Emitter, n: NodeView, x: str, *names: str) -> str:
    """CONV2D of images of one pixel. The codes of block-wise weights, times their block's integer scale, fit int8."""
    codes, (out, depth) = n.data(1), n.shape(1)
    assert codes is not None
    dtype = "INT4" if n.type(1).dtype == "i4" and n.q(1).block is None else "INT8"
    rows = n.type(0).size // depth
    weights = g.constant(expand_blocks(n.q(1), codes).reshape(out, 1, 1, depth), dtype)
    constants = [weights, g.constant(_bias(n), "INT32"), g.zero(n.type(0)), g.constant([0], dtype)]
    attributes = {"pad": [0] * 4, "stride": [1, 1], "dilation": [1, 1], "local_bound": False, "acc_type": "INT32"}
    image = g.reshape(x, (rows, 1, 1, depth))
    acc = g("CONV2D", [image, *constants], (rows, 1, 1, out), "INT32", **attributes)
    return g.reshape(g.finish(n, acc), n.out.shape)


def _matmul(g: _Emitter, n: NodeView, a: str, b: str) -> str:
    *batch, rows, columns = n.out.shape
    operands = []
    for i, x in enumerate((a, b)):
        shape = (*batch, *n.shape(i)[-2:])
        x = x if n.shape(i) == shape else g.tile(x, shape)
        operands.append(g.reshape(x, (int(np.prod(batch)), *shape[-2:])))
    zeros = [g.zero(n.type(0)), g.zero(n.type(1))]
    acc = g("MATMUL", [*operands, *zeros], (int(np.prod(batch)), rows, columns), "INT32")
    return g.reshape(g.finish(n, acc), n.out.shape)


def _sum(g: _Emitter, n: NodeView, *names: str) -> str:
    """Both operands RESCALEd to int32, ADD or SUB, RESCALE."""
    mult, shift = n.fixed["mult"], n.fixed["shift"]
    parts = [g.rescale(x, mult[i], shift[i], n.type(i), None) for i, x in enumerate(_of_rank(g, n, names))]
    total = g("ADD" if n.node.op == "add" else "SUB", parts, n.out.shape, "INT32")
    return g.clamp(n, g.rescale(total, mult[2], shift[2], None, n.out))


def _mul(g: _Emitter, n: NodeView, *names: str) -> str:
    parts = [g.centered(x, n.type(i)) for i, x in enumerate(_of_rank(g, n, names))]
    return g.finish(n, g("MUL", [*parts, g.constant([0], "INT8")], n.out.shape, "INT32"))


def _of_rank(g: _Emitter, n: NodeView, names: Sequence[str]) -> list[str]:
    """Operands of the output's rank: TOSA broadcasts dimensions of size 1 only."""
    rank = len(n.out.shape)
    return [g.reshape(x, [1] * (rank - len(g.shape(x))) + g.shape(x)) for x in names]


def _reduce_mean(g: _Emitter, n: NodeView, x: str) -> str:
    """int32 sums over one axis after the other, RESCALE."""
    total = g.centered(x, n.type(0))
    for axis in n["axes"]:
        shape = [1 if i == axis else size for i, size in enumerate(g.shape(total))]
        total = g("REDUCE_SUM", [total], shape, "INT32", axis=int(axis))
    return g.reshape(g.finish(n, total), n.out.shape)


def _avg_pool(g: _Emitter, n: NodeView, x: str) -> str:
    """AVG_POOL2D within the input's encoding, RESCALE. Padding comes first: AVG_POOL2D does not count its own."""
    top, left, bottom, right = n["pads"]
    x = g.transpose(x, NHWC)
    if any(n["pads"]):
        x = g.pad(x, [0, 0, top, bottom, left, right, 0, 0], n.type(0))
    x, _ = g.fitted(x, n["kernel"], n["stride"], (0, 0, 0, 0))
    zeros = [g.zero(n.type(0)), g.zero(n.type(0))]
    windows = {"kernel": n["kernel"], "stride": n["stride"], "pad": [0] * 4, "acc_type": "INT32"}
    batch, channels, height, width = n.out.shape
    mean = g("AVG_POOL2D", [x, *zeros], (batch, height, width, channels), **windows)
    codes = g.rescale(mean, n.fixed["mult"], n.fixed["shift"], n.type(0), n.out)
    return g.transpose(codes, NCHW)


def _max_pool(g: _Emitter, n: NodeView, x: str) -> str:
    x, pads = g.fitted(g.transpose(x, NHWC), n["kernel"], n["stride"], n["pads"])
    batch, channels, height, width = n.out.shape
    windows = {"kernel": n["kernel"], "stride": n["stride"], "pad": pads, "nan_mode": "PROPAGATE"}
    return g.transpose(g.move("MAX_POOL2D", x, [], (batch, height, width, channels), **windows), NCHW)


def _table(g: _Emitter, n: NodeView, x: str) -> str:
    table = g.constant(to_stored(n.fixed["table"], "u8"), "INT8")
    return g("TABLE", [x, table], n.out.shape)


def _relu(g: _Emitter, n: NodeView, x: str) -> str:
    """CLAMP within one encoding, else TABLE."""
    if _same_encoding(n):
        return g.limited(x, (n.zero(0), RANGE[n.out.dtype][1]), n.out.dtype)
    return _table(g, n, x)


def _requantize(g: _Emitter, n: NodeView, x: str) -> str:
    return g.rescale(x, n.fixed["mult"], n.fixed["shift"], n.type(0), n.out)


def _concat(g: _Emitter, n: NodeView, *xs: str) -> str:
    return g("CONCAT", xs, n.out.shape, g.dtype(xs[0]), axis=n["axis"])


def _expand(g: _Emitter, n: NodeView, x: str) -> str:
    return g.tile(x, n.out.shape)


def _gather(g: _Emitter, n: NodeView, table: str, ids: str) -> str:
    (rows, features), count = n.shape(0), n.type(1).size
    operands = [g.reshaped(table, (1, rows, features)), g.reshaped(ids, (1, count))]
    return g.reshaped(g("GATHER", operands, (1, count, features), g.dtype(table)), n.out.shape)


def _pad(g: _Emitter, n: NodeView, x: str) -> str:
    top, left, bottom, right = n["pads"]
    return g.pad(x, [0, 0, 0, 0, top, bottom, left, right], n.out)


def _reshape(g: _Emitter, n: NodeView, x: str) -> str:
    return g.reshaped(x, n.out.shape)


def _transpose(g: _Emitter, n: NodeView, x: str) -> str:
    return g.transpose(x, n["perm"])


def _slice(g: _Emitter, n: NodeView, x: str) -> str:
    """SLICE; of every ``step``-th element, the first of each [count, step] after padding to full steps."""
    axis, step, shape = n["axis"], n["step"], n.shape(0)
    start, count = range(shape[axis])[n["start"] :: step].start, n.out.shape[axis]
    before, after = list(shape[:axis]), list(shape[axis + 1 :])
    origin = [start if i == axis else 0 for i in range(len(shape))]
    x = g.slice(x, origin, [*before, (count - 1) * step + 1, *after])
    if step == 1:
        return x
    x = g.pad(x, [step - 1 if i == 2 * axis + 1 else 0 for i in range(2 * len(shape))], n.out)
    x = g.reshaped(x, [*before, count, step, *after])
    x = g.slice(x, [0] * (len(shape) + 1), [*before, count, 1, *after])
    return g.reshaped(x, n.out.shape)


_FUNCTIONS = ("clip", "erf", "exp", "gelu", "hardsigmoid", "hardswish", "neg", "reciprocal", "rsqrt", "sigmoid", "silu")
_MOVES: dict[str, Callable[..., str]] = {
    "concat": _concat,
    "expand": _expand,
    "gather": _gather,
    "max_pool": _max_pool,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "transpose": _transpose,
}
EMIT: dict[str, Callable[..., str]] = {
    **_MOVES,
    **dict.fromkeys((*_FUNCTIONS, "sqrt", "tanh"), _table),
    "add": _sum,
    "avg_pool": _avg_pool,
    "conv2d": _conv2d,
    "linear": _linear,
    "matmul": _matmul,
    "mul": _mul,
    "reduce_mean": _reduce_mean,
    "relu": _relu,
    "requantize": _requantize,
    "sub": _sum,
}


# ------------------------------------------------------------------------------------------------------------ refusals


def _same_encoding(n: NodeView) -> bool:
    return n.type(0).q == n.out.q and n.type(0).dtype == n.out.dtype


def refusal(n: NodeView) -> str:
    """Why TOSA has no counterpart of a node that holds constants of the profile ``tosa``, or ""."""
    if n.node.op not in EMIT:
        return "TOSA has no such operation; which others it is made of is a compiler's choice"
    if n.node.op in _MOVES:
        return ""
    wide = "u16" in (n.out.dtype, *(n.type(i).dtype for i in range(n.arity)))
    if wide and not (n.node.op == "relu" and _same_encoding(n)):
        return "TOSA's arithmetic on 16-bit codes has no zero point (and its tables interpolate)"
    if "shift" in n.fixed and not np.all(_reach(n) < 2.0 ** (np.asarray(n.fixed["shift"]) - 1)):
        return f"sums of up to {np.max(_reach(n))} exceed what RESCALE takes at a shift of {np.min(n.fixed['shift'])}"
    return ""


def _reach(n: NodeView) -> Any:
    """The largest absolute values that the node's RESCALEs are given."""
    op, top = n.node.op, RANGE["u8"][1]
    spans = [max(n.zero(i), top - n.zero(i)) for i in range(n.arity) if n.type(i).dtype == "u8"]
    if op in ("linear", "conv2d"):
        codes = n.data(1)
        assert codes is not None
        return dot_bound(expand_blocks(n.q(1), codes), _bias(n), -n.zero(0), top - n.zero(0))
    if op in ("add", "sub"):
        parts = apply_scale_32(np.array(spans), n.fixed["mult"][:2], n.fixed["shift"][:2])
        return np.array([*spans, parts.sum()])
    count = {"matmul": n.shape(0)[-1], "reduce_mean": n.type(0).size // n.out.size}.get(op, 1)
    return count * int(np.prod(spans))


# --------------------------------------------------------------------------------------------------------------- graphs


def to_tosa(graph: Graph) -> dict[str, Any]:
    """The TOSA graph of an integer graph rounded under the profile ``tosa`` in which no node has a `refusal`: signed
    codes (int32 ids) in and out, fixed shapes."""
    assert graph.level == "integer", graph.level
    g = _Emitter(graph)
    for name in graph.inputs:
        g.tensor(name, graph.type(name).shape, STORED[graph.type(name).dtype][0])
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
