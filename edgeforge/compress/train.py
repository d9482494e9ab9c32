"""train: equivalent scales, weight clipping and activation encodings, learned together through the rounded graph.

    loss = KL(float logits || logits of the graph with every activation and weight rounded)     straight-through

MobileQuant (Tan et al., arXiv:2408.13933; OmniQuant, arXiv:2308.13137, has the first two, block by block), with these
differences: clipping starts where the squared error is least; scales on every group of `channels` (tied under grouped
queries and rotary embedding, where the original's are not equivalent or are left out); zero points rounded while
training; every node of the integer graph rounded (head, rotary embedding, residual adds); and a loss on logits without
the first token, since the squared error of hidden states is mostly the attention sink's. What is learned folds into
weights and encodings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeforge.compress.channels import NORMS, find_channels
from edgeforge.data import Dataset
from edgeforge.ir.fixed import LPBQ_STEPS
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import ACT, LAYERS, OPS, WEIGHT
from edgeforge.ir.types import RANGE, QParams, TensorType
from edgeforge.progress import track
from edgeforge.quantize.assign import Groups, Plan, affine
from edgeforge.quantize.layerwise import first_encoding
from edgeforge.quantize.weights import quantize_weight
from edgeforge.recipe import Train
from edgeforge.target import Target

Tensors = dict[str, torch.Tensor]

#: Batches that are kept aside, if there are four times as many.
ASIDE = 4

#: A block of a decoder, by the name of its module.
_BLOCK = re.compile(r"(?:\w+\.)*layers\.\d+")

#: Largest share of a channel's peak that clipping starts from; near 1 its logit would hardly move.
MOST = 0.982


def train(graph: Graph, plan: Plan, config: Train, target: Target, data: Dataset) -> tuple[Graph, Plan]:
    """``graph`` with the scales that training learned, and ``plan`` with the encodings; the better of that and the
    start.

    data: calibration samples; the last batches are kept aside to choose the best step. Repeatable for one seed."""
    student = Student(graph, plan, target, config.pairs)
    feeds = {name: torch.from_numpy(array) for name, array in data.stacked().items()}
    kept = min(ASIDE * config.batch, len(data) // 4) or len(data)
    count = len(data) - kept if len(data) > kept else len(data)
    aside = {name: x[-kept:] for name, x in feeds.items()}
    picks = np.random.default_rng(config.seed)
    for number, stage in enumerate(_stages(graph, student, config)):
        run = _Run(student, stage.parameters, config, number)
        order = [picks.choice(count, min(config.batch, count), replace=False) for _ in range(config.steps)]
        with torch.no_grad():
            run.judge(float(stage.loss(student, aside)))
        for step in track(range(run.step, config.steps), config.steps - run.step, "training"):
            run.descend(stage.loss(student, {name: x[order[step]] for name, x in feeds.items()}))
            if run.step % config.check == 0 or run.step == config.steps:
                with torch.no_grad():
                    run.judge(float(stage.loss(student, aside)))
                if run.stale >= config.patience:
                    break
        run.restore()
    return student.fold()


class _Run:
    """Optimizer and schedule of some parameters, and their best values so far."""

    def __init__(self, student: Student, parameters: Sequence[str], config: Train, number: int):
        self.student, self.config = student, config
        rates = {"scale": config.scale_rate, "clip": config.clip_rate, "range": config.range_rate}
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

    def judge(self, loss: float) -> None:
        """Note the loss on samples that are not trained on, keep the best, and save the state."""
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
class _Stage:
    """What is trained together (names of parameters), and the value of the float graph that it is compared on."""

    graph: Graph
    watched: str
    parameters: tuple[str, ...]
    divergence: bool

    def loss(self, student: Student, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            wanted = _scored(_evaluate(self.graph, dict(feeds), self.watched))
        got = _scored(student(feeds, self.watched))
        if not self.divergence:
            return ((got - wanted) ** 2).mean() / (wanted**2).mean()
        p, q = (torch.log_softmax(x, -1) for x in (wanted, got))
        return (p.exp() * (p - q)).sum(-1).mean()


def _stages(graph: Graph, student: Student, config: Train) -> list[_Stage]:
    """Everything at once, or one block of the graph (``layers.N``) after another on the error of its output."""
    if not config.blocks:
        watched = graph.outputs[0] if config.loss == "kl" else _last_hidden(graph)
        return [_Stage(graph, watched, tuple(student.homes), config.loss == "kl")]
    last = {match[0]: node.output for node in graph.nodes if (match := _BLOCK.match(node.source))}
    return [
        _Stage(
            graph, output, tuple(n for n, home in student.homes.items() if f"{home}.".startswith(f"{block}.")), False
        )
        for block, output in last.items()
    ]


def _scored(x: torch.Tensor) -> torch.Tensor:
    """Sequences [N, T, C] without their first token."""
    return x[:, 1:] if x.ndim == 3 and x.shape[1] > 1 else x


def _last_hidden(graph: Graph) -> str:
    """What the norm before the head reads; without one the output itself."""
    made = graph.producers()
    head = made[graph.outputs[0]]
    norm = made.get(head.inputs[0])
    return norm.inputs[0] if norm is not None and norm.op in ("rms_norm", "layer_norm") else head.output


def _evaluate(graph: Graph, known: Tensors, wanted: str) -> torch.Tensor:
    known |= {value.name: torch.from_numpy(np.array(value.data)) for value in graph.constants()}
    for node in graph.nodes:
        known[node.output] = OPS[node.op].torch(torch, graph.view(node), *(known[name] for name in node.inputs))
        if node.output == wanted:
            break
    return known[wanted]


class Student:
    """The float graph with every value rounded as the plan says, in torch, differentiable in its ``parameters``:
    ``scale GROUP`` (logs of free scales), ``clip NODE`` (logit per weight channel or block) and ``range ENCODING`` (of
    8-bit encodings the change of log scale, and of the zero point as a share of all codes). ``homes``: the module of
    each that is learned. pairs: "norms" or "all", the groups whose scales are learned."""

    def __init__(self, graph: Graph, plan: Plan, target: Target, pairs: str = "all"):
        self.graph, self.plan, self.channels = graph, plan, find_channels(graph)
        self.constants = {value.name: torch.from_numpy(np.array(value.data)) for value in graph.constants()}
        self.labels = {
            key: [
                (torch.from_numpy(np.abs(p).astype(np.int64)), torch.from_numpy(np.sign(p))) for p in parts if p.any()
            ]
            for key, parts in self.channels.constants.items()
        }
        self.keys, made = _encodings(graph, plan), graph.producers()
        fixed, self.symmetric = _constrained(graph, target, self.keys)
        self.parameters: Tensors = {}
        self.homes: dict[str, str] = {}
        self.scales = [f"scale {group.name}" for group in self.channels.groups]
        for name, group in zip(self.scales, self.channels.groups, strict=True):
            self.parameters[name] = torch.zeros(group.last - group.first)
            if pairs == "all" or all(made[node].op in NORMS for node in group.up):
                self.homes[name] = made[group.up[0]].source
        for node in graph.nodes:
            if self._has_weight(node):
                self.parameters[f"clip {node.output}"] = self._first_clip(node)
                self.homes[f"clip {node.output}"] = node.source
        self.names: dict[Key, str] = {}
        for place, key in self.keys.items():
            node = made.get(place[0] if isinstance(place, tuple) else place)
            if node is not None and key[1] == "u8" and key not in fixed and key not in self.names:
                self.names[key] = name = f"range {key[0]} {key[2]} {key[3]}"
                self.parameters[name] = torch.zeros(1 if key in self.symmetric else 2)
                self.homes[name] = node.source

    def state(self) -> Tensors:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    @property
    def log_scale(self) -> torch.Tensor:
        """Of all scales by number, 0 first."""
        return torch.cat([torch.zeros(1), *(self.parameters[name] for name in self.scales)])

    def _has_weight(self, node: Node) -> bool:
        shared = sum(n.inputs[1:2] == node.inputs[1:2] and n.op in LAYERS for n in self.graph.nodes)
        return node.op in LAYERS and shared == 1

    def _block(self, node: Node) -> int | None:
        return self.plan.precision[node.output].block if node.op == "linear" else None

    def _blocks(self, node: Node) -> tuple[int, int]:
        shape, block = self.graph.type(node.inputs[1]).shape, self._block(node)
        return shape[0], 1 if block is None else shape[1] // block

    def _first_clip(self, node: Node) -> torch.Tensor:
        """Logit of the share of each channel's peak with the least squared error; of blocks, a little below 1."""
        share = torch.full(self._blocks(node), MOST)
        if self._block(node) is None:
            w = self.constants[node.inputs[1]].numpy()
            dtype = self.plan.precision[node.output].weights
            q = quantize_weight(node.inputs[1], w, dtype, None, "mse").type.q
            assert q is not None
            peaks = np.abs(w).reshape(len(w), -1).max(1).clip(1e-9)
            share = torch.from_numpy(q.scale * RANGE[dtype][1] / peaks)[:, None].clamp(0.1, MOST)
        return torch.logit(share.float())

    def __call__(self, feeds: Mapping[str, torch.Tensor], wanted: str) -> torch.Tensor:
        """The value ``wanted`` as the integer graph would have it, up to its arithmetic's own rounding."""
        log_scale = self.log_scale
        known = {name: self.encoded(x, name) for name, x in feeds.items()}
        for node in self.graph.nodes:
            operands = [self.operand(node, i, known, log_scale) for i in range(len(node.inputs))]
            y = OPS[node.op].torch(torch, self.graph.view(node), *operands)
            known[node.output] = self.encoded(y, node.output)
            if node.output == wanted:
                break
        return known[wanted]

    def operand(self, node: Node, i: int, known: Tensors, log_scale: torch.Tensor) -> torch.Tensor:
        name, role = node.inputs[i], OPS[node.op].port(i).role
        if name not in self.constants:
            x = known[name]
            return self.rounded(x, (node.output, i)) if (node.output, i) in self.keys else x
        x = self.scaled(node, i, log_scale)
        if role == WEIGHT:
            return self.weight(node, x)
        if role != ACT:
            return x
        if OPS[node.op].shared and name in self.keys:
            return self.rounded(x, name)
        return _own_range(x, self.plan.types[node.output].dtype)

    def scaled(self, node: Node, i: int, log_scale: torch.Tensor) -> torch.Tensor:
        x = self.constants[node.inputs[i]]
        for numbers, signs in self.labels.get((node.output, i), ()):
            x = x * torch.exp(log_scale[numbers] * signs)
        return x

    def encoded(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.rounded(x, name) if name in self.keys else x

    def rounded(self, x: torch.Tensor, place: Any) -> torch.Tensor:
        key = self.keys[place]
        scale, zero = self.encoding(key)
        low, high = RANGE[key[1]]
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, low, high, 1.0)

    def encoding(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        _, dtype, scale, zero = key
        change = self.parameters.get(self.names.get(key, ""))
        s, z = torch.tensor([scale]), torch.tensor([float(zero)])
        if change is not None:
            s = s * change[:1].exp()
        if change is not None and len(change) == 2:
            z = (z + change[1:] * RANGE[dtype][1]).clamp(*RANGE[dtype])
        return s, z

    def bound(self, node: Node, w: torch.Tensor) -> torch.Tensor:
        """Largest magnitude that is kept per channel or block, [O, blocks, 1]."""
        peaks = w.reshape(*self._blocks(node), -1).abs().amax(2, keepdim=True).clamp_min(1e-9)
        clip = self.parameters.get(f"clip {node.output}")
        return peaks if clip is None else peaks * torch.sigmoid(clip)[..., None]

    def weight(self, node: Node, w: torch.Tensor) -> torch.Tensor:
        """Rounded as `quantize_weight` does: block scales are whole multiples of the channel's."""
        top = RANGE[self.plan.precision[node.output].weights][1]
        scale = self.bound(node, w) / top
        if self._block(node) is not None:
            channel = scale.amax(1, keepdim=True) / LPBQ_STEPS
            ratio = scale / channel
            steps = (ratio.detach() - 1e-6).ceil().clamp(1, LPBQ_STEPS)
            scale = channel * (ratio + (steps - ratio).detach())
        rows = w.reshape(scale.shape[0] * scale.shape[1], -1)
        zero = torch.zeros(len(rows))
        rounded = torch._fake_quantize_learnable_per_channel_affine(rows, scale.reshape(-1), zero, 0, -top, top, 1.0)
        return rounded.reshape(w.shape)

    def fold(self) -> tuple[Graph, Plan]:
        """The graph with the scales in its constants (the function is the same), and the plan with the encodings that
        were learned, those of weights included."""
        graph = self.channels.rescale(self.graph, self.log_scale[1:].detach().double().numpy())
        types = {name: self.learned(kind, name) for name, kind in self.plan.types.items()}
        reads = {place: self.learned(kind, place) for place, kind in self.plan.reads.items()}
        plan, constants = replace(self.plan, types=types, reads=reads), dict(self.plan.constants)
        for node in graph.nodes:
            if f"clip {node.output}" not in self.parameters:
                continue
            w = torch.from_numpy(np.array(graph.values[node.inputs[1]].data))
            bound = self.bound(node, w).detach()
            clipped = w.reshape(*bound.shape[:2], -1).clamp(-bound, bound).reshape(w.shape).numpy()
            constants[node.inputs[1]] = first_encoding(graph, plan, node, "minmax", clipped)[0]
        return graph, replace(plan, constants=constants)

    def learned(self, kind: TensorType, place: Any) -> TensorType:
        if self.keys[place] not in self.names:
            return kind
        scale, zero = (x.detach() for x in self.encoding(self.keys[place]))
        return TensorType(kind.shape, kind.dtype, QParams(np.float32(scale[0]), int(zero[0].round())))


#: An encoding: the group of values that share it, dtype, scale and zero point at the start.
Key = tuple[str, str, float, int]


def _encodings(graph: Graph, plan: Plan) -> dict[Any, Key]:
    """The encoding at every place: a value by name, or an input (node output, index) with one of its own."""
    groups, made = Groups(graph), graph.producers()
    places: dict[Any, tuple[str, TensorType]] = {name: (name, kind) for name, kind in plan.types.items()}
    places |= {place: (made[place[0]].inputs[place[1]], kind) for place, kind in plan.reads.items()}
    keys = {}
    for place, (name, kind) in places.items():
        assert kind.q is not None
        keys[place] = (groups.find(name), kind.dtype, float(kind.q.scale), kind.q.zero)
    return keys


def _constrained(graph: Graph, target: Target, keys: Mapping[Any, Key]) -> tuple[set[Key], set[Key]]:
    """Encodings that the target dictates, and those whose zero point it dictates."""
    fixed = {keys[node.output] for node in graph.nodes if node.op in target.encodings and node.output in keys}
    symmetric: set[Key] = set()
    if target.second_operand_zero is not None:
        second = [node for node in graph.nodes if node.op == "matmul"]
        symmetric = {keys.get((node.output, 1), keys[node.inputs[1]]) for node in second}
    return fixed, symmetric


def _own_range(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """A constant operand of an activation op, rounded over the range it has."""
    q = affine((float(x.detach().min()), float(x.detach().max())), dtype)
    low, high = RANGE[dtype]
    return torch.fake_quantize_per_tensor_affine(x, float(q.scale), q.zero, low, high)
