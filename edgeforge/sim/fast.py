"""The fast kernels: the same integers as `reference`, from floating-point units that are proved exact first.

A float32 sum of integers is exact while every partial sum stays below 2**24, a float64 sum below 2**53, in any order.
The bound is computed from the actual weights, so most convolutions run in float32. Rounding is one compiled pass over
the sums (`rounding`), with channels innermost in memory: images stay channels-last from node to node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from edgeforge.ir.graph import NodeView
from edgeforge.sim import rounding
from edgeforge.sim.reference import Array, Reference


def _exact_dtype(largest: int) -> torch.dtype:
    """The narrowest float whose partial sums up to ``largest`` are exact."""
    assert largest < 2**53, "verify proves that accumulators fit in int32"
    return torch.float32 if largest < 2**24 else torch.float64


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    array = array.astype(np.int32) if array.dtype == np.uint16 else array
    return torch.from_numpy(array).to(dtype)


class Fast(Reference):
    """Kernels on torch's float convolutions and matrix products. ``conv2d`` and ``matmul`` give their exact integers as
    float32 or float64."""

    def conv2d(self, x: Array, w: Array, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Array:
        largest = int(x.max(initial=0)) * int(np.abs(w.reshape(len(w), -1).astype(np.int64)).sum(1).max())
        dtype = _exact_dtype(largest)
        with torch.no_grad():
            inputs = _tensor(x, dtype).contiguous(memory_format=torch.channels_last)
            weights = _tensor(w, dtype).contiguous(memory_format=torch.channels_last)
            y = torch.nn.functional.conv2d(inputs, weights, None, stride, 0, dilation, groups)
            return y.contiguous(memory_format=torch.channels_last).numpy()

    def matmul(self, a: Array, b: Array) -> Array:
        columns = int(np.abs(b.astype(np.int64)).sum(-2).max(initial=0))
        dtype = _exact_dtype(int(np.abs(a.astype(np.int32)).max(initial=0)) * columns)
        with torch.no_grad():
            return torch.matmul(_tensor(a, dtype), _tensor(b, dtype)).numpy()

    def dot(
        self, n: NodeView, x: Array, w: Array, weight_sum: Array, bias: Array | None, product: Callable[[Array], Array]
    ) -> Array:
        finish = rounding.KERNELS.get(n.node.rule)
        if finish is None or weight_sum.ndim != 1 or not rounding.fits(n):
            return super().dot(n, x, w, weight_sum, bias, lambda part: product(part).astype(np.int64))
        added = np.asarray(n.fixed.get("bias", 0 if bias is None else bias), np.int64)
        offset = np.broadcast_to(n.zero(0) * weight_sum, weight_sum.shape)
        wide = n.node.rule == "htp16"
        sums = [_rows(product(part)) for part in ((x >> 8, x & 255) if wide else (x,))]
        base = added - ((offset + 128 >> 8) if wide else offset)
        codes = np.empty(sums[0].shape, np.uint16 if n.out.dtype == "u16" else np.uint8)
        finish(n, sums, np.broadcast_to(base, weight_sum.shape), codes)
        if n.node.op != "conv2d":
            return codes.reshape(*x.shape[:-1], -1)
        _, channels, height, width = n.out.shape
        return codes.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)


def _rows(sums: Array) -> Array:
    """View [positions, channels] of channels-last images, or of rows."""
    moved = sums.transpose(0, 2, 3, 1) if sums.ndim == 4 and sums.strides[1] == sums.itemsize else sums
    return moved.reshape(-1, moved.shape[-1])
