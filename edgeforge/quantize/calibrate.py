"""calibrate: run the float graph on data and learn the range of every activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph, Node
from edgeforge.quantize.ranges import METHODS, Histogram
from edgeforge.sim.evaluate import run_float

Batch = Mapping[str, np.ndarray]
Range = tuple[float, float]


def calibrate(
    graph: Graph,
    batches: Iterable[Batch],
    method: str = "minmax",
    bits: Mapping[str, int] | None = None,
    percentile: float = 99.99,
) -> dict[str, Range]:
    """Ranges by value name, of the inputs and of every node's output.

    method: "minmax" | "percentile" | "mse" | "entropy"; all but minmax make a second pass over ``batches`` (a
    re-iterable). bits: of each value, 8 where nothing is said. Raises InvalidInput on no data, and on NaN or infinity
    (naming batch and value)."""
    if method not in METHODS:
        raise InvalidInput(f"calibration method {method!r} is unknown -> one of {', '.join(METHODS)}")
    seen: dict[str, Range] = {}

    def widen(name: str, values: np.ndarray, number: int) -> None:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low) or not np.isfinite(high):
            raise InvalidInput(
                f"calibration sample {number}: {name} holds NaN or infinity"
                " -> remove the sample or fix the preprocessing"
            )
        if name in seen:
            low, high = min(low, seen[name][0]), max(high, seen[name][1])
        seen[name] = (low, high)

    _visit(graph, batches, widen)
    if not seen:
        raise InvalidInput("calibration data holds no sample -> give at least one")
    if method == "minmax":
        return seen
    histograms = {name: Histogram(*limits) for name, limits in seen.items()}
    _visit(graph, batches, lambda name, values, number: histograms[name].add(values))
    width = bits or {}
    return {name: METHODS[method](found, width.get(name, 8), percentile) for name, found in histograms.items()}


def _visit(graph: Graph, batches: Iterable[Batch], see: Callable[[str, np.ndarray, int], None]) -> None:
    for number, batch in enumerate(batches):
        for name in graph.inputs:
            if graph.type(name).dtype == "f32":
                see(name, np.asarray(batch[name]), number)

        def observe(node: Node, tensor: object, number: int = number) -> None:
            see(node.output, tensor.numpy(), number)  # type: ignore[attr-defined]

        run_float(graph, batch, observe)
