"""A model's layers written down in a few lines: shapes, work and weights, no values.

Batch norms are folded into their convolutions, as every exporter does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeforge.estimate.program import Layer, Program, Shape


@dataclass(frozen=True)
class Value:
    name: str
    shape: Shape

    @property
    def channels(self) -> int:
        return self.shape[1]


def pair(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


class Net:
    """A program under construction; every method appends one layer and returns its output. Layout NC..., or [N, T, D]
    for sequences."""

    def __init__(self, name: str):
        self.name = name
        self.layers: list[Layer] = []
        self.shapes: dict[str, Shape] = {}
        self.inputs: list[str] = []

    def input(self, *shape: int) -> Value:
        name = f"input{len(self.inputs)}"
        self.inputs.append(name)
        self.shapes[name] = shape
        return Value(name, shape)

    def picture(self, *shape: int) -> Value:
        """An input that the model itself normalizes: minus the mean, times one over the deviation."""
        return self.mul(self.binary("sub", self.input(*shape)))

    def emit(
        self, op: str, inputs: Sequence[Value], shape: Shape, weights: int = 0, macs: int = 0, **attrs: Any
    ) -> Value:
        name = f"{op}{len(self.layers)}"
        self.layers.append(Layer(op, tuple(x.name for x in inputs), name, weights, macs, attrs))
        self.shapes[name] = tuple(shape)
        return Value(name, tuple(shape))

    def finish(self, *outputs: Value) -> Program:
        return Program(
            self.name, tuple(self.inputs), tuple(self.layers), tuple(x.name for x in outputs), dict(self.shapes)
        )

    # ------------------------------------------------------------------------------------------------ with weights

    def conv(
        self, x: Value, out: int, k: int | Sequence[int] = 1, s: int | Sequence[int] = 1, p: Any = None, g: int = 1,
        d: int = 1, act: str | None = None, bias: bool = True,
    ) -> Value:  # fmt: skip
        """Convolution over any number of spatial dimensions; p: padding per side (default: that of "same")."""
        dims = len(x.shape) - 2
        kernel = (k,) * dims if isinstance(k, int) else tuple(k)
        stride = (s,) * dims if isinstance(s, int) else tuple(s)
        pads = tuple(d * (n - 1) // 2 for n in kernel) if p is None else ((p,) * dims if isinstance(p, int) else p)
        size = tuple(
            (n + 2 * pad - d * (kn - 1) - 1) // sn + 1
            for n, pad, kn, sn in zip(x.shape[2:], pads, kernel, stride, strict=True)
        )
        fan_in = x.channels // g
        shape = (x.shape[0], out, *size)
        weights = out * fan_in * math.prod(kernel) + out * bias
        y = self.emit(
            "conv2d" if dims == 2 else f"conv{dims}d", [x], shape, weights,
            math.prod(shape) * fan_in * math.prod(kernel),
            kernel=kernel, stride=stride, dilation=(d,) * dims, groups=g, fan_in=fan_in,
        )  # fmt: skip
        return self.act(y, act)

    def dw(self, x: Value, k: int, s: int = 1, act: str | None = None, d: int = 1) -> Value:
        return self.conv(x, x.channels, k, s, g=x.channels, act=act, d=d)

    def deconv(self, x: Value, out: int, k: int, s: int, p: int = 0, act: str | None = None, op: int = 0) -> Value:
        """Transposed convolution; op: output padding."""
        size = tuple((n - 1) * s - 2 * p + k + op for n in x.shape[2:])
        macs = math.prod(x.shape) * out * k * k
        y = self.emit(
            "conv_transpose", [x], (x.shape[0], out, *size), x.channels * out * k * k + out, macs,
            kernel=(k, k), stride=(s, s), dilation=(1, 1), groups=1, fan_in=x.channels,
        )  # fmt: skip
        return self.act(y, act)

    def linear(self, x: Value, out: int, act: str | None = None, bias: bool = True) -> Value:
        shape = (*x.shape[:-1], out)
        y = self.emit(
            "linear", [x], shape, out * (x.shape[-1] + bias), math.prod(shape) * x.shape[-1], fan_in=x.shape[-1]
        )
        return self.act(y, act)

    def embedding(self, ids: Value, rows: int, width: int) -> Value:
        return self.emit("gather", [ids], (*ids.shape, width), rows * width)

    def batch_norm(self, x: Value) -> Value:
        """Of those that no convolution comes before; also a factor and an addend per channel."""
        return self.emit("batch_norm", [x], x.shape, 2 * x.channels)

    def norm(self, x: Value, op: str = "layer_norm") -> Value:
        """layer_norm and rms_norm over the last axis; instance_norm, group_norm and channel_norm over others."""
        width = x.shape[-1] if op in ("layer_norm", "rms_norm") else x.channels
        return self.emit(op, [x], x.shape, 2 * width)

    # --------------------------------------------------------------------------------------------- without weights

    def act(self, x: Value, op: str | None) -> Value:
        """relu, relu6, silu, gelu, hardswish, sigmoid, tanh, prelu, leaky_relu, softplus ..."""
        if op is None:
            return x
        return self.emit(op, [x], x.shape, x.channels if op == "prelu" else 0)

    def matmul(self, a: Value, b: Value) -> Value:
        shape = (*a.shape[:-1], b.shape[-1])
        return self.emit("matmul", [a, b], shape, 0, math.prod(shape) * a.shape[-1], fan_in=a.shape[-1])

    def binary(self, op: str, a: Value, b: Value | None = None) -> Value:
        """add, sub, mul, div; without b: with a constant."""
        if b is None:
            return self.emit(op, [a], a.shape, 1)
        big = a if math.prod(a.shape) >= math.prod(b.shape) else b
        return self.emit(op, [a, b], big.shape)

    def add(self, a: Value, b: Value | None = None, act: str | None = None) -> Value:
        return self.act(self.binary("add", a, b), act)

    def mul(self, a: Value, b: Value | None = None) -> Value:
        return self.binary("mul", a, b)

    def softmax(self, x: Value, axis: int = -1) -> Value:
        return self.emit("softmax", [x], x.shape, axis=axis % len(x.shape))

    def pool(self, x: Value, k: int, s: int, p: int = 0, op: str = "max_pool", ceil: bool = False) -> Value:
        up = s - 1 if ceil else 0
        size = tuple((n + 2 * p - k + up) // s + 1 for n in x.shape[2:])
        return self.emit(op, [x], (*x.shape[:2], *size), kernel=(k, k), stride=(s, s))

    def gap(self, x: Value) -> Value:
        """Mean over the spatial dimensions, kept as ones."""
        return self.emit("reduce_mean", [x], (*x.shape[:2], *[1] * (len(x.shape) - 2)))

    def reduce(self, x: Value, axis: int, op: str = "reduce_mean") -> Value:
        shape = list(x.shape)
        shape[axis] = 1
        return self.emit(op, [x], tuple(shape), axis=axis % len(shape))

    def resize(self, x: Value, size: int | Sequence[int], mode: str = "bilinear") -> Value:
        return self.emit("resize", [x], (*x.shape[:2], *pair(size)), mode=mode)

    def up(self, x: Value, factor: int = 2, mode: str = "nearest") -> Value:
        return self.resize(x, tuple(n * factor for n in x.shape[2:]), mode)

    def concat(self, parts: Sequence[Value], axis: int = 1) -> Value:
        axis %= len(parts[0].shape)
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.emit("concat", parts, tuple(shape), axis=axis)

    def slice(self, x: Value, start: int, end: int, axis: int = 1) -> Value:
        axis %= len(x.shape)
        shape = (*x.shape[:axis], end - start, *x.shape[axis + 1 :])
        return self.emit("slice", [x], shape)

    def flip(self, x: Value, axis: int) -> Value:
        """Reversed along an axis: a slice of stride -1."""
        return self.slice(x, 0, x.shape[axis], axis)

    def split(self, x: Value, parts: int, axis: int = 1) -> list[Value]:
        width = x.shape[axis] // parts
        return [self.slice(x, i * width, (i + 1) * width, axis) for i in range(parts)]

    def reshape(self, x: Value, *shape: int) -> Value:
        if -1 in shape:
            rest = -math.prod(shape)
            shape = tuple(math.prod(x.shape) // rest if n == -1 else n for n in shape)
        assert math.prod(shape) == math.prod(x.shape), f"{x.shape} does not reshape to {shape}"
        return self.emit("reshape", [x], tuple(shape))

    def transpose(self, x: Value, *perm: int) -> Value:
        return self.emit("transpose", [x], tuple(x.shape[i] for i in perm), perm=perm)

    def shuffle(self, x: Value, factor: int, op: str = "depth_to_space") -> Value:
        """depth_to_space, or its inverse for a factor below 0."""
        n, c, h, w = x.shape
        if factor < 0:
            return self.emit("space_to_depth", [x], (n, c * factor**2, h // -factor, w // -factor))
        return self.emit(op, [x], (n, c // factor**2, h * factor, w * factor))

    def pad(self, x: Value, *grow: int, mode: str = "constant") -> Value:
        """grow: added elements per dimension, last dimensions first."""
        added = [0] * (len(x.shape) - len(grow)) + list(grow[::-1])
        return self.emit("pad", [x], tuple(n + a for n, a in zip(x.shape, added, strict=True)), mode=mode)

    # ------------------------------------------------------------------------------------------------ common blocks

    def se(self, x: Value, squeezed: int, act: str = "relu", gate: str = "sigmoid") -> Value:
        """Squeeze and excitation."""
        y = self.conv(self.gap(x), squeezed, act=act)
        return self.mul(x, self.conv(y, x.channels, act=gate))

    def heads(self, x: Value, count: int) -> Value:
        """[N, T, D] -> [N, heads, T, D / heads]"""
        n, t, d = x.shape
        return self.transpose(self.reshape(x, n, t, count, d // count), 0, 2, 1, 3)

    def attend(self, q: Value, k: Value, v: Value, bias: bool = False, scale: bool = True) -> Value:
        """softmax(q k^T) v for [..., T, D]; scale: multiplied on the scores."""
        rank = len(k.shape)
        scores = self.matmul(q, self.transpose(k, *range(rank - 2), rank - 1, rank - 2))
        scores = self.mul(scores) if scale else scores
        scores = self.add(scores) if bias else scores
        return self.matmul(self.softmax(scores), v)

    def attention(self, x: Value, heads: int, memory: Value | None = None, bias: bool = False, width: int = 0) -> Value:
        """Multi-head attention of [N, T, D] with its four projections; width: of query, key and value."""
        memory, width = memory or x, width or x.shape[-1]
        q, k, v = (self.heads(self.linear(y, width), heads) for y in (x, memory, memory))
        y = self.transpose(self.attend(q, k, v, bias), 0, 2, 1, 3)
        return self.linear(self.reshape(y, x.shape[0], x.shape[1], width), x.shape[-1])

    def mlp(self, x: Value, hidden: int, act: str = "gelu") -> Value:
        return self.linear(self.linear(x, hidden, act), x.shape[-1])

    def tokens(self, x: Value) -> Value:
        """[N, C, H, W] -> [N, H * W, C]"""
        n, c, h, w = x.shape
        return self.transpose(self.reshape(x, n, c, h * w), 0, 2, 1)

    def image(self, x: Value, h: int, w: int) -> Value:
        """[N, H * W, C] -> [N, C, H, W]"""
        n, _, c = x.shape
        return self.reshape(self.transpose(x, 0, 2, 1), n, c, h, w)
