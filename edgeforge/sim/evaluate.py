"""The evaluator of both levels: integer graphs through the op table's ``integer`` column, float graphs through
its ``torch`` column. Batches of any size run through graphs declared with batch 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import OPS
from edgeforge.ir.types import NUMPY, RANGE

#: Called after each node with its codes (or floats); used for traces, calibration and parity.
Observer = Callable[[Node, Any], None]


def simulate(
    graph: Graph, feeds: Mapping[str, np.ndarray], kernels: Any = None, observe: Observer | None = None
) -> dict[str, np.ndarray]:
    """Run an integer graph: codes in, codes out, by value name. A float graph (dynamic linears) runs as `run_float`.

    Raises InvalidInput when a feed's name, dtype or shape (past the batch dimension) is not the graph's."""
    if graph.level == "float":
        return run_float(graph, feeds, observe)
    check_feeds(graph, feeds)
    if kernels is None:
        from edgeforge.sim.fast import Fast

        kernels = Fast()
    constants = {value.name: value.data for value in graph.constants()}
    with kernels.threads():
        return _walk(graph, {**constants, **feeds}, kernels.run, observe)


def run_float(graph: Graph, feeds: Mapping[str, np.ndarray], observe: Observer | None = None) -> dict[str, np.ndarray]:
    """Run a float graph in torch float32; arrays in, arrays out, by value name."""
    import torch

    assert graph.level == "float", graph.level
    check_feeds(graph, feeds)
    # Torch aligns its own memory alike in every run; on NumPy's, vectorized sums vary in order and so in the last bit.
    # Weights that torch made are aligned already, and stay where they are.
    real = {
        value.name: value.data if value.type.q is None else value.type.q.dequantize(value.data)
        for value in graph.constants()
        if value.data is not None
    }
    constants = {
        name: torch.tensor(data) if data.ctypes.data % 64 else torch.from_numpy(data) for name, data in real.items()
    }
    inputs = {name: torch.tensor(array) for name, array in feeds.items()}
    with torch.no_grad():
        outputs = _walk(graph, {**constants, **inputs}, lambda n, *xs: OPS[n.node.op].torch(torch, n, *xs), observe)
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def _walk(graph: Graph, known: dict[str, Any], step: Callable[..., Any], observe: Observer | None) -> dict[str, Any]:
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    outputs = {name: known[name] for name in graph.outputs if name in known}
    for i, node in enumerate(graph.nodes):
        result = step(graph.view(node), *(known[name] for name in node.inputs))
        if observe is not None:
            observe(node, result)
        known[node.output] = result
        if node.output in graph.outputs:
            outputs[node.output] = result
        for name in {*node.inputs, node.output}:
            if last_use.get(name, -1) <= i:
                known.pop(name, None)
    return outputs


def check_feeds(graph: Graph, feeds: Mapping[str, np.ndarray]) -> None:
    """Raise InvalidInput unless the feeds are the graph's inputs, in dtype, shape and range."""
    if set(feeds) != set(graph.inputs):
        raise InvalidInput(f"inputs are {sorted(graph.inputs)}, got {sorted(feeds)}")
    for name, array in feeds.items():
        kind = graph.type(name)
        if array.dtype != NUMPY[kind.dtype]:
            raise InvalidInput(f"input {name}: expected {NUMPY[kind.dtype]} codes, got {array.dtype}")
        if array.ndim != len(kind.shape) or (array.ndim and array.shape[1:] != kind.shape[1:]):
            raise InvalidInput(f"input {name}: expected shape {kind.shape} (any batch), got {array.shape}")
        if kind.dtype == "i64" and array.size:
            _check_ids(graph, name, array)


def _check_ids(graph: Graph, name: str, ids: np.ndarray) -> None:
    for node in graph.users()[name]:
        rows = graph.type(node.inputs[0]).shape[0] if node.op == "gather" else None
        if rows is not None and (ids.min() < 0 or ids.max() >= rows):
            raise InvalidInput(f"input {name}: ids must lie in 0..{rows - 1}, got {ids.min()}..{ids.max()}")


def quantize_feeds(graph: Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Real inputs -> the codes an integer graph takes (ids and floats pass unchanged)."""
    codes = {}
    for name, array in feeds.items():
        kind = graph.type(name)
        codes[name] = array.astype(NUMPY[kind.dtype]) if kind.q is None else kind.q.quantize(array, kind.dtype)
    return codes


def read_feeds(graph: Graph, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes for an integer graph from arrays [N, ...] by input name, each either codes (by its dtype) or real numbers.

    Raises InvalidInput on a missing input, another dtype or shape, and on numbers that are not finite."""
    missing = [name for name in graph.inputs if name not in arrays]
    if missing:
        raise InvalidInput(f"no array for input {', '.join(missing)} (there are {', '.join(arrays) or 'none'})")
    codes = {}
    for name in graph.inputs:
        kind, array = graph.type(name), np.asarray(arrays[name])
        wanted = {"i64": "integer ids", "f32": "float values"}.get(kind.dtype, f"{kind.dtype} codes or float values")
        if kind.q is None and array.dtype.kind in ("f" if kind.dtype == "f32" else "iu"):
            codes[name] = array.astype(NUMPY[kind.dtype])
        elif kind.q is not None and array.dtype == NUMPY[kind.dtype]:
            codes[name] = array
        elif kind.q is not None and array.dtype.kind == "f":
            if not np.isfinite(array).all():
                raise InvalidInput(f"input {name} holds NaN or infinity")
            codes[name] = kind.q.quantize(array, kind.dtype)
        else:
            raise InvalidInput(f"input {name} holds {array.dtype}, expected {wanted}")
    check_feeds(graph, codes)
    return codes


def dequantize_outputs(graph: Graph, codes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes by value name -> float32 values."""
    real = {}
    for name, array in codes.items():
        q = graph.type(name).q
        real[name] = array if q is None else q.dequantize(array)
    return real


__all__ = ["RANGE", "check_feeds", "dequantize_outputs", "quantize_feeds", "read_feeds", "run_float", "simulate"]
