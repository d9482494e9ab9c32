"""A decoder block with even and with uneven channels, and data for it."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from edgeforge.compress.channels import find_channels
from edgeforge.data import Dataset, from_arrays
from edgeforge.frontend.torch import from_module
from edgeforge.ir.graph import Graph
from edgeforge.passes import optimize


class Block(nn.Module):
    """RMSNorm, attention of two query heads over one key/value head, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(16, 1e-5), nn.RMSNorm(16, 1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(16, size, bias=False) for size in (16, 8, 8, 16))
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q = self.q(y).reshape(1, 10, 2, 8).transpose(1, 2).reshape(1, 20, 8)
        mixed = torch.softmax(q @ self.k(y).transpose(1, 2) * 0.35, -1) @ self.v(y)
        x = x + self.o(mixed.reshape(1, 2, 10, 8).transpose(1, 2).reshape(1, 10, 16))
        y = self.norm2(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


@functools.cache
def block() -> Graph:
    torch.manual_seed(0)
    return optimize(from_module(Block().eval(), (torch.zeros(1, 10, 16),), "block").graph)


class Stack(nn.Module):
    """Two blocks, named as the layers of a decoder are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))


@functools.cache
def stack() -> Graph:
    torch.manual_seed(0)
    return optimize(from_module(Stack().eval(), (torch.zeros(1, 10, 16),), "stack").graph)


@functools.cache
def uneven(graph: Graph | None = None) -> Graph:
    """The block with channels of very unequal size: each scale is exp of a normal number of deviation 2."""
    graph = graph or block()
    channels = find_channels(graph)
    return channels.rescale(graph, np.random.default_rng(0).normal(0, 2, channels.count))


@functools.cache
def data(count: int = 24) -> Dataset:
    x = np.random.default_rng(1).normal(size=(count, 10, 16)).astype(np.float32)
    return from_arrays("random", {block().inputs[0]: x}, block())
