"""The fast kernels: the same integers as `reference`, from 8-bit matrix products, compiled loops and threads.

Dot products run on torch's int8 x int8 -> int32 product (VNNI or the like); 16-bit codes go through it byte by byte.
What a graph's constants imply (weights in the product's layout, channel constants, tables) is prepared once per graph.
Everything else is the rule's own ``apply``, on blocks that stay in the cache and are spread over threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from edgeforge.ir.fixed import expand_blocks
from edgeforge.ir.graph import Graph, NodeView
from edgeforge.ir.op import OPS
from edgeforge.ir.rules import RULES
from edgeforge.ir.types import NUMPY
from edgeforge.ops.conv_transpose2d import Phase, phases
from edgeforge.sim import compiled
from edgeforge.sim.reference import Array, Reference
from edgeforge.sim.rounding import Finish, finish, lanewise, pairwise, rowwise
from edgeforge.sim.threads import Scratch, own_threads, ranges, spread

T = TypeVar("T")

#: Elements of a block: sums (4 bytes each) and the int64 temporaries of a rule's ``apply`` fit a core's L2 cache.
SUMS, CODES = 1 << 18, 1 << 15
#: Up to so many rows, a product is cut along its columns instead: every weight is then read once.
FEW_ROWS, COLUMNS = 256, 512
#: Below so many elements a look-up in several threads, or a table of pairs, is not worth its preparation.
WORTH_A_TABLE = 1 << 16

_prepared: WeakKeyDictionary[Graph, dict[str, Any]] = WeakKeyDictionary()
_scratch = Scratch()


@dataclass(frozen=True)
class Windows:
    """Which codes of [N, H, W, C] meet in one dot product; the default makes every pixel a row."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    corner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Layer:
    """A linear or convolution node, prepared. weights: per group [outputs, KH * KW * inputs] int8, or None for a
    depthwise convolution, whose ``taps`` are [KH * KW, C] int8."""

    windows: Windows
    weights: tuple[Array, ...]
    taps: Array | None
    finish: Finish
    base: tuple[Array, Array]


class Fast(Reference):
    """Kernels that agree with Reference on every integer."""

    def threads(self) -> AbstractContextManager[None]:
        return own_threads()

    def run(self, n: NodeView, *codes: Array) -> Array:
        kernel = _KERNELS.get(n.node.op)
        result = None if kernel is None else kernel(n, *codes)
        return super().run(n, *codes) if result is None else result

    def pad(self, x: Array, widths: Sequence[tuple[int, int]], code: int) -> Array:
        if not any(map(any, widths)):
            return x
        order = _memory_order(x)
        shape = [size + sum(width) for size, width in zip(x.shape, widths, strict=True)]
        padded = np.full([shape[axis] for axis in order], code, x.dtype).transpose(np.argsort(order))
        padded[tuple(slice(a, a + size) for (a, _), size in zip(widths, x.shape, strict=True))] = x
        return padded

    def matmul(self, a: Array, b: Array) -> Array:
        """For operands of 16 bits: float64, whose sums are exact below 2**53."""
        largest = int(np.abs(a.astype(np.int64)).max(initial=0)) * int(np.abs(b.astype(np.int64)).max(initial=0))
        assert largest * a.shape[-1] < 2**53, "verify proves that accumulators fit in int32"
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)

    def table(self, n: NodeView, x: Array) -> Array:
        if x.size < WORTH_A_TABLE:
            return self.apply(n, x)
        if (loop := lanewise(n)) is not None:
            return _by_lanes(n, x, loop)
        if "table" not in n.fixed:
            return self.apply(n, x)
        table = n.fixed["table"]
        flat, out, result = _flat(x, x), *_like(x, table.dtype)
        spread(lambda s: compiled.look_up(table, flat[s], out[s]), ranges(x.size, SUMS))
        return result

    def apply(self, n: NodeView, *codes: Array) -> Array:
        family = OPS[n.node.op].numerics
        if family in ("add", "sub", "mul"):
            return _elementwise(n, *codes)
        if family in ("softmax", "norm") and n.attrs.get("axis", -1) in (-1, codes[0].ndim - 1):
            return _by_rows(n, *codes)
        return super().apply(n, *codes)


# ------------------------------------------------------------------------------------------------------- dot products


def _linear(n: NodeView, x: Array, w: Array, b: Array | None = None) -> Array:
    layer = _once(n, lambda: _layer(n, Windows(), expand_blocks(n.q(1), w)[:, :, None, None], b, 1))
    codes = _dot(n, layer, x.reshape(1, 1, -1, x.shape[-1]), (1, x.size // x.shape[-1]))
    return codes.reshape(*x.shape[:-1], -1)


def _conv2d(n: NodeView, x: Array, w: Array, b: Array | None = None) -> Array:
    windows = Windows(w.shape[2:], tuple(n["stride"]), tuple(n["dilation"]), tuple(n["pads"][:2]))
    layer = _once(n, lambda: _layer(n, windows, w, b, n["groups"]))
    _, channels, height, width = n.out.shape
    codes = _dot(n, layer, x.transpose(0, 2, 3, 1), (height, width))
    return codes.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)


def _conv_transpose2d(n: NodeView, x: Array, w: Array, b: Array | None = None) -> Array:
    """One convolution per place within a stride."""

    def prepare() -> list[tuple[Phase, Layer]]:
        found = []
        for phase in phases(n, w):
            windows = Windows(phase.weights.shape[2:], corner=phase.corner)
            found.append((phase, _layer(n, windows, phase.weights, b, n["groups"])))
        return found

    image, y = x.transpose(0, 2, 3, 1), np.empty((len(x), *n.out.shape[1:]), NUMPY[n.out.dtype])
    for phase, layer in _once(n, prepare):
        codes = _dot(n, layer, image, phase.size).reshape(len(x), *phase.size, -1)
        y[:, :, phase.rows, phase.columns] = codes.transpose(0, 3, 1, 2)
    return y


def _layer(n: NodeView, windows: Windows, w: Array, bias: Array | None, groups: int) -> Layer:
    outputs, depth = w.shape[:2]
    flat = np.ascontiguousarray(w.transpose(0, 2, 3, 1)).reshape(outputs, -1)
    alone = groups == outputs > 1 and depth == 1
    end = finish(n, outputs, 0 if alone else 128)
    base = end.base(n, flat.sum(1, dtype=np.int64), bias)
    taps = np.ascontiguousarray(flat.T) if alone else None
    return Layer(windows, () if alone else tuple(np.split(flat, groups)), taps, end, base)


def _dot(n: NodeView, layer: Layer, image: Array, size: tuple[int, int]) -> Array:
    """Codes [positions, channels] of a layer on image [N, H, W, C], whose output has ``size`` (height, width)."""
    rows, end = len(image) * size[0] * size[1], layer.finish
    codes = np.empty((rows, end.channels), NUMPY[n.out.dtype])
    work = _Blocks(n, layer, np.ascontiguousarray(image), size, codes)
    if layer.taps is not None:
        spread(work.depthwise, ranges(rows, max(SUMS // (end.channels * end.planes), 16)))
    elif end.loop is None:
        spread(work.all_columns, ranges(rows, max(SUMS // (end.channels * end.planes), 32)))
    elif rows <= FEW_ROWS and len(layer.weights) == 1:
        left = work.gather(slice(0, rows), 0)
        spread(lambda columns: work.product(left, 0, columns, 0), ranges(end.channels, COLUMNS))
    else:
        widest = max(min(len(layer.weights[0]), COLUMNS), layer.weights[0].shape[1] // 4)
        spread(work.by_columns, ranges(rows, max(SUMS // (widest * end.planes), 32)))
    return codes


@dataclass(frozen=True)
class _Blocks:
    """One run of a layer, block of positions by block: which codes meet, their sums, and the codes they become."""

    n: NodeView
    layer: Layer
    image: Array
    size: tuple[int, int]
    codes: Array

    @property
    def bytes(self) -> tuple[int, ...]:
        """How far each byte plane of the codes lies from the lowest bit."""
        return (8, 0) if self.layer.finish.planes == 2 else (0,)

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        w = self.layer.windows
        return (w.kernel, w.stride, w.dilation, w.corner, self.size)

    def depthwise(self, block: slice) -> None:
        sums = _scratch.take("sums", (len(self.bytes), block.stop - block.start, self.codes.shape[1]), np.int32)
        for plane, byte in zip(sums, self.bytes, strict=True):
            compiled.depthwise(self.image, self.layer.taps, byte, self.n.zero(0), *self.geometry, block.start, plane)
        self.finish(sums, block.start, 0)

    def gather(self, block: slice, group: int) -> Array:
        """int8 [planes, positions, KH * KW * inputs]: what each position of the output sees."""
        height, width, channels = self.image.shape[1:]
        depth, (kh, kw) = self.layer.weights[group].shape[1], self.layer.windows.kernel
        left = _scratch.take("left", (len(self.bytes), block.stop - block.start, depth), np.int8)
        lines = self.image.reshape(-1, height, width * channels)
        first = group * (depth // (kh * kw))
        for plane, byte in zip(left, self.bytes, strict=True):
            compiled.patches(lines, channels, first, byte, self.n.zero(0), *self.geometry, block.start, plane)
        return left

    def product(self, left: Array, group: int, columns: slice, row: int) -> None:
        weights = self.layer.weights[group]
        self.finish(_int_mm(left, weights[columns].T), row, group * len(weights) + columns.start)

    def by_columns(self, block: slice) -> None:
        for group, weights in enumerate(self.layer.weights):
            left = self.gather(block, group)
            for columns in ranges(len(weights), COLUMNS):
                self.product(left, group, columns, block.start)

    def all_columns(self, block: slice) -> None:
        """For rules that are applied as they are: their constants are those of all channels."""
        sums = [_int_mm(self.gather(block, group), w.T).copy() for group, w in enumerate(self.layer.weights)]
        self.finish(np.concatenate(sums, -1), block.start, 0)

    def finish(self, sums: Array, row: int, column: int) -> None:
        self.layer.finish(self.n, sums, row, column, self.layer.base, self.codes)


def _matmul(n: NodeView, a: Array, b: Array) -> Array | None:
    """Activations times uint8 activations, matrix by matrix."""
    if b.dtype != np.uint8:
        return None
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (rows, depth), columns = a.shape[-2:], b.shape[-1]
    left = np.broadcast_to(a, (*batch, rows, depth))
    right = np.broadcast_to(b, (*batch, depth, columns))
    end: Finish = _once(n, lambda: finish(n, columns, 128))
    shifts, raised = (8, 0) if end.planes == 2 else (0,), 128 - n.zero(1)
    codes = np.empty((*batch, rows, columns), NUMPY[n.out.dtype])

    def one(index: tuple[int, ...]) -> None:
        planes = _scratch.take("left", (len(shifts), rows, depth), np.int8)
        for plane, shift in zip(planes, shifts, strict=True):
            np.bitwise_xor((left[index] >> shift).astype(np.uint8), 128, out=plane.view(np.uint8))
        weights = _scratch.take("right", (depth, columns), np.int8)
        np.bitwise_xor(right[index], 128, out=weights.view(np.uint8))
        sums = _int_mm(planes, weights)
        if raised:
            sums += raised * planes.sum(-1, dtype=np.int32, keepdims=True)
        weight_sum = weights.sum(0, dtype=np.int64) + raised * depth
        end(n, sums, 0, 0, end.base(n, weight_sum, None), codes[index])

    spread(one, list(np.ndindex(*batch)))
    return codes


def _int_mm(left: Array, right: Array) -> Array:
    """int32 [P, R, N] of int8 [P, R, K] times int8 [K, N], in this thread's buffer."""
    planes, rows, depth = left.shape
    sums = _scratch.take("sums", (planes, rows, right.shape[1]), np.int32)
    if depth == 1:  # torch 2.13 returns wrong sums for this depth
        return np.multiply(left, right, out=sums, dtype=np.int32)
    flat, out = torch.from_numpy(left.reshape(-1, depth)), torch.from_numpy(sums.reshape(-1, right.shape[1]))
    if _int_mm_is_exact():
        torch._int_mm(flat, torch.from_numpy(right), out=out)
    else:
        out.copy_(flat.double() @ torch.from_numpy(right).double())
    return sums


@lru_cache
def _int_mm_is_exact() -> bool:
    """Whether this machine's int8 product keeps the largest sums (on x86 CPUs without VNNI, pairs of products are added
    in 16 bits)."""
    for rows, depth, columns in ((1, 64, 32), (33, 67, 17), (256, 512, 128)):
        left = torch.full((rows, depth), -128, dtype=torch.int8)
        right = torch.full((columns, depth), -127, dtype=torch.int8).t()
        if not bool((torch._int_mm(left, right) == depth * 128 * 127).all()):
            return False
    return True


# ----------------------------------------------------------------------------------------------------- everything else


def _elementwise(n: NodeView, a: Array, b: Array) -> Array:
    """An operation of two operands: a table of all pairs if both are 8 bits wide, else the rule, block by block."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    first = a if a.shape == shape else b if b.shape == shape else np.broadcast_to(a, shape).copy()
    apply = RULES[n.node.rule].apply
    out, result = _like(first, NUMPY[n.out.dtype])
    left, right = _flat(a, first), _flat(b, first)
    if a.dtype == b.dtype == np.uint8 and out.size >= WORTH_A_TABLE:
        every = np.arange(256, dtype=np.uint8)
        table = _once(n, lambda: np.ravel(apply(n, every[:, None], every[None, :])))
        spread(lambda s: compiled.look_up_pairs(table, left[s], right[s], out[s]), ranges(out.size, SUMS))
    elif (loop := pairwise(n)) is not None:
        spread(lambda s: loop(left[s], right[s], out[s]), ranges(out.size, CODES))
    else:

        def block(s: slice) -> None:
            out[s] = apply(n, left[s], right[s])

        spread(block, ranges(out.size, CODES))
    return result


def _by_lanes(n: NodeView, x: Array, loop: Callable[[Array, int, Array], None]) -> Array:
    """A function of one operand that counts the codes of each tensor (of a batch, each member's)."""
    flat, out = np.ascontiguousarray(x).reshape(-1), np.empty(x.size, NUMPY[n.out.dtype])
    members = range(0, x.size, n.out.size)
    blocks = [(at, s) for at in members for s in ranges(min(n.out.size, x.size - at), SUMS)]

    def block(work: tuple[int, slice]) -> None:
        at, s = work
        loop(flat[at + s.start : at + s.stop], s.start, out[at + s.start : at + s.stop])

    spread(block, blocks)
    return out.reshape(x.shape)


def _by_rows(n: NodeView, x: Array, *constants: Array) -> Array:
    """A rule that works along the last axis, on some rows at a time."""
    depth, loop, apply = x.shape[-1], rowwise(n), RULES[n.node.rule].apply
    rows = np.ascontiguousarray(x).reshape(-1, depth)
    out = np.empty(rows.shape, NUMPY[n.out.dtype])
    as_one = (1,) * (x.ndim - 2) + (-1, depth)

    def block(s: slice) -> None:
        if loop is not None:
            loop(rows[s], out[s])
        else:
            out[s] = apply(n, rows[s].reshape(as_one), *constants).reshape(-1, depth)

    spread(block, ranges(len(rows), max(CODES // depth, 1)))
    return out.reshape(x.shape)


def _once(n: NodeView, make: Callable[[], T]) -> T:
    """What ``make`` returned when this node of this graph first ran."""
    known = _prepared.setdefault(n.graph, {})
    if n.node.output not in known:
        known[n.node.output] = make()
    return known[n.node.output]


def _memory_order(x: Array) -> list[int]:
    """Axes from the outermost to the innermost in memory."""
    return sorted(range(x.ndim), key=lambda axis: (-abs(x.strides[axis]), axis))


def _like(first: Array, dtype: Any) -> tuple[Array, Array]:
    """A new array as laid out as ``first``: as a flat view in the order of memory, and in its shape."""
    order = _memory_order(first)
    made = np.empty([first.shape[axis] for axis in order], dtype)
    return made.reshape(-1), made.transpose(np.argsort(order))


def _flat(x: Array, first: Array) -> Array:
    """The elements of ``x`` broadcast to ``first``, in the memory order of ``first``; a view where that is possible."""
    return np.ascontiguousarray(np.broadcast_to(x, first.shape).transpose(_memory_order(first))).reshape(-1)


_KERNELS: dict[str, Callable[..., Array | None]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "matmul": _matmul,
}
