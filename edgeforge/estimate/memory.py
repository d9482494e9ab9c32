"""Peak memory of a process that runs the model: what the runtime maps, and buffers that grow with the model.

    peak = sum of `amounts` times the target's rates

The rates are fitted to the peak memory of hosted phones (Android, NPU); the arena alone is `arena_bytes`."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.estimate.program import Program
from edgeforge.estimate.work import VTCM_BYTES, Precision, works

#: MB of the process, of the heap in DRAM once a layer does not fit on the chip, per 10 layers that run, and per MB of
#: everything else: where a fit starts.
START = {
    "process": 26.0, "spills": 50.0, "layers": 0.6, "weights_float": 1.0, "weights_integer": 2.0, "tables": 0.5,
    "ports": 1.0, "arena": 1.0, "traffic": 0.1,
}  # fmt: skip


def arena_bytes(program: Program, precision: Precision) -> float:
    """Bytes of activations alive at the worst layer, each from its producer to its last reader."""
    last = {name: i for i, layer in enumerate(program.layers) for name in layer.inputs}
    last |= dict.fromkeys(program.outputs, len(program.layers))
    alive = {name: program.size(name) for name in program.inputs}
    total = peak = sum(alive.values())
    ends: dict[int, list[str]] = {}
    for name, i in last.items():
        ends.setdefault(i, []).append(name)
    for i, layer in enumerate(program.layers):
        alive[layer.output] = program.size(layer.output)
        total += alive[layer.output]
        peak = max(peak, total)
        total -= sum(alive.pop(name, 0) for name in ends.get(i, ()))
    return peak * precision.activations / 8


def amounts(program: Program, precision: Precision) -> dict[str, float]:
    """Amounts of the terms of `START`. Ports are float32, as applications hand them over; tables are embeddings;
    traffic: bytes that layers read and write; spills: 1 where those of one are too many for the on-chip memory."""
    tables = sum(layer.weights for layer in program.layers if layer.op == "gather")
    kind = "float" if precision.name == "float" else "integer"
    found = works(program, precision)
    return dict.fromkeys(START, 0.0) | {
        "process": 1.0,
        "spills": float(any(work.moved_bytes > VTCM_BYTES for work in found)),
        "layers": sum(bool(work.amounts) for work in found) / 10,
        f"weights_{kind}": (program.weights - tables) * precision.weights / 8 / 1e6,
        "tables": tables * precision.weights / 8 / 1e6,
        "ports": sum(program.size(name) for name in (*program.inputs, *program.outputs)) * 4 / 1e6,
        "arena": arena_bytes(program, precision) / 1e6,
        "traffic": sum(work.moved_bytes for work in found) / 1e6,
    }


def peak_mb(program: Program, precision: Precision, rates: Mapping[str, float]) -> float:
    return sum(amount * rates[term] for term, amount in amounts(program, precision).items())
