"""What `edgeforge estimate` answers: the model's time, energy and memory on a target, with intervals and causes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from edgeforge.errors import InvalidInput
from edgeforge.estimate import decoder as llm
from edgeforge.estimate.energy import UNCERTAINTY as ENERGY_UNCERTAINTY
from edgeforge.estimate.energy import Energy, energy
from edgeforge.estimate.latency import Part, chip_rates, layer_precision, times
from edgeforge.estimate.memory import arena_bytes, peak_mb
from edgeforge.estimate.program import Program
from edgeforge.estimate.work import GROUPS, PRECISIONS, VTCM_BYTES
from edgeforge.target import Latency, Target

NOTE = "estimated, not measured"
#: With fewer measured models than this a chip's interval stays wider.
ENOUGH = 20


@dataclass(frozen=True)
class Range:
    """An estimated number and its 80 % interval. It prints as estimated; there is no other way to print it."""

    p50: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, factor: float) -> Range:
        return cls(value, value / factor, value * factor)

    def __str__(self) -> str:
        return f"{self.p50:.4g} ({self.low:.4g} to {self.high:.4g}, {NOTE})"


@dataclass(frozen=True)
class NodeEstimate:
    """``bound``: compute, vector, overhead or ddr; "fused": computed inside the layer before, or a view. weight_bytes
    come from DRAM; activation_bytes are read and written, as stored in tiles; dram_bytes: of both what DRAM moves."""

    name: str
    op: str
    source: str
    us: float
    bound: str
    macs: int
    weight_bytes: float
    activation_bytes: float
    dram_bytes: float


@dataclass(frozen=True)
class Roofs:
    """The two bounds of a roofline: GMAC/s of a dense convolution and GB/s of DRAM, fitted, not a peak."""

    gmacs_per_second: float
    gbytes_per_second: float


@dataclass(frozen=True)
class Estimate:
    """latency_ms: per inference (per token for a decoder). bound_ms: milliseconds by what they are bound by.
    ``notes``: what limits the estimate."""

    model: str
    target: str
    precision: str
    latency_ms: Range
    energy_mj: Range
    energy_parts: Energy
    peak_memory_mb: Range
    calibrated: bool
    nodes: tuple[NodeEstimate, ...] = ()
    roofs: Roofs | None = None
    bound_ms: dict[str, float] | None = None
    arena_mb: float | None = None
    tokens_per_second: Range | None = None
    first_token_ms: Range | None = None
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """For ``--json``: memory and speed as plain numbers, their intervals beside them."""
        found = asdict(self)
        found["energy_mj"] |= {"parts": found.pop("energy_parts"), "note": NOTE}
        for key in ("peak_memory_mb", "tokens_per_second"):
            whole = found[key]
            found[key] = whole and whole["p50"]
            found[f"{key}_interval"] = whole and [whole["low"], whole["high"]]
        return {**found, "source": "estimated", "note": NOTE}


@dataclass(frozen=True)
class Elsewhere:
    """A measurement of the same model and precision on another chip."""

    target: Target
    latency_ms: float


def priced(target: Target) -> Latency:
    """The target's latency parameters. Raises InvalidInput where there are none."""
    if target.latency is None or not target.latency.rates:
        raise InvalidInput(
            f"{target.name} has no latency rates -> choose a Hexagon target (edgeforge targets), or a YAML with"
            " `base: hexagon-v73` and `edgeforge calibrate`"
        )
    return target.latency


def interval(latency: Latency) -> tuple[float, bool, tuple[str, ...]]:
    """Factor of the 80 % interval, whether the chip is calibrated, and what to say about it."""
    if not latency.factors:
        note = "no measurements of this chip: a typical chip's speed -> edgeforge calibrate with 10 or more models"
        return latency.interval["uncalibrated"], False, (note,)
    count = latency.calibration.get("workloads", 0)
    if float(count) < ENOUGH:
        return latency.interval["few"], True, (f"calibrated with {count:.0f} measurements only: a wider interval",)
    return latency.interval["calibrated"], True, ()


def offered(target: Target, precision: str) -> str:
    """``precision`` without its block size. Raises InvalidInput where the target does not offer it."""
    known = (*(("float",) if target.fp16 else ()), *target.precisions)
    name = precision.partition("-b")[0]
    if name not in PRECISIONS or precision not in known:
        raise InvalidInput(f"{target.name} does not offer precision {precision!r} -> one of {', '.join(known)}")
    return name


def estimate_program(program: Program, target: Target, precision: str, elsewhere: Elsewhere | None = None) -> Estimate:
    """Estimate one inference. precision: float, w8a8, w8a16, w4a8 or w4a16; an integer graph's own widths win.

    Raises InvalidInput for a target without rates or a precision that it does not offer."""
    latency = priced(target)
    chosen = PRECISIONS[offered(target, precision)]
    if not program.layers:
        raise InvalidInput(f"{program.name} has no operations to estimate")
    rates = chip_rates(latency.rates, latency.factors)
    parts = times(program, chosen, rates, latency.factors.get("tenfold", {}).get("tenfold", 1.0))
    total = sum(part.us for part in parts)
    factor, calibrated, notes = interval(latency)
    if elsewhere is not None:
        there = estimate_program(program, elsewhere.target, precision)
        ratio = elsewhere.latency_ms / there.latency_ms.p50
        notes += (f"the estimate for {elsewhere.target.name} was corrected x {ratio:.2f} by its measurement",)
        factor = latency.interval["carried"] if calibrated and there.calibrated else factor
    else:
        ratio = 1.0
    bounds: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for part in parts:
        bounds[part.bound] += part.us * ratio / 1e3
        macs[layer_precision(part.layer, chosen).name] += part.layer.macs
    nodes = tuple(_node(part, ratio) for part in parts)
    moved, dram = sum(node.activation_bytes for node in nodes), sum(node.dram_bytes for node in nodes)
    used = energy(macs, moved, dram, total * ratio)
    return Estimate(
        program.name,
        target.name,
        precision,
        Range.around(total * ratio / 1e3, factor),
        Range.around(used.total_mj, ENERGY_UNCERTAINTY),
        used,
        Range.around(peak_mb(program, chosen, latency.memory), latency.interval["memory"]),
        calibrated,
        nodes,
        Roofs(1e3 / rates[chosen.name]["conv"], 1 / rates[chosen.name]["weights"]),
        {bound: bounds[bound] for bound in GROUPS if bound in bounds},
        arena_bytes(program, chosen) / 1e6,
        notes=notes,
    )


def _node(part: Part, ratio: float) -> NodeEstimate:
    """A layer's estimate, its time corrected by ``ratio``. Activations beyond the on-chip memory go through DRAM."""
    spilled = part.moved_bytes if part.moved_bytes > VTCM_BYTES else 0.0
    layer = part.layer
    return NodeEstimate(
        layer.output, layer.op, layer.source, part.us * ratio, part.bound, layer.macs,
        part.weight_bytes, part.moved_bytes, part.weight_bytes + spilled,
    )  # fmt: skip


def estimate_decoder(name: str, model: llm.Decoder, target: Target, context: int) -> Estimate:
    """Estimate a decoder language model at w4a16: one token at the end of ``context``, and the first chunk."""
    latency = priced(target)
    offered(target, "w4a16")
    if context < 1:
        raise InvalidInput(f"context {context} -> at least 1")
    decode, chunk = llm.times_us(model, context, latency.llm)
    known = bool(latency.calibration.get("llm_rows"))
    factor = latency.interval["llm" if known else "uncalibrated"]
    notes = (f"per token with {context} tokens of context; first_token_ms: of a prompt up to {llm.CHUNK} tokens",)
    if not known:
        notes += ("no measured language models on this chip: a typical chip's speed",)
    dram = model.token_bytes(context)
    used = energy({"w8a16": float(model.parameters)}, dram, dram, decode)
    return Estimate(
        name,
        target.name,
        "w4a16",
        Range.around(decode / 1e3, factor),
        Range.around(used.total_mj, ENERGY_UNCERTAINTY),
        used,
        Range.around((dram + model.embedding_bytes) / 1e6, latency.interval["memory"]),
        known,
        bound_ms=llm.bounds_ms(model, context, latency.llm),
        tokens_per_second=Range.around(1e6 / decode, factor),
        first_token_ms=Range.around(chunk / 1e3, factor),
        notes=notes,
    )
