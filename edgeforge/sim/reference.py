"""The readable kernels: NumPy int64, no tricks. Everything faster is tested against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import CONVOLUTIONS, OPS
from edgeforge.ir.rules import RULES
from edgeforge.ir.rules.htp import join_bytes

Array = np.ndarray


class Reference:
    """The primitives that the ``integer`` column of the op table is written in. Arrays hold codes."""

    def threads(self) -> AbstractContextManager[None]:
        """What a whole run of a graph takes place in."""
        return nullcontext()

    def run(self, n: NodeView, *codes: Array) -> Array:
        """One node: output codes from input codes."""
        return OPS[n.node.op].integer(self, n, *codes)

    def pad(self, x: Array, widths: Sequence[tuple[int, int]], code: int) -> Array:
        return np.pad(x, widths, constant_values=code) if any(map(any, widths)) else x

    def windows(
        self, x: Array, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1)
    ) -> Array:
        """View [N, C, Y, X, KH, KW] of the sliding windows of x [N, C, H, W]."""
        reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
        view = np.lib.stride_tricks.sliding_window_view(x, reach, (2, 3))
        return view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]

    def conv2d(self, x: Array, w: Array, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Array:
        """Exact sums [N, O, Y, X] in int64 of padded codes x [N, C, H, W] with weights w [O, C/groups, KH, KW]."""
        view = self.windows(x, w.shape[2:], stride, dilation).astype(np.int64)
        batch, channels, height, width, kh, kw = view.shape
        view = view.reshape(batch, groups, channels // groups, height, width, kh, kw)
        weights = w.astype(np.int64).reshape(groups, -1, *w.shape[1:])
        sums = np.einsum("ngcyxij,gocij->ngoyx", view, weights, optimize=True)
        return sums.reshape(batch, -1, height, width)

    def matmul(self, a: Array, b: Array) -> Array:
        """Exact sums in int64."""
        return np.matmul(a.astype(np.int64), b.astype(np.int64))

    def dot(
        self, n: NodeView, x: Array, w: Array, weight_sum: Array, bias: Array | None, product: Callable[[Array], Array]
    ) -> Array:
        """Requantized dot products. product(part) gives the exact sums of uncentered codes with the weights w;
        weight_sum (per output channel) takes the zero point out again."""
        offset, added = n.zero(0) * weight_sum, n.fixed.get("bias", bias)
        added = np.int64(0) if added is None else added.astype(np.int64)
        if n.node.op in CONVOLUTIONS:
            offset, added = offset.reshape(-1, 1, 1), added.reshape(-1, 1, 1) if added.ndim else added
        rule = RULES[n.node.rule]
        if rule.bytewise:
            return rule.apply(n, join_bytes(product(x >> 8), product(x & 255), offset) + added)
        return rule.apply(n, product(x) - offset + added)

    def apply(self, n: NodeView, *codes: Array) -> Array:
        """The node's rounding rule on already prepared operands."""
        return RULES[n.node.rule].apply(n, *codes)

    table = apply
