"""The facts of a report: one bundle's nodes, estimate, agreement and results. Nothing here knows about HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgeforge.bundle import Bundle, load_bundle
from edgeforge.devices.result import DEVICES, DeviceResult
from edgeforge.devices.store import bundle_hash, read_results
from edgeforge.errors import InvalidInput
from edgeforge.estimate.estimate import Estimate, estimate_program
from edgeforge.estimate.latency import chip_rates
from edgeforge.estimate.program import from_graph
from edgeforge.ir.graph import Graph
from edgeforge.ir.op import OPS
from edgeforge.ir.rules import RULES
from edgeforge.ir.types import RANGE
from edgeforge.sim.parity import NodeParity, sqnr_db
from edgeforge.sim.trace import record, shadow
from edgeforge.validate import Result, validate, validate_nodes

BINS = 32


@dataclass(frozen=True)
class NodeFacts:
    """One node. sqnr_db: simulator against the same graph in real numbers, over the golden samples. histogram: of its
    output codes, BINS bins over the range of the dtype. live_bytes: activations alive while it runs. us, bound: of the
    estimate; measured_us: by result name. parity: by backend, teacher-forced."""

    name: str
    op: str
    source: str
    dtype: str
    scale: float | None
    zero: int | None
    rule: str
    status: str
    sqnr_db: float | None
    histogram: tuple[int, ...]
    macs: int
    bytes: int
    live_bytes: int
    us: float | None = None
    bound: str = ""
    parity: dict[str, NodeParity] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """``roofs``: (MAC/s, bytes/s) of the estimate's model of the chip, None without an estimate. ``why_no_estimate``:
    or ""."""

    bundle: Bundle
    sha256: str
    nodes: tuple[NodeFacts, ...]
    agreement: tuple[Result, ...]
    results: tuple[DeviceResult, ...]
    estimate: Estimate | None
    roofs: tuple[float, float] | None
    why_no_estimate: str

    @property
    def name(self) -> str:
        m = self.bundle.manifest
        return " ".join(filter(None, (m.model, self.bundle.part, m.precision, "for", m.target)))

    @property
    def id(self) -> str:
        """Of its section in the page."""
        return f"b{self.sha256[:12]}{self.bundle.part}"

    def worst_first(self) -> list[NodeFacts]:
        """By SQNR; nodes without one (exact, or without a signal) last."""
        return sorted(self.nodes, key=lambda node: (node.sqnr_db is None, node.sqnr_db or 0.0))

    def latest(self, *sources: str) -> list[DeviceResult]:
        """The newest result per device and artifact from these sources, fastest first."""
        newest = {(r.device.name, r.artifact): r for r in self.results if r.source in sources}
        return sorted(newest.values(), key=lambda r: (r.p50_us is None, r.p50_us or 0.0))

    def devices(self) -> list[DeviceResult]:
        """The only results that may be compared as devices."""
        return self.latest(*DEVICES)


def gather(
    path: Path,
    run: bool = True,
    per_node: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> list[Facts]:
    """Everything a report says about the bundle at ``path``, per graph. run: also run every artifact that runs here on
    the golden vectors; else the simulator alone. per_node: backends whose nodes are compared one by one."""
    found = load_bundle(path)
    return [_gathered(replace(part, prefill=None), run, per_node, say) for part in found.parts]


def _gathered(bundle: Bundle, run: bool, per_node: Sequence[str], say: Callable[[str], None]) -> Facts:
    agreement = validate(bundle, only=() if run else ("simulator",), say=say)
    estimate, roofs, why = _estimated(bundle)
    say("simulating every node")
    nodes = _nodes(bundle, estimate, {name: validate_nodes(bundle, name, say=say) for name in per_node})
    results = tuple(r for r in read_results(bundle.path) if r.part == bundle.part)
    return Facts(bundle, bundle_hash(bundle.path), nodes, tuple(agreement), results, estimate, roofs, why)


def _estimated(bundle: Bundle) -> tuple[Estimate | None, tuple[float, float] | None, str]:
    precision = bundle.manifest.precision
    try:
        made = estimate_program(from_graph(bundle.graph), bundle.target, precision)
    except InvalidInput as error:
        return None, None, str(error)
    latency = bundle.target.latency
    assert latency is not None
    rates = chip_rates(latency.rates, latency.factors)["w8a16" if "a16" in precision else "w8a8"]
    # Rates are microseconds per million MACs and per kB.
    return made, (1e12 / min(rates["conv"], rates["dense"]), 1e9 / rates["weights"]), ""


def _nodes(bundle: Bundle, estimate: Estimate | None, parity: dict[str, list[NodeParity]]) -> tuple[NodeFacts, ...]:
    graph, target = bundle.graph, bundle.target
    feeds = bundle.golden_part("input")
    codes = record(graph, feeds, bundle.manifest.graph_hash, target.numerics).codes
    floats = shadow(graph, feeds)
    timed = {node.name: node for node in estimate.nodes} if estimate else {}
    agreed = {name: {node.node: node for node in nodes} for name, nodes in parity.items()}
    found = []
    for node, live in zip(graph.nodes, live_bytes(graph), strict=True):
        kind, cost, time = graph.type(node.output), OPS[node.op].cost(graph.view(node)), timed.get(node.output)
        real = codes[node.output] if kind.q is None else kind.q.dequantize(codes[node.output])
        found.append(
            NodeFacts(
                node.output,
                node.op,
                node.source,
                kind.dtype,
                None if kind.q is None else float(kind.q.scale),
                None if kind.q is None else kind.q.zero,
                node.rule or "move",
                RULES[node.rule].status if node.rule else "exact",
                sqnr_db(floats[node.output], real),
                histogram(codes[node.output], kind.dtype),
                cost.macs,
                cost.weight_bytes + cost.read_bytes + cost.write_bytes,
                live,
                time.us if time else None,
                time.bound if time else "",
                {name: nodes[node.output] for name, nodes in agreed.items() if node.output in nodes},
            )
        )
    return tuple(found)


def histogram(codes: np.ndarray, dtype: str) -> tuple[int, ...]:
    """Counts in BINS equal bins over all codes of ``dtype``."""
    low, high = RANGE.get(dtype, (int(codes.min(initial=0)), int(codes.max(initial=0)) + 1))
    return tuple(int(n) for n in np.histogram(codes, BINS, (low, high + 1))[0])


def live_bytes(graph: Graph) -> list[int]:
    """Bytes of activations alive while each node runs: from their producer to their last reader."""
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    alive = {name: graph.type(name).nbytes for name in graph.inputs}
    found = []
    for i, node in enumerate(graph.nodes):
        alive[node.output] = graph.type(node.output).nbytes
        found.append(sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, -1) > i}
    return found
