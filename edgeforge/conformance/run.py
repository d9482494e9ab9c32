"""Run cases on a real runtime and on the simulator, and count equal integers per op and precision."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeforge.backends import Backend, backend
from edgeforge.conformance.cases import Case, make_case, precisions, prefix, union
from edgeforge.conformance.child import Child
from edgeforge.errors import BackendFailed, InvalidInput
from edgeforge.ir.graph import Node
from edgeforge.ir.op import OPS
from edgeforge.ir.rules import RULES
from edgeforge.ir.rules.htp_unary import MEASURED
from edgeforge.ir.text import print_graph, tensors
from edgeforge.measured import measure
from edgeforge.quantize.convert import as_computed, with_profile
from edgeforge.sim.evaluate import simulate
from edgeforge.sim.parity import parity
from edgeforge.target import Target

#: Cases per session of the runtime, of several rows where samples are few.
BATCH = 50
#: Terminal colors, and the time and place that ONNX Runtime puts before a message; paths of temporary files.
_CHATTER = re.compile(r"^(BackendFailed: )?(\x1b\[[\d;]*m)?\d{4}-\d\d-\d\d .*?\] |\x1b\[[\d;]*m")
_PATH = re.compile(r"/\S+/")
#: A row whose first cases are all refused, one by one, is taken for refused.
GIVE_UP = 3


@dataclass
class Row:
    """One op at one precision. identical: share of equal integers, 0..1 (None: nothing ran); rule: "exact", "table" or
    "bounded"; refused: what the runtime did not take and why; floats: cases that it computed in float; worst: number
    of the case with the largest difference."""

    op: str
    precision: str
    cases: int = 0
    integers: int = 0
    equal: int = 0
    max_lsb: int = 0
    rule: str = "exact"
    refused: str | None = None
    floats: int = 0
    worst: int | None = None

    @property
    def identical(self) -> float | None:
        return self.equal / self.integers if self.integers else None


@dataclass(frozen=True)
class Outcome:
    """What the runtime made of a case: its codes, or the reason of its refusal."""

    case: Case
    codes: np.ndarray | None = None
    refused: str = ""
    island: bool = False


def select(ops: Sequence[str], chosen: Sequence[str]) -> list[tuple[str, str]]:
    """(op, precision) of every row asked for; empty selections mean all."""
    unknown = [name for name in ops if name not in OPS]
    if unknown:
        raise InvalidInput(f"unknown op {unknown[0]!r} -> one of {', '.join(sorted(OPS))}")
    found = [(op, p) for op in sorted(ops or OPS) for p in precisions(op) if not chosen or p in chosen]
    if not found:
        raise InvalidInput(f"no op has a row for {', '.join(chosen)} -> leave out --precision to see all rows")
    return found


def conformance(
    target: Target,
    name: str,
    rows: Sequence[tuple[str, str]],
    samples: int,
    seed: int,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """One `Row` per (op, precision). Raises InvalidInput when the backend cannot run here.

    keep: folder for the worst case of every row that differs (graph text, constants, inputs, both results)."""
    chosen = backend(name)
    if reason := chosen.missing() or chosen.cannot_run():
        raise InvalidInput(f"backend {name}: {reason}")
    forced = None if chosen.numerics else target
    found = []
    together = max(1, BATCH // samples)
    with Child(name, target) as child:
        for start in range(0, len(rows), together):
            part = rows[start : start + together]
            cases = [make_case(op, precision, k, seed, forced) for op, precision in part for k in range(samples)]
            if forced is not None:
                cases = [replace(case, graph=as_computed(case.graph, target)) for case in cases]
            made = outcomes(chosen, child, target, cases)
            for key in part:
                mine = [outcome for outcome in made if outcome.case.row == key]
                row = count(with_rules(mine, chosen.numerics or target.numerics, forced), keep)
                found.append(row)
                say(_line(row))
    return found


def _line(row: Row) -> str:
    text = f"{row.op} {row.precision}: {row.cases} cases"
    if row.identical is not None:
        text += f", {row.identical:.4%} identical, max {row.max_lsb} LSB ({row.rule})"
    if row.worst is not None:
        text += f", worst case {row.worst}"
    return text + (f"; refused: {row.refused}" if row.refused else "")


def with_rules(made: Sequence[Outcome], profile: str, target: Target | None) -> list[Outcome]:
    """The cases that ran under the rounding rules of ``profile``; with the tables that an artifact for ``target`` would
    hold in place of rules that are not exact."""
    found = []
    for start in range(0, len(made), BATCH):
        part = [
            replace(outcome, case=replace(outcome.case, graph=with_profile(outcome.case.graph, profile)))
            for outcome in made[start : start + BATCH]
        ]
        ran = [outcome.case for outcome in part if outcome.codes is not None]
        if target is not None and ran:
            known = {node.output: node for node in measure(union(ran)[0], target)[0].nodes}
            part = [replace(outcome, case=_with_tables(outcome.case, known)) for outcome in part]
        found += part
    return found


def _with_tables(case: Case, known: Mapping[str, Node]) -> Case:
    """``case`` with the rules and constants of the nodes of a `union` that it is part of."""
    nodes = []
    for node in case.graph.nodes:
        same = known.get(prefix(case) + node.output, node)
        nodes.append(replace(node, rule=same.rule, fixed=same.fixed))
    return replace(case, graph=case.graph.rebuild(nodes))


def count(made: Sequence[Outcome], keep: Path | None = None) -> Row:
    """The row of outcomes of one op and precision, against the simulator under the rules that their graphs hold."""
    row = Row(*made[0].case.row)
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    worst: tuple[int, int] = (0, 0)
    for outcome in made:
        case = outcome.case
        if outcome.codes is None:
            reasons[outcome.refused] += 1
            continue
        expected = simulate(case.graph, case.feeds)[case.graph.outputs[0]]
        statuses += Counter(_status(node) for node in case.graph.nodes if node.rule and node.op == case.op)
        identical, largest = parity(outcome.codes, expected)
        wrong = round((1 - identical) * expected.size)
        row.cases, row.integers = row.cases + 1, row.integers + expected.size
        row.equal, row.max_lsb = row.equal + expected.size - wrong, max(row.max_lsb, largest)
        row.floats += outcome.island
        if (largest, wrong) > worst:
            worst, row.worst = (largest, wrong), case.number
            if keep is not None:
                _keep(keep, case, expected, outcome.codes)
    known = {"exact", "table"}
    differs = bool(set(statuses) - known) or row.equal < row.integers
    row.rule = "bounded" if differs else "table" if "table" in statuses else "exact"
    row.refused = _summary(reasons, len(made)) if reasons else None
    return row


def _status(node: Node) -> str:
    return "table" if node.rule == MEASURED else RULES[node.rule].status


def _summary(reasons: Counter[str], cases: int) -> str:
    return "; ".join(f"{count} of {cases}: {reason}" for reason, count in reasons.most_common(3))


def outcomes(chosen: Backend, child: Child, target: Target, cases: Sequence[Case]) -> list[Outcome]:
    """Every case with its result: run in batches, one by one where a batch is refused."""
    found, ready = [], []
    for case in cases:
        reasons = chosen.refusals(case.graph, target)
        if reasons:
            found.append(Outcome(case, refused=f"{reasons[0].why} -> {reasons[0].remedy}"))
        else:
            ready.append(case)
    for start in range(0, len(ready), BATCH):
        found += _batch(child, ready[start : start + BATCH])
    return found


def _batch(child: Child, cases: Sequence[Case]) -> list[Outcome]:
    """A refused batch is halved; when the first cases of a row are refused one by one, so is its rest."""
    pending, found = [list(cases)], []
    while pending:
        part = pending.pop()
        graph, feeds = union(part)
        try:
            outputs, islands = child.run(graph, feeds)
        except BackendFailed as failure:
            if len(part) > 1:
                middle = (len(part) + 1) // 2
                pending += [part[middle:], part[:middle]]
                continue
            row, reason = part[0].row, _short(str(failure))
            found.append(Outcome(part[0], refused=reason))
            seen = [outcome for outcome in found if outcome.case.row == row]
            if len(seen) >= GIVE_UP and all(outcome.refused for outcome in seen):
                text = f"{reason} (not tried, as the first {GIVE_UP})"
                found += [Outcome(case, refused=text) for part in pending for case in part if case.row == row]
                pending = [kept for part in pending if (kept := [case for case in part if case.row != row])]
            continue
        for case in part:
            name = prefix(case) + case.graph.outputs[0]
            island = any(node.startswith(prefix(case)) for node in islands)
            found.append(Outcome(case, outputs[name], island=island))
    return found


def _short(text: str) -> str:
    """The telling part of a failure, on one line, without paths of log files."""
    lines = [_CHATTER.sub("", line.strip()).strip() for line in text.splitlines() if line.strip()]
    telling = lines[1] if len(lines) > 1 else lines[0]
    return _PATH.sub("", telling.partition("; log: ")[0])[:240]


def _keep(folder: Path, case: Case, expected: np.ndarray, found: np.ndarray) -> None:
    """``<op>-<precision>.txt`` (case number and graph) and ``.npz`` (constants, inputs, both results)."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{case.op}-{case.precision}"
    stem.with_suffix(".txt").write_text(f"# case {case.number}\n{print_graph(case.graph)}")
    constants = {f"constant/{name}": array for name, array in tensors(case.graph).items()}
    feeds = {f"input/{name}": array for name, array in case.feeds.items()}
    np.savez(stem.with_suffix(".npz"), **constants, **feeds, simulator=expected, runtime=found)  # type: ignore[arg-type]
