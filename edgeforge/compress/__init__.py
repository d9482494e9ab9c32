"""Rewrites of float graphs that leave the function unchanged and make it easier to quantize, and training on top.

A method is a file with ``apply(graph, config, recipe, target, data) -> Graph``; its config, of the same name, stands in
`edgeforge.recipe`."""

from __future__ import annotations

import importlib

from edgeforge.data import Dataset
from edgeforge.ir.graph import Graph
from edgeforge.ir.verify import verify
from edgeforge.recipe import Recipe
from edgeforge.target import Target


def compress(graph: Graph, recipe: Recipe, target: Target, data: Dataset) -> Graph:
    """The methods of ``recipe.compress``, in order."""
    for config in recipe.compress:
        method = importlib.import_module(f"edgeforge.compress.{config.method}")
        graph = verify(method.apply(graph, config, recipe, target, data))
    return graph
