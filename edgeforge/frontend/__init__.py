"""The doors: torch.export programs, .pt2 files and ONNX models become one float Graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeforge.ir.graph import Graph
from edgeforge.ir.types import TensorType


@dataclass(frozen=True)
class Imported:
    """A float graph and the encodings that its file carried (empty for float models).

    encodings: value name -> type with dtype and QParams; of activations the codes' type, of constants (weights,
    biases) the type whose codes reproduce the float data exactly. `quantize.keep.plan_from` makes a plan of them."""

    graph: Graph
    encodings: Mapping[str, TensorType] = field(default_factory=dict)


__all__ = ["Imported"]
