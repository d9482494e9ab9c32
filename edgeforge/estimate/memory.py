"""Peak memory of a process that runs the model: what the runtime maps, and buffers that grow with the model.

    peak = fixed + a * weights + b * inputs and outputs + c * largest activation + d * all activations + e * layers

fitted to the peak memory of 170 hosted measurements (Android, NPU); the arena alone is `arena_bytes`."""

from __future__ import annotations

from edgeforge.estimate.program import Program
from edgeforge.estimate.work import Precision

FIXED_MB, PER_LAYER_MB = 25.8, 0.0616
WEIGHTS, PORTS, LARGEST, ALL = 2.02, 1.36, 2.7, 0.22
#: 80 % of the fitted rows lie within x / this to x * this.
UNCERTAINTY = 1.8


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


def peak_mb(program: Program, precision: Precision) -> float:
    width = precision.activations / 8 / 1e6
    sizes = [program.size(layer.output) for layer in program.layers] or [0]
    stored = sum(layer.weights for layer in program.layers) * precision.weights / 8 / 1e6
    ports = sum(program.size(name) for name in (*program.inputs, *program.outputs))
    return (
        FIXED_MB
        + PER_LAYER_MB * len(program.layers)
        + WEIGHTS * stored
        + width * (PORTS * ports + LARGEST * max(sizes) + ALL * sum(sizes))
    )
