"""train: equivalent scales, weight clipping, activation encodings and, if asked, weights, learned together through the
rounded graph.

    loss = KL(float logits || logits of the graph with every activation and weight rounded)     straight-through

MobileQuant (Tan et al., arXiv:2408.13933; OmniQuant, arXiv:2308.13137, has the first two, block by block), with these
differences: clipping starts where the squared error is least; scales on every group of `channels` (tied under grouped
queries and rotary embedding, where the original's are not equivalent or are left out); zero points rounded while
training; every node of the integer graph rounded (head, rotary embedding, residual adds); and a loss on logits without
the first token, since the squared error of hidden states is mostly the attention sink's. What is learned folds into
weights and encodings.

With ``weight_rate`` the weights themselves move as well, and end on the grid of their codes: quantization-aware
training from a few hundred texts, with the float model as its teacher (LLM-QAT, arXiv:2305.17888; EfficientQAT,
arXiv:2407.11062)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeforge.compress.student import Student, Tensors
from edgeforge.data import Dataset
from edgeforge.ir.graph import Graph, Node
from edgeforge.progress import track
from edgeforge.quantize.assign import Plan
from edgeforge.recipe import Train
from edgeforge.target import Target

#: Batches that are kept aside, if there are four times as many.
ASIDE = 4

#: A block of a decoder, by the name of its module.
_BLOCK = re.compile(r"(?:\w+\.)*layers\.\d+")


def train(graph: Graph, plan: Plan, config: Train, target: Target, data: Dataset) -> tuple[Graph, Plan]:
    """``graph`` with the scales and weights that training learned, and ``plan`` with the encodings; the better of that
    and the start.

    data: calibration samples; the last batches are kept aside to choose the best step. Repeatable for one seed."""
    student = Student(graph, plan, target, config.pairs, config.weight_rate > 0)
    feeds = {name: torch.from_numpy(array) for name, array in data.stacked().items()}
    kept = min(ASIDE * config.batch, len(data) // 4) or len(data)
    count = len(data) - kept if len(data) > kept else len(data)
    aside = slice(len(data) - kept, len(data))
    picks, seen = np.random.default_rng(config.seed), _Seen(feeds, student.encode(feeds))
    stages = _stages(graph, student, config)
    for number, stage in enumerate(stages):
        run = _Run(student, stage.parameters, config, number)
        order = [picks.choice(count, min(config.batch, count), replace=False) for _ in range(config.steps)]
        run.judge(stage, seen.part(aside))
        for step in track(range(run.step, config.steps), config.steps - run.step, "training"):
            run.descend(stage.loss(student, seen.part(order[step])))
            if run.step % config.check == 0 or run.step == config.steps:
                run.judge(stage, seen.part(aside))
                if run.stale >= config.patience:
                    break
        run.restore()
        if stage is not stages[-1]:
            seen = stage.passed(student, seen, config.batch)
    return student.fold()


class _Run:
    """Optimizer and schedule of some parameters, and their best values so far."""

    def __init__(self, student: Student, parameters: Sequence[str], config: Train, number: int):
        self.student, self.config = student, config
        rates = {kind: getattr(config, f"{kind}_rate") for kind in ("scale", "clip", "range", "weight")}
        mine = {name: student.parameters[name] for name in parameters}
        groups = [
            {"params": [p for name, p in mine.items() if name.startswith(f"{kind} ")], "lr": rate}
            for kind, rate in rates.items()
        ]
        for name, parameter in student.parameters.items():
            parameter.requires_grad_(name in mine and rates[name.split()[0]] > 0)
        self.optimizer = torch.optim.Adam([group for group in groups if group["lr"] and group["params"]])
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.steps)
        self.step, self.stale, self.least = 0, 0, math.inf
        self.best = student.state()
        self.file = (
            Path(f"{config.checkpoint}.{number}" if number else config.checkpoint) if config.checkpoint else None
        )
        if self.file is not None and self.file.is_file():
            self._load(torch.load(self.file, weights_only=True))

    def descend(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def judge(self, stage: _Stage, seen: _Seen) -> None:
        """Note the loss on samples that are not trained on, keep the best, and save the state."""
        with torch.no_grad():
            loss = float(stage.loss(self.student, seen))
        if loss < self.least:
            self.least, self.stale, self.best = loss, 0, self.student.state()
        else:
            self.stale += 1
        if self.file is not None:
            torch.save(self._state(), self.file)

    def restore(self) -> None:
        self.student.load(self.best)

    def _state(self) -> dict[str, Any]:
        kept = {"step": self.step, "stale": self.stale, "least": self.least, "best": self.best}
        kept |= {"now": self.student.state(), "optimizer": self.optimizer.state_dict()}
        return kept | {"schedule": self.schedule.state_dict()}

    def _load(self, kept: dict[str, Any]) -> None:
        self.step, self.stale, self.least, self.best = (kept[key] for key in ("step", "stale", "least", "best"))
        self.student.load(kept["now"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.schedule.load_state_dict(kept["schedule"])


@dataclass(frozen=True)
class _Seen:
    """Values of the same samples in the float graph and in the rounded one, by name."""

    exact: Tensors
    rounded: Tensors

    def part(self, rows: slice | np.ndarray) -> _Seen:
        return _Seen(*({name: x[rows] for name, x in known.items()} for known in (self.exact, self.rounded)))


@dataclass(frozen=True)
class _Stage:
    """What is trained together (names of parameters) in consecutive nodes of the graph, the value that it is compared
    on, and what nodes behind them read."""

    nodes: tuple[Node, ...]
    watched: str
    later: frozenset[str]
    parameters: tuple[str, ...]
    divergence: bool = False

    def loss(self, student: Student, seen: _Seen) -> torch.Tensor:
        with torch.no_grad():
            wanted = _scored(student.exact(self.nodes, seen.exact)[self.watched])
        got = _scored(student.rounded(self.nodes, seen.rounded)[self.watched])
        if not self.divergence:
            return ((got - wanted) ** 2).mean() / (wanted**2).mean()
        p, q = (torch.log_softmax(x, -1) for x in (wanted, got))
        return (p.exp() * (p - q)).sum(-1).mean()

    def passed(self, student: Student, seen: _Seen, batch: int) -> _Seen:
        """What is known behind these nodes."""
        size = len(next(iter(seen.exact.values())))
        parts: list[_Seen] = []
        with torch.no_grad():
            for rows in np.array_split(np.arange(size), -(-size // batch)):
                part = seen.part(rows)
                found = student.exact(self.nodes, part.exact), student.rounded(self.nodes, part.rounded)
                parts.append(_Seen(*({name: x for name, x in known.items() if name in self.later} for known in found)))
        exact, rounded = ([getattr(part, kind) for part in parts] for kind in ("exact", "rounded"))
        return _Seen(*({name: torch.cat([x[name] for x in known]) for name in known[0]} for known in (exact, rounded)))


def _stages(graph: Graph, student: Student, config: Train) -> list[_Stage]:
    """Everything at once, or one block of the graph (``layers.N``) after another on the error of its output."""
    if not config.blocks:
        watched = graph.outputs[0] if config.loss == "kl" else _last_hidden(graph)
        return [_Stage(graph.nodes, watched, frozenset(), tuple(student.homes), config.loss == "kl")]
    last = {match[0]: i for i, node in enumerate(graph.nodes) if (match := _BLOCK.match(node.source))}
    stages, first = [], 0
    for block, i in last.items():
        later = frozenset(name for node in graph.nodes[i + 1 :] for name in node.inputs)
        inside = tuple(name for name, home in student.homes.items() if f"{home}.".startswith(f"{block}."))
        stages.append(_Stage(graph.nodes[first : i + 1], graph.nodes[i].output, later, inside))
        first = i + 1
    return stages


def _scored(x: torch.Tensor) -> torch.Tensor:
    """Sequences [N, T, C] without their first token."""
    return x[:, 1:] if x.ndim == 3 and x.shape[1] > 1 else x


def _last_hidden(graph: Graph) -> str:
    """What the norm before the head reads; without one the output itself."""
    made = graph.producers()
    head = made[graph.outputs[0]]
    norm = made.get(head.inputs[0])
    return norm.inputs[0] if norm is not None and norm.op in ("rms_norm", "layer_norm") else head.output
