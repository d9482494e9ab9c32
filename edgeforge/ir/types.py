"""Values and their types: what is stored on an edge of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: dtype name -> NumPy dtype of its codes. ``i4`` codes live unpacked in int8.
NUMPY = {
    "f32": np.dtype(np.float32),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "u16": np.dtype(np.uint16),
    "u8": np.dtype(np.uint8),
    "i8": np.dtype(np.int8),
    "i4": np.dtype(np.int8),
}

#: dtype name -> (lowest, highest) code. Weight codes are symmetric: -128 and -8 are never used.
RANGE = {
    "u8": (0, 255),
    "u16": (0, 65535),
    "i8": (-127, 127),
    "i4": (-7, 7),
    "i32": (-(2**31), 2**31 - 1),
}

BITS = {"f32": 32, "i64": 64, "i32": 32, "u16": 16, "u8": 8, "i8": 8, "i4": 4}


#: Elements of a large array that are worked on at a time: float64 temporaries of them stay in the cache.
BLOCK = 1 << 17


def row_blocks(shape: tuple[int, ...]) -> Iterator[Any]:
    """Indices that cover an array of ``shape``: slices of its leading axis with about BLOCK elements."""
    if not shape:
        yield ()
        return
    step = max(BLOCK // max(int(np.prod(shape[1:], dtype=np.int64)), 1), 1)
    yield from (slice(at, at + step) for at in range(0, shape[0], step))


def is_finite(data: np.ndarray) -> bool:
    """Whether floats hold neither NaN nor infinity (minimum and maximum of NaN are NaN); needs no memory."""
    return data.size == 0 or bool(np.isfinite(data.min()) and np.isfinite(data.max()))


def pack_int4(codes: np.ndarray) -> bytes:
    """Two codes per byte, the first in the low half."""
    nibbles = codes.reshape(-1).astype(np.uint8) & 15
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes()


@dataclass(frozen=True, eq=False)
class QParams:
    """Encoding of integer codes: ``real = scale * (code - zero)``.

    scale: float32, shape () per tensor, [C] per channel along ``axis``, or [C, K // block] block-wise along the
    last dimension. zero: one zero point for the whole tensor (0 for weights and biases).
    """

    scale: np.ndarray
    zero: int = 0
    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", np.asarray(self.scale, np.float32))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, QParams)
            and (self.zero, self.axis, self.block) == (other.zero, other.axis, other.block)
            and np.array_equal(self.scale, other.scale)
        )

    def __hash__(self) -> int:
        return hash((self.scale.tobytes(), self.zero, self.axis, self.block))

    def broadcast(self, shape: tuple[int, ...]) -> np.ndarray:
        """The scale as float32, shaped to broadcast against codes of ``shape``."""
        if self.block is not None:
            return np.repeat(self.scale, self.block, axis=1).reshape(shape)
        if self.axis is None:
            return self.scale
        return self.scale.reshape([-1 if i == self.axis else 1 for i in range(len(shape))])

    def quantize(self, real: np.ndarray, dtype: str) -> np.ndarray:
        """Codes nearest to ``real`` (half to even), saturated to the range of ``dtype``."""
        (low, high), real = RANGE[dtype], np.asarray(real)
        scale, codes = np.broadcast_to(self.broadcast(real.shape), real.shape), np.empty(real.shape, NUMPY[dtype])
        for rows in row_blocks(real.shape):
            code = np.array(real[rows], np.float64)
            code /= scale[rows]
            np.rint(code, code)
            code += self.zero
            codes[rows] = np.clip(code, low, high, code)
        return codes

    def dequantize(self, code: np.ndarray) -> np.ndarray:
        """float32 values of ``code``: the product is rounded once, as DequantizeLinear does."""
        return (code.astype(np.int64) - self.zero).astype(np.float32) * self.broadcast(code.shape)


@dataclass(frozen=True)
class TensorType:
    """Static shape, dtype name (a key of NUMPY) and, for integer codes of real numbers, their encoding."""

    shape: tuple[int, ...]
    dtype: str = "f32"
    q: QParams | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return (self.size * BITS[self.dtype] + 7) // 8


@dataclass(frozen=True, eq=False)
class Value:
    """An SSA value; ``data`` holds the codes (or floats) of a constant."""

    name: str
    type: TensorType
    data: np.ndarray | None = field(default=None, repr=False)

    @property
    def const(self) -> bool:
        return self.data is not None
