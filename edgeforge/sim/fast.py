"""The fast kernels: the same integers as `reference`, from floating-point units that are proved exact first.

A float32 sum of integers is exact while every partial sum stays below 2**24, a float64 sum below 2**53, in any order.
The bound is computed from the actual weights, so most convolutions run in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgeforge.sim.reference import Array, Reference


def _exact_dtype(largest: int) -> torch.dtype:
    """The narrowest float whose partial sums up to ``largest`` are exact."""
    assert largest < 2**53, "verify proves that accumulators fit in int32"
    return torch.float32 if largest < 2**24 else torch.float64


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    array = array.astype(np.int32) if array.dtype == np.uint16 else array
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


class Fast(Reference):
    """Kernels on torch's float convolutions and matrix products."""

    def conv2d(self, x: Array, w: Array, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Array:
        peak = int(x.max(initial=0))
        largest = peak * int(np.abs(w.reshape(len(w), -1).astype(np.int64)).sum(1).max())
        dtype = _exact_dtype(largest)
        with torch.no_grad():
            inputs = _tensor(x, dtype).to(memory_format=torch.channels_last)
            y = torch.nn.functional.conv2d(inputs, _tensor(w, dtype), None, stride, 0, dilation, groups)
            return y.to(torch.int64).contiguous().numpy()

    def matmul(self, a: Array, b: Array) -> Array:
        largest = int(np.abs(a.astype(np.int32)).max(initial=0)) * int(
            np.abs(b.astype(np.int64)).sum(-2).max(initial=0)
        )
        dtype = _exact_dtype(largest)
        with torch.no_grad():
            return torch.matmul(_tensor(a, dtype), _tensor(b, dtype)).to(torch.int64).numpy()
