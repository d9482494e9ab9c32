"""Samplers: random shapes and attributes for one node of each op. Encodings and values are not their business.

A unary op (`Op.real`) needs an entry only where its inputs or attributes are special; every other op must have one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeforge.ir.op import OPS, Op

Shape = tuple[int, ...]
Rng = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """``shapes`` of the inputs (leading dimension 1 for activations). ``domain``: real interval that the first input
    must stay in. ``dtypes``: of the activations and, last, of the output, where they are not the precision's."""

    shapes: tuple[Shape, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    domain: tuple[float, float] | None = None
    dtypes: tuple[str, ...] | None = None


#: (random numbers, dtype of the activations by precision, block size of the weights or None) -> Sample
Sampler = Callable[[Rng, str, int | None], Sample]


def sampler(op: Op) -> Sampler | None:
    """The op's sampler, the common one of unary ops, or None where a new op has brought none."""
    return SAMPLERS.get(op.name) or (_unary() if op.real is not None else None)


def without_sampler() -> list[str]:
    return [name for name, op in OPS.items() if sampler(op) is None]


def _pick(rng: Rng, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _image(rng: Rng, channels: int | None = None) -> Shape:
    channels = int(rng.integers(1, 33)) if channels is None else channels
    return (1, channels, int(rng.integers(5, 15)), int(rng.integers(5, 15)))


def _any_shape(rng: Rng) -> Shape:
    """Rank 2 to 4; at least 512 elements, so that every uint8 code fits in."""
    return _pick(rng, (1, 600), (1, 512), (1, 8, 96), (1, 5, 131), (1, 8, 8, 8), (1, 3, 14, 16))


def _clamp(rng: Rng) -> dict[str, Any]:
    """No fused activation (in half of the cases), ReLU or ReLU6."""
    kind = _pick(rng, None, None, (0.0, math.inf), (0.0, 6.0))
    return {} if kind is None else {"clamp": kind}


def _pads(rng: Rng, most: int) -> tuple[int, int, int, int]:
    return _pick(rng, (0, 0, 0, 0), (most,) * 4, (0, 0, most, most))


def _unary(domain: tuple[float, float] | None = None, **choices: Sequence[Any]) -> Sampler:
    """A unary op; an attribute is drawn from its ``choices``."""

    def sample(rng: Rng, act: str, block: int | None) -> Sample:
        return Sample((_any_shape(rng),), {key: _pick(rng, *values) for key, values in choices.items()}, domain)

    return sample


def _requantize(rng: Rng, act: str, block: int | None) -> Sample:
    dtypes = ("u8", "u8") if act == "u8" else _pick(rng, ("u16", "u16"), ("u16", "u8"), ("u8", "u16"))
    return Sample((_any_shape(rng),), dtypes=dtypes)


def _binary(rng: Rng, act: str, block: int | None) -> Sample:
    a = _any_shape(rng)
    b = _pick(rng, a, a, (1, *a[1:-1], 1), (1,) * (len(a) - 1) + a[-1:])
    return Sample(_pick(rng, (a, b), (a, b), (b, a)), _clamp(rng))


def _linear(rng: Rng, act: str, block: int | None) -> Sample:
    depth = int(rng.integers(1, 5)) * (block or 1) * (1 if block else int(rng.integers(1, 97)))
    out = int(rng.integers(1, 65))
    rows = _pick(rng, (1,), (1, int(rng.integers(2, 17))))
    bias = ((out,),) if rng.random() < 0.5 else ()
    return Sample(((*rows, depth), (out, depth), *bias), _clamp(rng))


def _conv2d(rng: Rng, act: str, block: int | None) -> Sample:
    """Dense, grouped, depthwise (strides 1 and 2, multiplier 2), pointwise and dilated."""
    kind = _pick(rng, "dense", "grouped", "depthwise", "pointwise", "dilated")
    kernel = 1 if kind == "pointwise" else _pick(rng, 3, 3, 5, 2)
    stride = _pick(rng, (1, 1), (1, 1), (2, 2))
    channels = int(rng.integers(1, 25)) if kind != "grouped" else 4 * int(rng.integers(1, 5))
    groups = {"depthwise": channels, "grouped": _pick(rng, 2, 4)}.get(kind, 1)
    out = channels * _pick(rng, 1, 1, 2) if kind == "depthwise" else 4 * int(rng.integers(1, 9))
    height, width = (int(rng.integers(9, 15)) for _ in range(2))
    attrs = {
        "stride": (1, 1) if kind == "dilated" else stride,
        "dilation": (2, 2) if kind == "dilated" else (1, 1),
        "pads": _pads(rng, kernel // 2) if kernel > 1 else (0, 0, 0, 0),
        "groups": groups,
    }
    bias = ((out,),) if rng.random() < 0.6 else ()
    shapes = ((1, channels, height, width), (out, channels // groups, kernel, kernel), *bias)
    return Sample(shapes, {**attrs, **_clamp(rng)})


def _conv_transpose2d(rng: Rng, act: str, block: int | None) -> Sample:
    """Dense and depthwise, strides 1 to 4, kernels of the stride and more, output padding, dilation."""
    stride = int(_pick(rng, 2, 2, 2, 1, 3, 4))
    kernel = max(int(_pick(rng, stride, stride + 1, 3, 4)), stride)
    channels, depthwise = int(rng.integers(1, 25)), rng.random() < 0.3
    out = channels if depthwise else int(rng.integers(1, 33))
    height, width = (int(rng.integers(3, 9)) for _ in range(2))
    dilation = 2 if stride == 1 and not depthwise and rng.random() < 0.5 else 1
    attrs = {
        "stride": (stride, stride),
        "pads": _pads(rng, (kernel - 1) // 2),
        "output_padding": (int(rng.integers(stride)),) * 2 if rng.random() < 0.3 else (0, 0),
        "dilation": (dilation, dilation),
        "groups": channels if depthwise else 1,
    }
    bias = ((out,),) if rng.random() < 0.6 else ()
    shapes = ((1, channels, height, width), (out, 1 if depthwise else channels, kernel, kernel), *bias)
    return Sample(shapes, {**attrs, **_clamp(rng)})


def _matmul(rng: Rng, act: str, block: int | None) -> Sample:
    rows, depth, columns = int(rng.integers(1, 33)), int(rng.integers(1, 193)), int(rng.integers(1, 49))
    lead = _pick(rng, (1,), (1, 2), (1, 4))
    return Sample(((*lead, rows, depth), (*lead, depth, columns)))


def _softmax(rng: Rng, act: str, block: int | None) -> Sample:
    shape = _pick(rng, (1, 10), (1, 1000), (1, 7, 33), (1, 2, 16, 16), (1, 4, 9, 128))
    return Sample((shape,), {"axis": len(shape) - 1}, (-float(rng.uniform(1, 12)), float(rng.uniform(1, 12))))


def _norm(bias: bool) -> Sampler:
    def sample(rng: Rng, act: str, block: int | None) -> Sample:
        size = int(_pick(rng, 16, 64, 100, 384, 768))
        shape = _pick(rng, (1, size), (1, int(rng.integers(2, 17)), size))
        return Sample((shape, (size,), *([(size,)] if bias else [])), {"eps": _pick(rng, 1e-5, 1e-6)})

    return sample


def _pool(rng: Rng, act: str, block: int | None) -> Sample:
    kernel = _pick(rng, 2, 3, 3, 5)
    stride = _pick(rng, 1, 2, kernel)
    pads = _pick(rng, (0, 0, 0, 0), (0, 0, 0, 0), (kernel // 2,) * 4)
    return Sample((_image(rng),), {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "pads": pads})


def _reduce_mean(rng: Rng, act: str, block: int | None) -> Sample:
    """Global average pooling, and the mean of the last axis."""
    if rng.random() < 0.7:
        return Sample((_image(rng),), {"axes": (2, 3), "keepdims": True})
    return Sample(((1, int(rng.integers(2, 17)), int(rng.integers(8, 129))),), {"axes": (2,), "keepdims": True})


def _concat(rng: Rng, act: str, block: int | None) -> Sample:
    shape = _any_shape(rng)
    axis = int(rng.integers(1, len(shape)))
    sizes = rng.integers(1, 17, int(rng.integers(2, 5)))
    return Sample(tuple((*shape[:axis], int(size), *shape[axis + 1 :]) for size in sizes), {"axis": axis})


def _expand(rng: Rng, act: str, block: int | None) -> Sample:
    small, large = _pick(rng, ((1, 1, 8, 32), (1, 4, 8, 32)), ((1, 16, 1), (1, 16, 24)), ((1, 4, 1, 1), (1, 4, 6, 6)))
    return Sample((small,), {"shape": large})


def _gather(rng: Rng, act: str, block: int | None) -> Sample:
    rows, features, count = int(rng.integers(2, 200)), int(rng.integers(4, 65)), int(rng.integers(1, 33))
    return Sample(((rows, features), (1, count)))


def _pad(rng: Rng, act: str, block: int | None) -> Sample:
    return Sample((_image(rng),), {"pads": tuple(int(p) for p in rng.integers(0, 4, 4))})


def _reshape(rng: Rng, act: str, block: int | None) -> Sample:
    shape = _any_shape(rng)
    size = math.prod(shape)
    divisor = max(d for d in (1, 2, 3, 5, 8) if size % d == 0)
    return Sample((shape,), {"shape": _pick(rng, (1, size), (1, divisor, size // divisor))})


def _resize(*coordinates: str) -> Sampler:
    """Twice and four times the size, and sizes without a common ratio."""

    def sample(rng: Rng, act: str, block: int | None) -> Sample:
        shape = _image(rng)
        factor = int(_pick(rng, 2, 2, 3, 4, 0, 0))
        size = tuple(side * factor if factor else int(rng.integers(3, 32)) for side in shape[2:])
        return Sample((shape,), {"size": size, "coordinates": _pick(rng, *coordinates)})

    return sample


def _slice(rng: Rng, act: str, block: int | None) -> Sample:
    shape = _any_shape(rng)
    axis = int(rng.integers(1, len(shape)))
    start = int(rng.integers(0, shape[axis] - 1))
    end = int(rng.integers(start + 1, shape[axis] + 1))
    return Sample((shape,), {"axis": axis, "start": start, "end": end, "step": _pick(rng, 1, 1, 2)})


def _transpose(rng: Rng, act: str, block: int | None) -> Sample:
    shape = _pick(rng, (1, 8, 96), (1, 5, 131), (1, 8, 8, 8), (1, 3, 14, 16))
    return Sample((shape,), {"perm": (0, *(int(axis) for axis in 1 + rng.permutation(len(shape) - 1)))})


SAMPLERS: dict[str, Sampler] = {
    "add": _binary,
    "avg_pool": _pool,
    "clip": _unary(low_real=(0.0, -1.0), high_real=(6.0, 1.0)),
    "concat": _concat,
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "exp": _unary((-8.0, 4.0)),
    "expand": _expand,
    "gather": _gather,
    "gelu": _unary((-8.0, 8.0), approximate=("none", "tanh")),
    "layer_norm": _norm(bias=True),
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": _pool,
    "mul": _binary,
    "pad": _pad,
    "reciprocal": _unary((0.0, 8.0)),
    "reduce_mean": _reduce_mean,
    "requantize": _requantize,
    "reshape": _reshape,
    "resize_bilinear": _resize("half_pixel", "align_corners", "asymmetric"),
    "resize_nearest": _resize("asymmetric", "half_pixel"),
    "rms_norm": _norm(bias=False),
    "rsqrt": _unary((0.0, 8.0)),
    "slice": _slice,
    "softmax": _softmax,
    "sqrt": _unary((0.0, 8.0)),
    "sub": _binary,
    "transpose": _transpose,
}
