"""student: a float graph with everything rounded that its integer graph rounds, in torch, to be learned through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgeforge.compress.channels import NORMS, find_channels
from edgeforge.ir.fixed import LPBQ_SLACK, LPBQ_STEPS
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import ACT, LAYERS, OPS, WEIGHT
from edgeforge.ir.types import RANGE, QParams, TensorType
from edgeforge.passes.constants import with_constants
from edgeforge.quantize.assign import Groups, Plan, affine
from edgeforge.quantize.layerwise import first_encoding, own_weight, tensor
from edgeforge.quantize.weights import quantize_weight
from edgeforge.target import Target

Tensors = dict[str, torch.Tensor]

#: Largest share of a channel's peak that clipping starts from; near 1 its logit would hardly move.
MOST = 0.982


class Student:
    """The float graph with every value rounded as the plan says, in torch, differentiable in its ``parameters``:
    ``scale GROUP`` (logs of free scales), ``clip NODE`` (logit per weight channel or block), ``weight NODE`` (what is
    added to it, in steps of its codes at the start) and ``range ENCODING`` (of 8-bit encodings the change of log scale,
    and of the zero point as a share of all codes). ``homes``: the module of each that is learned. pairs: "norms" or
    "all", the groups whose scales are learned; weights: whether they are."""

    def __init__(self, graph: Graph, plan: Plan, target: Target, pairs: str = "all", weights: bool = False):
        self.graph, self.plan, self.channels = graph, plan, find_channels(graph)
        self.constants = {value.name: tensor(graph, value.name) for value in graph.constants()}
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
        self.steps: Tensors = {}
        for node in graph.nodes:
            if self._has_weight(node):
                self.parameters[f"clip {node.output}"] = self._first_clip(node)
                self.homes[f"clip {node.output}"] = node.source
            if weights and own_weight(graph, node):
                self.steps[node.output] = self.scale(node, self.constants[node.inputs[1]])
                self.parameters[f"weight {node.output}"] = torch.zeros(graph.type(node.inputs[1]).shape)
                self.homes[f"weight {node.output}"] = node.source
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

    def exact(self, nodes: Sequence[Node], known: Mapping[str, torch.Tensor]) -> Tensors:
        """``known`` values, and those that ``nodes`` make of them, in float."""
        found = dict(known)
        for node in nodes:
            operands = (found[name] if name in found else self.constants[name] for name in node.inputs)
            found[node.output] = OPS[node.op].torch(torch, self.graph.view(node), *operands)
        return found

    def rounded(self, nodes: Sequence[Node], known: Mapping[str, torch.Tensor]) -> Tensors:
        """``known`` values, and those that ``nodes`` make of them, as the integer graph would have them, up to its
        arithmetic's own rounding."""
        found, log_scale = dict(known), self.log_scale
        for node in nodes:
            operands = [self.operand(node, i, found, log_scale) for i in range(len(node.inputs))]
            found[node.output] = self._encoded(OPS[node.op].torch(torch, self.graph.view(node), *operands), node.output)
        return found

    def encode(self, feeds: Mapping[str, torch.Tensor]) -> Tensors:
        return {name: self._encoded(x, name) for name, x in feeds.items()}

    def operand(self, node: Node, i: int, known: Tensors, log_scale: torch.Tensor) -> torch.Tensor:
        name, role = node.inputs[i], OPS[node.op].port(i).role
        if name not in self.constants:
            return self._encoded(known[name], (node.output, i))
        x = self.scaled(node, i, log_scale)
        if role == WEIGHT:
            return self.weight(node, self.moved(node, x))
        if role != ACT:
            return x
        if OPS[node.op].shared and name in self.keys:
            return self._encoded(x, name)
        return _own_range(x, self.plan.types[node.output].dtype)

    def scaled(self, node: Node, i: int, log_scale: torch.Tensor) -> torch.Tensor:
        x = self.constants[node.inputs[i]]
        for numbers, signs in self.labels.get((node.output, i), ()):
            x = x * torch.exp(log_scale[numbers] * signs)
        return x

    def _encoded(self, x: torch.Tensor, place: Any) -> torch.Tensor:
        """``x`` at a value or an input, rounded if it has an encoding."""
        if place not in self.keys:
            return x
        key = self.keys[place]
        return _Rounded.apply(x, *self.encoding(key), *RANGE[key[1]])

    def encoding(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        _, dtype, scale, zero = key
        change = self.parameters.get(self.names.get(key, ""))
        s, z = torch.tensor([scale]), torch.tensor([float(zero)])
        if change is not None:
            s = s * change[:1].exp()
        if change is not None and len(change) == 2:
            z = (z + change[1:] * RANGE[dtype][1]).clamp(*RANGE[dtype])
        return s, z

    def scale(self, node: Node, w: torch.Tensor) -> torch.Tensor:
        """Of a weight's codes, [O, blocks, 1]: as `quantize_weight` has them, block scales are whole multiples of the
        channel's."""
        peaks = w.reshape(*self._blocks(node), -1).abs().amax(2, keepdim=True).clamp_min(1e-9)
        clip = self.parameters.get(f"clip {node.output}")
        scale = peaks if clip is None else peaks * torch.sigmoid(clip)[..., None]
        scale = scale / RANGE[self.plan.precision[node.output].weights][1]
        if self._block(node) is None:
            return scale
        channel = scale.amax(1, keepdim=True) / LPBQ_STEPS
        ratio = scale / channel
        steps = (ratio.detach() - LPBQ_SLACK).ceil().clamp(1, LPBQ_STEPS)
        return channel * (ratio + (steps - ratio).detach())

    def weight(self, node: Node, w: torch.Tensor) -> torch.Tensor:
        """Rounded."""
        scale, top = self.scale(node, w), RANGE[self.plan.precision[node.output].weights][1]
        rows = w.reshape(scale.shape[0] * scale.shape[1], -1)
        zero = torch.zeros(len(rows))
        rounded = torch._fake_quantize_learnable_per_channel_affine(rows, scale.reshape(-1), zero, 0, -top, top, 1.0)
        return rounded.reshape(w.shape)

    def moved(self, node: Node, w: torch.Tensor) -> torch.Tensor:
        """A weight with what training adds to it."""
        step = self.steps.get(node.output)
        if step is None:
            return w
        change = self.parameters[f"weight {node.output}"]
        return w + (step * change.reshape(*step.shape[:2], -1)).reshape(w.shape)

    def fold(self) -> tuple[Graph, Plan]:
        """The graph with the scales in its constants (the function is the same, unless weights are learned: those are
        on the grid of their codes then), and the plan with the encodings that were learned, those of weights
        included."""
        graph = self.channels.rescale(self.graph, self.log_scale[1:].detach().double().numpy())
        types = {name: self.learned(kind, name) for name, kind in self.plan.types.items()}
        reads = {place: self.learned(kind, place) for place, kind in self.plan.reads.items()}
        plan, constants = replace(self.plan, types=types, reads=reads), dict(self.plan.constants)
        weights: dict[tuple[str, int], np.ndarray] = {}
        with torch.no_grad():
            for node in graph.nodes:
                if f"clip {node.output}" not in self.parameters:
                    continue
                w = self.moved(node, tensor(graph, node.inputs[1]))
                scale = self.scale(node, w)
                widest = scale * RANGE[self.plan.precision[node.output].weights][1]
                full = widest.expand(*scale.shape[:2], w.numel() // scale.numel()).reshape(w.shape).numpy()
                kind = constants[node.inputs[1]] = first_encoding(graph, plan, node, "minmax", full)[0]
                if node.output in self.steps:
                    assert kind.q is not None
                    weights[node.output, 1] = kind.q.dequantize(
                        kind.q.quantize(self.weight(node, w).numpy(), kind.dtype)
                    )
        return with_constants(graph, weights), replace(plan, constants=constants)

    def learned(self, kind: TensorType, place: Any) -> TensorType:
        if self.keys[place] not in self.names:
            return kind
        scale, zero = (x.detach() for x in self.encoding(self.keys[place]))
        return TensorType(kind.shape, kind.dtype, QParams(np.float32(scale[0]), int(zero[0].round())))


class _Rounded(torch.autograd.Function):
    """The nearest value that an encoding has, straight-through: what torch's learnable fake quantization computes, in
    passes that are vectorized. scale and zero: one element each; the zero point is rounded.

        y = s (clamp(round(x / s) + z) - z)    dy/ds = (y - x) / s within, y / s beyond    dy/dz = -s beyond"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int) -> Any:
        s, z = float(scale), round(float(zero))
        codes = torch.mul(x, 1 / s).round_()
        y = codes.clamp(low - z, high - z)
        beyond = y != codes
        ctx.save_for_backward(x, y.mul_(s), beyond)
        ctx.scale = s
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, y, beyond = ctx.saved_tensors
        gradient = gradients[0]
        passed = gradient.masked_fill(beyond, 0)
        ds = dz = None
        if ctx.needs_input_grad[1]:
            ds = ((gradient * y).sum() - (passed * x).sum()).reshape(1) / ctx.scale
        if ctx.needs_input_grad[2]:
            dz = (passed.sum() - gradient.sum()).reshape(1) * ctx.scale
        return passed, ds, dz, None, None


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
