"""rounding: the weights that the recipe's method chooses on data."""

from __future__ import annotations

from importlib import import_module

from edgeforge.data import Batches, Dataset
from edgeforge.ir.graph import Graph
from edgeforge.quantize.assign import Plan
from edgeforge.quantize.gptq import gptq
from edgeforge.quantize.layerwise import choose_layerwise
from edgeforge.recipe import LAYERWISE, Recipe

#: Values of ``Recipe.weights`` that look at data.
FROM_DATA = ("gptq", *LAYERWISE)


def round_weights(graph: Graph, plan: Plan, recipe: Recipe, data: Dataset, scales: str) -> tuple[Graph, Plan]:
    """``graph`` with weights on the grids of the encodings that ``plan`` then has; both stay as they are where the
    recipe's method needs no data. scales: see `gptq`."""
    if recipe.weights == "gptq":
        return gptq(graph, plan, Batches(data), scales)
    if recipe.weights not in LAYERWISE:
        return graph, plan
    choose = import_module(f"edgeforge.quantize.{recipe.weights}").choose
    return choose_layerwise(graph, plan, Batches(data), choose)
