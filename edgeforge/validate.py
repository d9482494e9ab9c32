"""validate: every artifact of a bundle against the simulator and the float model, as far as it runs here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge import backends
from edgeforge.bundle import Bundle
from edgeforge.data import Dataset
from edgeforge.errors import BackendFailed, InvalidInput, MissingDependency
from edgeforge.ir.graph import Graph
from edgeforge.progress import track
from edgeforge.quantize.convert import with_profile
from edgeforge.recipe import Bounds, Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.parity import NodeParity, cosine, explode, exploded_feeds, parity, per_node, sqnr_db, trace

BATCH = 16


@dataclass
class Result:
    """One artifact's agreement. identical: share of output integers equal to the simulator's under the runtime's
    rounding rules; None where a float island feeds the output. sqnr_db, cosine: against the float
    model. source: how it ran. part: which graph of a language model."""

    backend: str
    ran: bool
    reason: str = ""
    identical: float | None = None
    max_lsb: int | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    metric: dict[str, Any] | None = None
    source: str = ""
    part: str = ""
    misses: list[str] = field(default_factory=list)


def validate(
    bundle: Bundle,
    data: Dataset | None = None,
    float_graph: Graph | None = None,
    only: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Run every built artifact. data: None takes the bundle's golden vectors (whose float outputs it holds);
    other data needs ``float_graph`` for the float figures (None leaves them empty)."""
    if bundle.prefill is not None:
        assert data is None, "golden steps are what the graphs of a language model are compared on"
        parts = [replace(part, prefill=None) for part in bundle.parts]
        return [replace(r, part=part.part) for part in parts for r in validate(part, None, None, only, say)]
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
        say(f"{name} {bundle.part}".rstrip())
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
        if not bundle.part:
            result.metric = task_metric(bundle.recipe, bundle.graph, got, reference, labels, codes)
        result.misses = _misses(bundle.recipe.bounds.get(name, bundle.recipe.bounds.get("*", Bounds())), result)
        results.append(result)
    return results


def _read(
    graph: Graph, data: Dataset, float_graph: Graph | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Input codes and float outputs of all samples; the real inputs are never all in memory."""
    codes, outputs = [], []
    for batch in track(data.batches(BATCH), -(-len(data) // BATCH), "reading"):
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
    result = Result(name, True, source=backends.backend(name).source)
    a, b = (np.concatenate([x[o].ravel() for o in bundle.graph.outputs]) for x in (got, expected))
    if not islands:
        result.identical, result.max_lsb = parity(a, b)
    if reference is not None:
        real = dequantize_outputs(bundle.graph, got)
        a, b = (np.concatenate([x[o].ravel() for o in bundle.graph.outputs]) for x in (reference, real))
        result.sqnr_db, result.cosine = sqnr_db(a, b), cosine(a, b)
    return result


def task_metric(
    recipe: Recipe, graph: Graph, got: Any, reference: Any, labels: np.ndarray | None, codes: Any
) -> dict[str, Any] | None:
    """The task metric of output codes ``got`` and of the float outputs; top-1 also counts the samples that turned from
    right to wrong (``lost``) and from wrong to right (``gained``)."""
    output = graph.outputs[0]
    logits = [dequantize_outputs(graph, got)[output]]
    if reference is not None:
        logits.append(reference[output])
    flips = {}
    if recipe.metric == "top1" and labels is not None:
        right = [x[:, recipe.class_offset :].argmax(1) == labels for x in logits]
        values = [float(r.mean()) for r in right]
        if reference is not None:
            lost, gained = right[1] & ~right[0], right[0] & ~right[1]
            flips = {"lost": int(lost.sum()), "gained": int(gained.sum())}
    elif recipe.metric == "perplexity":
        values = [perplexity(x, codes[graph.inputs[0]]) for x in logits]
    else:
        return None
    return {"name": recipe.metric, "value": values[0], "float": values[1] if reference is not None else None, **flips}


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
    metric = result.metric
    if bounds.metric_drop is not None and metric is not None and metric["float"] is not None:
        drop = metric_drop(metric)
        if drop > bounds.metric_drop:
            missed.append(f"{metric['name']} is {drop:.4g} worse than float, the recipe allows {bounds.metric_drop}")
    return missed


def metric_drop(metric: dict[str, Any]) -> float:
    """How much worse than float: difference of top-1 (0..1), relative growth of perplexity."""
    if metric["name"] == "perplexity":
        return metric["value"] / metric["float"] - 1
    return metric["float"] - metric["value"]


def validate_nodes(
    bundle: Bundle, name: str, samples: int = 1, say: Callable[[str], None] = lambda line: None
) -> list[NodeParity]:
    """Parity of every node of one artifact on golden inputs, each node reading the simulator's codes; worst first.

    Raises InvalidInput when the backend was not built, MissingDependency when it does not run here, BackendFailed when
    it refuses the graph whose edges are cut."""
    record = bundle.manifest.backends.get(name)
    if record is None or record.status != "built" or name == "simulator":
        raise InvalidInput(f"{bundle.path}: no artifact of {name} to take apart -> export with --backend {name}")
    chosen = backends.backend(name)
    if why := chosen.cannot_run():
        raise MissingDependency(f"{name}: {why}")
    profile = chosen.numerics or bundle.target.numerics
    graph = with_profile(bundle.graph, profile)
    feeds = {key: array[:samples] for key, array in bundle.golden_part("input").items()}
    cut, codes = with_profile(explode(graph), profile), exploded_feeds(graph, trace(graph, feeds))
    say(f"{name}: compiling {len(graph.nodes)} nodes apart")
    with tempfile.TemporaryDirectory(prefix="edgeforge-") as folder:
        found = per_node(chosen, Path(folder), cut, bundle.target, codes)
    return sorted(found, key=lambda node: (node.identical, -node.max_lsb))
