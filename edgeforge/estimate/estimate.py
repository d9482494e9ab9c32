"""What `edgeforge estimate` answers: the model's time, energy and memory on a target, with intervals and causes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from edgeforge.errors import InvalidInput
from edgeforge.estimate import decoder as llm
from edgeforge.estimate.energy import UNCERTAINTY as ENERGY_UNCERTAINTY
from edgeforge.estimate.energy import energy
from edgeforge.estimate.latency import layer_precision, spread, times
from edgeforge.estimate.memory import UNCERTAINTY as MEMORY_UNCERTAINTY
from edgeforge.estimate.memory import arena_bytes, peak_mb
from edgeforge.estimate.program import Program
from edgeforge.estimate.work import GROUPS, PRECISIONS, TERMS
from edgeforge.target import Latency, Target

NOTE = "estimated, not measured"
DEFAULT_VTCM_BYTES = 8e6


@dataclass(frozen=True)
class Range:
    """An estimated number and its 80 % interval. It prints as estimated; there is no other way to print it."""

    p50: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, factor: float) -> Range:
        return cls(value, *spread(value, factor))

    def __str__(self) -> str:
        return f"{self.p50:.4g} ({self.low:.4g} to {self.high:.4g}, {NOTE})"


@dataclass(frozen=True)
class NodeEstimate:
    """``bound``: mac, vector, overhead or ddr; "fused": computed inside the layer before."""

    name: str
    op: str
    source: str
    us: float
    bound: str
    macs: int


@dataclass(frozen=True)
class Estimate:
    """latency_ms: per inference (per token for a decoder). ``notes``: what limits the estimate."""

    model: str
    target: str
    precision: str
    latency_ms: Range
    energy_mj: Range
    peak_memory_mb: Range
    calibrated: bool
    nodes: tuple[NodeEstimate, ...] = ()
    bound_ms: dict[str, float] | None = None
    arena_mb: float | None = None
    tokens_per_second: Range | None = None
    first_token_ms: Range | None = None
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "source": "estimated", "note": NOTE}


def priced(target: Target) -> Latency:
    """The target's latency parameters. Raises InvalidInput where there are none."""
    if target.latency is None or not target.latency.rates:
        raise InvalidInput(
            f"{target.name} has no latency rates -> choose a Hexagon target (edgeforge targets), or a YAML with"
            " `base: hexagon-v73` and `edgeforge calibrate`"
        )
    return target.latency


def rates_of(latency: Latency) -> dict[str, dict[str, float]]:
    """precision -> term -> microseconds per unit on this chip."""
    factors = latency.factors
    common = factors.get("all", {}).get("all", 1.0)
    group_of = {term: group for group, terms in GROUPS.items() for term in terms}

    def factor(precision: str, term: str) -> float:
        by_group = factors.get("group", {}).get(group_of[term], 1.0)
        return (
            common
            * by_group
            * factors.get("precision", {}).get(precision, 1.0)
            * factors.get("term", {}).get(term, 1.0)
        )

    return {name: {term: rate[term] * factor(name, term) for term in TERMS} for name, rate in latency.rates.items()}


def interval(latency: Latency) -> tuple[float, bool, tuple[str, ...]]:
    """Factor of the 80 % interval, whether the chip is calibrated, and what to say about it."""
    if not latency.factors:
        note = "no measurements of this chip: a typical chip's speed -> edgeforge calibrate with 10 or more models"
        return latency.interval["uncalibrated"], False, (note,)
    few = float(latency.calibration.get("workloads", 0)) < 20
    return latency.interval["few" if few else "calibrated"], True, ()


def estimate_program(program: Program, target: Target, precision: str) -> Estimate:
    """Estimate one inference. precision: float, w8a8, w8a16, w4a8 or w4a16; an integer graph's own widths win.

    Raises InvalidInput for a target without rates or an unknown precision."""
    latency = priced(target)
    chosen = PRECISIONS.get(precision.partition("-b")[0])
    if chosen is None:
        raise InvalidInput(f"precision {precision!r} -> one of {', '.join(PRECISIONS)}")
    if not program.layers:
        raise InvalidInput(f"{program.name} has no operations to estimate")
    vtcm = target.figures["vtcm"].value * 1e6 if "vtcm" in target.figures else DEFAULT_VTCM_BYTES
    parts = times(program, chosen, rates_of(latency), vtcm)
    total = sum(part.us for part in parts)
    factor, calibrated, notes = interval(latency)
    bounds: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for part in parts:
        bounds[part.bound] += part.us / 1e3
        macs[layer_precision(part.layer, chosen).name] += part.layer.macs
    moved = sum(part.moved_bytes for part in parts)
    spilled = sum(part.moved_bytes for part in parts if part.moved_bytes > vtcm)
    used = energy(macs, moved, sum(part.weight_bytes for part in parts) + spilled, total)
    nodes = tuple(NodeEstimate(p.layer.output, p.layer.op, p.layer.source, p.us, p.bound, p.layer.macs) for p in parts)
    return Estimate(
        program.name,
        target.name,
        precision,
        Range.around(total / 1e3, factor),
        Range.around(used.total_mj, ENERGY_UNCERTAINTY),
        Range.around(peak_mb(program, chosen), MEMORY_UNCERTAINTY),
        calibrated,
        nodes,
        {bound: bounds[bound] for bound in GROUPS if bound in bounds},
        arena_bytes(program, chosen) / 1e6,
        notes=notes,
    )


def estimate_decoder(name: str, model: llm.Decoder, target: Target, context: int) -> Estimate:
    """Estimate a decoder language model at w4a16: one token at the end of ``context``, and the first chunk."""
    latency = priced(target)
    if not latency.llm:
        raise InvalidInput(f"{target.name} has no language-model rates -> choose a target that was measured with them")
    if context < 1:
        raise InvalidInput(f"context {context} -> at least 1")
    decode, chunk = llm.times_us(model, context, latency.llm)
    factor = latency.interval["llm"]
    weights = model.parameters * model.weight_bits / 8
    dram = weights + model.kv_bytes(context)
    used = energy({"w8a16": float(model.parameters)}, dram, dram, decode)
    return Estimate(
        name,
        target.name,
        "w4a16",
        Range.around(decode / 1e3, factor),
        Range.around(used.total_mj, ENERGY_UNCERTAINTY),
        Range.around((dram + model.width * model.vocab) / 1e6, MEMORY_UNCERTAINTY),
        bool(latency.factors),
        tokens_per_second=Range.around(1e6 / decode, factor),
        first_token_ms=Range.around(chunk / 1e3, factor),
        notes=(
            f"tokens per second with {context} tokens of context; first token of a prompt up to {llm.CHUNK} tokens",
        ),
    )
