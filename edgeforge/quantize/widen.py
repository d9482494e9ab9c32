"""widen: 16 bits for the few activations that 8 bits cannot hold, found on calibration data.

    mean over rows of |x - round(x)|^2 / |x|^2  >  recipe.widen   =>   x has 16 bits, and layers that read it take them

A row lies along the last axis (the features of a token). A range that rare rows widen, or that cuts them off, costs
most rows little of the total but much of their own, which a mean of squares over everything would not show. After
Qin, "The Uniqueness of LLaMA3-70B Series with Per-Channel Quantization" (arXiv:2408.15301): few layers break W8A8,
and only they are treated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeforge.data import Batches, Dataset
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import LAYERS
from edgeforge.quantize.assign import Groups, Plan
from edgeforge.recipe import Override, Recipe
from edgeforge.sim.evaluate import run_float

if TYPE_CHECKING:
    import torch

#: Rows count with at least this share of the median row's square.
LEAST = 1e-2


def widen(graph: Graph, plan: Plan, recipe: Recipe, data: Dataset) -> Recipe:
    """``recipe`` with overrides for what ``plan`` rounds too coarsely to 8 bits. Second operands of products stay as
    they are (hardware offers them 8 bits), a cache of keys and values with them."""
    groups = Groups(graph)
    second = {groups.find(node.inputs[1]) for node in graph.nodes if node.op == "matmul"}
    found: dict[str, list[np.ndarray]] = {}

    def see(node: Node, y: torch.Tensor) -> None:
        kind = plan.types.get(node.output)
        if kind is None or kind.dtype != "u8" or kind.q is None or groups.find(node.output) in second:
            return
        x = y.numpy()
        error = np.square(x - kind.q.dequantize(kind.q.quantize(x, kind.dtype))).mean(-1).ravel()
        size = np.square(x).mean(-1).ravel()
        found.setdefault(node.output, []).append(error / np.maximum(size, LEAST * np.median(size) + 1e-30))

    for batch in Batches(data):
        run_float(graph, batch, see)
    wide = {name for name, parts in found.items() if np.concatenate(parts).mean() > recipe.widen}
    overrides = [Override(match=name, output="a16") for name in found if name in wide]
    for node in graph.nodes:
        if node.op in LAYERS and node.inputs[0] in wide:
            overrides.append(
                Override(match=node.output, precision=plan.precision[node.output].name.replace("a8", "a16"))
            )
    return recipe.model_copy(update={"overrides": (*recipe.overrides, *overrides)})
