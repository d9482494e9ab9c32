"""tune: mixed precision under a budget. Which nodes get more bits is decided by what each of them gains and costs.

    benefit of a promotion = loss of the recipe - loss with this promotion alone
    promote by benefit per cost until the drop is allowed, then take back what turns out not to be needed

A promotion widens a result to 16 bits, the weights of a layer to 8, or makes its 4-bit weights block-wise. (Sensitivity
one node at a time, and promotion in its order, as in HAWQ, Dong et al. 2019, with the loss measured, not estimated from
curvature.)"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import yaml

from edgeforge.data import Dataset
from edgeforge.errors import InvalidInput, Unsupported
from edgeforge.estimate.estimate import estimate_program
from edgeforge.estimate.program import from_graph
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import LAYERS, OPS
from edgeforge.pipeline import ranges_of
from edgeforge.progress import track
from edgeforge.quantize.assign import Groups, assign, bits, precisions
from edgeforge.quantize.convert import convert
from edgeforge.recipe import Override, Precision, Recipe
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.target import Target
from edgeforge.validate import metric_drop, task_metric

#: Of the difference of two shares.
NOISE = 1e-9


@dataclass(frozen=True)
class Move:
    """A promotion: its node, what becomes wider, and the recipe entries that say so."""

    node: str
    op: str
    what: str
    overrides: tuple[Override, ...]


@dataclass(frozen=True)
class Score:
    """loss: of the outputs against float (mean Kullback-Leibler divergence in nats for class and token logits, else
    relative squared error); drop: of the task metric, as a share (the loss, where there is no metric); cost: estimated
    milliseconds, or megabytes of constants where the target has no latency model."""

    loss: float
    drop: float
    cost: float
    megabytes: float


@dataclass(frozen=True)
class Finding:
    """One promotion by itself. weight_peak, input_peak: largest magnitude over root mean square, of the layer's worst
    output channel and of its input; None for other nodes."""

    move: Move
    benefit: float
    cost: float
    weight_peak: float | None
    input_peak: float | None


@dataclass(frozen=True)
class Tuned:
    recipe: Recipe
    before: Score
    after: Score
    findings: tuple[Finding, ...]
    promoted: tuple[Move, ...]
    unit: str
    missed: str | None


def tune(
    graph: Graph,
    recipe: Recipe,
    target: Target,
    calibration: Dataset,
    data: Dataset,
    max_drop: float,
    budget_ms: float | None = None,
    budget_mb: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """The recipe with the cheapest promotions that keep the drop on ``data`` within ``max_drop`` (a share) and the cost
    within the budgets. Where that cannot be had, ``missed`` says why, and the recipe is the best within the budgets, or
    ``recipe`` as it is where that is above them.

    Raises InvalidInput on a budget in milliseconds for a target without a latency model."""
    if budget_ms is not None and target.latency is None:
        raise InvalidInput(f"{target.name} has no latency model -> --budget-mb")
    trial = _Trial(graph, recipe, target, calibration, data)
    before = trial.score(())
    say(f"{recipe.precision}: loss {before.loss:.4g}, drop {before.drop:.2%}, {before.cost:.4g} {trial.unit}")
    moves = list(_moves(graph, recipe, target))
    findings = []
    for move in track(moves, len(moves), "one promotion at a time"):
        score = trial.attempt([move])
        if score is not None:
            cost = max(score.cost - before.cost, 1e-6 * before.cost)
            findings.append(Finding(move, before.loss - score.loss, cost, *trial.peaks(move.node)))
    findings.sort(key=lambda f: f.benefit / f.cost, reverse=True)
    useful = [finding.move for finding in findings if finding.benefit > 0]

    def affordable(score: Score) -> bool:
        within_ms = budget_ms is None or score.cost <= budget_ms
        return within_ms and (budget_mb is None or score.megabytes <= budget_mb)

    chosen, missed = [], None
    if not affordable(before):
        missed = f"{recipe.precision} is above the budget before any promotion -> --precision with fewer bits"
    elif before.drop > max_drop + NOISE:
        chosen, reached = _shortest(trial, useful, max_drop, affordable, say)
        if reached:
            chosen = _pruned(trial, chosen, max_drop, affordable, say)
        else:
            best = trial.score(chosen).drop
            within = "" if (budget_ms, budget_mb) == (None, None) else " within the budget"
            missed = f"drop {best:.2%} stays above {max_drop:.2%}{within}"
    after = trial.score(chosen)
    return Tuned(trial.recipe_with(chosen), before, after, tuple(findings), tuple(chosen), trial.unit, missed)


def _shortest(
    trial: _Trial, moves: list[Move], max_drop: float, affordable: Callable[[Score], bool], say: Callable[[str], None]
) -> tuple[list[Move], bool]:
    """The fewest of the first moves that reach the drop (by bisection: losses fall with promotions, but for noise), or
    as many as the budgets allow."""

    def enough(count: int) -> bool:
        score = trial.score(moves[:count])
        say(f"{count} promotions: drop {score.drop:.2%}, {score.cost:.4g} {trial.unit}")
        return score.drop <= max_drop + NOISE

    def too_dear(count: int) -> bool:
        return not affordable(trial.score(moves[:count]))

    most = _first(too_dear, len(moves)) - 1 if too_dear(len(moves)) else len(moves)
    if not enough(most):
        return moves[:most], False
    return moves[: _first(enough, most)], True


def _first(holds: Callable[[int], bool], top: int) -> int:
    """The smallest count in 0..top for which ``holds``, known to hold at ``top``."""
    low = -1
    while top - low > 1:
        middle = (low + top) // 2
        if holds(middle):
            top = middle
        else:
            low = middle
    return top


def _pruned(
    trial: _Trial, moves: list[Move], max_drop: float, affordable: Callable[[Score], bool], say: Callable[[str], None]
) -> list[Move]:
    """Take back promotions, the least useful first and in ever smaller groups, while the drop and the cost stay
    allowed (a value at 8 bits between two at 16 can cost more than one at 16)."""
    kept, size = list(moves), max(len(moves) // 2, 1)
    while size:
        end = len(kept)
        while end > 0:
            fewer = kept[: max(end - size, 0)] + kept[end:]
            score = trial.score(fewer)
            if score.drop <= max_drop + NOISE and affordable(score):
                kept = fewer
            end -= size
        size //= 2
    say(f"{len(kept)} of {len(moves)} promotions are needed")
    return kept


def _moves(graph: Graph, recipe: Recipe, target: Target) -> Iterator[Move]:
    """Every promotion of one node, under the recipe as it is."""
    groups, makers = Groups(graph), graph.producers()
    precision, outputs = precisions(graph, recipe)
    members: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if OPS[node.op].numerics != "move":
            members.setdefault(groups.find(node.output), []).append(node)

    def widen(name: str) -> tuple[Override, ...]:
        """16 bits for a value: of an input, or of all nodes that share its encoding."""
        if name not in makers:
            return (Override(match=glob.escape(name), op="input", output="a16"),)
        return tuple(_entry(node, output="a16") for node in members.get(groups.find(name), ()))

    for nodes in members.values():
        if all(outputs[node.output] != "a8" for node in nodes):
            continue
        yield Move(nodes[0].output, nodes[0].op, "result at 16 bits", tuple(_entry(n, output="a16") for n in nodes))
    for node in graph.nodes:
        if node.op not in LAYERS:
            continue
        current = precision[node.output]
        for name in target.precisions:
            wider = Precision(name)
            if name == current.name or not _wider(wider, current, node.op):
                continue
            also = widen(node.inputs[0]) if wider.activations != current.activations else ()
            yield Move(node.output, node.op, name, (*also, _entry(node, precision=name)))


def _wider(a: Precision, b: Precision, op: str) -> bool:
    """Whether ``a`` is one step above ``b``: the weights, or the activations, or blocks of weights."""
    if (a.weights, a.activations) == (b.weights, b.activations):
        return op == "linear" and a.block is not None and (b.block is None or a.block < b.block)
    weights, activations = (a.weights, b.weights) == ("i8", "i4"), (a.activations, b.activations) == ("u16", "u8")
    if weights == activations:
        return False
    unchanged = a.activations == b.activations if weights else a.weights == b.weights
    return unchanged and (a.block is None if weights else a.block == b.block)


def _both(a: Precision, b: Precision) -> str:
    """The precision that is as wide as two others."""
    wide = "w8" if "i8" in (a.weights, b.weights) else "w4"
    name = f"{wide}a{'16' if 'u16' in (a.activations, b.activations) else '8'}"
    blocks = [x.block for x in (a, b) if x.block is not None]
    return f"{name}-b{min(blocks)}" if blocks and wide == "w4" else name


def _entry(node: Node, **what: str) -> Override:
    return Override.model_validate({"match": glob.escape(node.output), "op": node.op, **what})


class _Trial:
    """One calibration and one set of samples, on which any number of recipes is tried."""

    def __init__(self, graph: Graph, recipe: Recipe, target: Target, calibration: Dataset, data: Dataset):
        self.graph, self.recipe, self.target, self.labels = graph, recipe, target, data.labels
        self.unit = "MB" if target.latency is None else "ms (estimated)"
        self.ranges = {
            width: ranges_of(graph, recipe, calibration, dict.fromkeys(graph.values, width)) for width in (8, 16)
        }
        self.feeds = data.stacked()
        self.inputs: dict[str, float] = {}
        self.reference = run_float(graph, self.feeds, self._see)
        self.known: dict[tuple[Override, ...], Score] = {}

    def _see(self, node: Node, result: object) -> None:
        self.inputs[node.output] = _peak(np.asarray(result))

    def peaks(self, name: str) -> tuple[float | None, float | None]:
        node = self.graph.producers()[name]
        if node.op not in LAYERS:
            return None, None
        weights = self.graph.values[node.inputs[1]].data
        assert weights is not None
        return max(_peak(row) for row in weights), self.inputs.get(node.inputs[0])

    def attempt(self, moves: Sequence[Move]) -> Score | None:
        """None where the target does not take it."""
        try:
            return self.score(moves)
        except (Unsupported, InvalidInput):
            return None

    def score(self, moves: Sequence[Move]) -> Score:
        recipe = self.recipe_with(moves)
        if recipe.overrides not in self.known:
            self.known[recipe.overrides] = self._score(recipe)
        return self.known[recipe.overrides]

    def recipe_with(self, moves: Sequence[Move]) -> Recipe:
        """Two promotions of one layer become one that is as wide as both, if the target offers that."""
        entries: dict[tuple[str, str | None, bool], Override] = {}
        for entry in (entry for move in moves for entry in move.overrides):
            key = (entry.match, entry.op, entry.precision is None)
            before = entries.get(key)
            if before is not None and before.precision and entry.precision:
                both = _both(Precision(before.precision), Precision(entry.precision))
                if both in self.target.precisions:
                    entry = entry.model_copy(update={"precision": both})
            entries[key] = entry
        return self.recipe.model_copy(update={"overrides": self.recipe.overrides + tuple(entries.values())})

    def _score(self, recipe: Recipe) -> Score:
        ranges = {name: self.ranges[width][name] for name, width in bits(self.graph, recipe, self.target).items()}
        integer = convert(self.graph, assign(self.graph, ranges, recipe, self.target), self.target, recipe.weights)
        codes = quantize_feeds(integer, self.feeds)
        found = simulate(integer, codes)
        real = dequantize_outputs(integer, found)
        loss = sum(_loss(self.reference[name], real[name], recipe.metric is not None) for name in self.graph.outputs)
        metric = task_metric(recipe, integer, found, self.reference, self.labels, codes)
        drop = loss if metric is None else metric_drop(metric)
        megabytes = sum(value.type.nbytes for value in integer.constants()) / 1e6
        cost = megabytes
        if self.target.latency is not None:
            cost = estimate_program(from_graph(integer), self.target, recipe.precision).latency_ms.p50
        return Score(loss, drop, cost, megabytes)


def _peak(x: np.ndarray) -> float:
    """Largest magnitude over root mean square; 1 where all is zero."""
    level = float(np.sqrt(np.square(x.astype(np.float64)).mean()))
    return float(np.abs(x).max()) / level if level > 0 else 1.0


def _loss(reference: np.ndarray, found: np.ndarray, logits: bool) -> float:
    """Mean Kullback-Leibler divergence in nats of the last axis's distributions, or relative squared error."""
    a, b = reference.astype(np.float64), found.astype(np.float64)
    if not logits:
        return float(np.square(a - b).sum() / max(np.square(a).sum(), 1e-30))
    p, q = (x - x.max(-1, keepdims=True) for x in (a, b))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def document(tuned: Tuned) -> dict[str, Any]:
    """For ``--json``."""
    findings = [
        {"node": f.move.node, "op": f.move.op, "promotion": f.move.what, "taken": f.move in tuned.promoted,
         "benefit": f.benefit, "cost": f.cost, "weight_peak": f.weight_peak, "input_peak": f.input_peak}
        for f in tuned.findings
    ]  # fmt: skip
    recipe = tuned.recipe.model_dump(mode="json", exclude_unset=True)
    scores = {"before": asdict(tuned.before), "after": asdict(tuned.after), "cost_unit": tuned.unit}
    return {"reached": tuned.missed is None, "missed": tuned.missed, **scores, "recipe": recipe, "findings": findings}


def _peaks(finding: Finding) -> str:
    """The outliers of a layer, which are why it needs more bits."""
    peaks = {"weights": finding.weight_peak, "input": finding.input_peak}
    return "".join(f"; {part} up to {peak:.3g} rms" for part, peak in peaks.items() if peak is not None)


def trail(tuned: Tuned) -> str:
    """The recipe as YAML, below comments that say what was found and what each promotion brought."""
    alone = {finding.move.node + finding.move.what: finding for finding in tuned.findings}
    a, b, unit = tuned.before, tuned.after, tuned.unit
    lines = [
        f"# Tuned from {tuned.recipe.precision}: drop {a.drop:.2%} -> {b.drop:.2%}, loss {a.loss:.4g} -> {b.loss:.4g},",
        f"# {a.cost:.4g} -> {b.cost:.4g} {unit}, constants {a.megabytes:.4g} -> {b.megabytes:.4g} MB.",
    ]
    for move in tuned.promoted:
        finding = alone[move.node + move.what]
        gain = f"alone -{finding.benefit:.3g} loss, +{finding.cost:.3g}"
        lines.append(f"#   {move.node} ({move.op}): {move.what}; {gain}{_peaks(finding)}")
    raw = tuned.recipe.model_dump(mode="json", exclude_unset=True)
    return "\n".join(lines) + "\n" + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
