"""validate: every artifact of a bundle against the simulator and the float model, as far as it runs here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeforge import backends
from edgeforge.bundle import Bundle
from edgeforge.data import Dataset
from edgeforge.errors import BackendFailed, MissingDependency
from edgeforge.ir.graph import Graph
from edgeforge.quantize.convert import with_profile
from edgeforge.recipe import Bounds
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.parity import cosine, parity, sqnr_db

BATCH = 16


@dataclass
class Result:
    """One artifact's agreement. identical: share of output integers equal to the simulator's under the runtime's
    rounding rules; None where a float island feeds the output. sqnr_db, cosine: against the float
    model. source: how it ran."""

    backend: str
    ran: bool
    reason: str = ""
    identical: float | None = None
    max_lsb: int | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    metric: dict[str, Any] | None = None
    source: str = ""
    misses: list[str] = field(default_factory=list)


SOURCE = {"simulator": "simulated", "ort_qnn": "emulated (HTP on x86-64)", "executorch_qnn": "emulated (HTP on x86-64)"}


def validate(
    bundle: Bundle,
    data: Dataset | None = None,
    float_graph: Graph | None = None,
    only: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Run every built artifact. data: None takes the bundle's golden vectors (whose float outputs it holds);
    other data needs ``float_graph`` for the float figures (None leaves them empty)."""
    labels = None if data is None else data.labels
    if data is None:
        codes, reference = bundle.golden_part("input"), bundle.golden_part("float")
    else:
        say(f"reading {len(data)} samples of {data.name}" + (" and running the float model" if float_graph else ""))
        codes, reference = _read(bundle.graph, data, float_graph)
    expected: dict[str, dict[str, np.ndarray]] = {}
    results = []
    for name, record in bundle.manifest.backends.items():
        if only and name not in only:
            continue
        if record.status != "built":
            results.append(Result(name, False, record.reason))
            continue
        chosen = backends.backend(name)
        profile = chosen.numerics or bundle.target.numerics
        if profile not in expected:
            say(f"simulator ({profile})")
            graph = with_profile(bundle.graph, profile)
            expected[profile] = _batched(codes, lambda part, graph=graph: simulate(graph, part))
        say(name)
        try:
            got = (
                expected[profile]
                if name == "simulator"
                else chosen.run(bundle.artifact(name), bundle.graph, bundle.target, codes)
            )
        except (MissingDependency, BackendFailed) as error:
            results.append(Result(name, False, str(error)))
            continue
        result = _compare(bundle, name, got, expected[profile], reference, bool(record.islands))
        result.metric = _metric(bundle, got, reference, labels, codes)
        result.misses = _misses(bundle.recipe.bounds.get(name, bundle.recipe.bounds.get("*", Bounds())), result)
        results.append(result)
    return results


def _read(
    graph: Graph, data: Dataset, float_graph: Graph | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Input codes and float outputs of all samples; the real inputs are never all in memory."""
    codes, outputs = [], []
    for batch in data.batches(BATCH):
        codes.append(quantize_feeds(graph, batch))
        if float_graph is not None:
            outputs.append(run_float(float_graph, batch))
    return _joined(codes), _joined(outputs) if outputs else None


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batched(
    feeds: dict[str, np.ndarray], run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    count = len(next(iter(feeds.values())))
    return _joined([run({k: v[i : i + BATCH] for k, v in feeds.items()}) for i in range(0, count, BATCH)])


def _compare(bundle: Bundle, name: str, got: Any, expected: Any, reference: Any, islands: bool) -> Result:
    result = Result(name, True, source=SOURCE.get(name, "this host's CPU"))
    a, b = (np.concatenate([x[o].ravel() for o in bundle.graph.outputs]) for x in (got, expected))
    if not islands:
        result.identical, result.max_lsb = parity(a, b)
    if reference is not None:
        real = dequantize_outputs(bundle.graph, got)
        a, b = (np.concatenate([x[o].ravel() for o in bundle.graph.outputs]) for x in (reference, real))
        result.sqnr_db, result.cosine = sqnr_db(a, b), cosine(a, b)
    return result


def _metric(bundle: Bundle, got: Any, reference: Any, labels: np.ndarray | None, codes: Any) -> dict[str, Any] | None:
    kind, output = bundle.recipe.metric, bundle.graph.outputs[0]
    if kind == "top1" and labels is not None:

        def measure(logits: np.ndarray) -> float:
            return float((logits[:, bundle.recipe.class_offset :].argmax(1) == labels).mean())
    elif kind == "perplexity":
        ids = codes[bundle.graph.inputs[0]]

        def measure(logits: np.ndarray) -> float:
            return perplexity(logits, ids)
    else:
        return None
    real = dequantize_outputs(bundle.graph, got)[output]
    return {"name": kind, "value": measure(real), "float": None if reference is None else measure(reference[output])}


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """exp of the mean negative log-likelihood (nats) of the next token. logits [N, T, V], ids [N, T]."""
    x = logits[:, :-1].astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    chosen = np.take_along_axis(x, ids[:, 1:, None], -1)[..., 0]
    return float(np.exp((np.log(np.exp(x).sum(-1)) - chosen).mean()))


def _misses(bounds: Bounds, result: Result) -> list[str]:
    missed = []
    for name in ("identical", "sqnr_db", "cosine"):
        bound, value = getattr(bounds, name), getattr(result, name)
        if bound is not None and value is not None and value < bound:
            missed.append(f"{name} {value:.4g} is below the recipe's bound {bound}")
    return missed
