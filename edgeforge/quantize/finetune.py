"""finetune: scales and biases of layers whose codes are chosen already, learned together through the rounded graph.

    W' = exp(a) s q,  b' = b + r      min over a, r of KL(float logits || rounded logits)      straight-through

One a and one r per output channel: codes stay what they are, and blocks keep their integer multipliers. After Kim et
al., "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization" (PEQA,
arXiv:2305.14152), which learns the scales; here the float model is the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from edgeforge.data import Dataset
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import LAYERS
from edgeforge.passes.constants import with_constants
from edgeforge.progress import track
from edgeforge.quantize.assign import Plan
from edgeforge.quantize.layerwise import rounded_node
from edgeforge.recipe import Finetune
from edgeforge.sim.evaluate import run_float


def finetune(graph: Graph, plan: Plan, teacher: Graph, config: Finetune, data: Dataset) -> tuple[Graph, Plan]:
    """``graph`` (weights on their grids) and ``plan`` with other scales and biases.

    teacher: the float graph; its first output is compared, class or token logits on the last axis. Repeatable."""
    layers = {node.output: node for node in graph.nodes if node.op in LAYERS and node.inputs[1] in plan.constants}
    scales = {name: torch.zeros(len(_data(graph, node, 1)), requires_grad=True) for name, node in layers.items()}
    shifts = {
        name: torch.zeros_like(scales[name], requires_grad=True) for name in layers if len(layers[name].inputs) == 3
    }
    optimizer = torch.optim.Adam(
        [
            {"params": [*scales.values()], "lr": config.scale_rate},
            {"params": [*shifts.values()], "lr": config.bias_rate},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    units = {name: _deviation(plan, name) for name in layers}
    order = np.random.default_rng(config.seed)
    output, wanted = graph.outputs[0], {}
    picks = np.concatenate([order.permutation(len(data)) for _ in range(config.steps * config.batch // len(data) + 1)])
    for step in track(range(config.steps), config.steps, "fine-tuning"):
        batch = [int(i) for i in picks[step * config.batch : (step + 1) * config.batch]]
        samples = [data.sample(i) for i in batch]
        for i, sample in zip(batch, samples, strict=True):
            if i not in wanted:
                wanted[i] = torch.from_numpy(run_float(teacher, sample)[teacher.outputs[0]])
        known = {name: torch.from_numpy(np.concatenate([s[name] for s in samples])) for name in graph.inputs}
        for node in graph.nodes:
            given: dict[int, torch.Tensor] = {}
            if node.output in layers:
                weight = torch.from_numpy(_data(graph, node, 1))
                given[1] = weight * scales[node.output].exp().reshape(-1, *[1] * (weight.ndim - 1))
            if node.output in shifts:
                given[2] = torch.from_numpy(_data(graph, node, 2)) + units[node.output] * shifts[node.output]
            known[node.output] = rounded_node(graph, plan, node, known, given)
        p = torch.log_softmax(torch.cat([wanted[i] for i in batch]), -1)
        loss = (p.exp() * (p - torch.log_softmax(known[output], -1))).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return _folded(graph, plan, layers, scales, {name: units[name] * shift for name, shift in shifts.items()})


def _data(graph: Graph, node: Node, i: int) -> np.ndarray:
    data = graph.values[node.inputs[i]].data
    assert data is not None
    return data


def _deviation(plan: Plan, name: str) -> float:
    """A hundredth of the range of a value: the unit of shifts."""
    q = plan.types[name].q
    assert q is not None
    return float(q.scale) * (255 if plan.types[name].dtype == "u8" else 65535) / 100


def _folded(
    graph: Graph,
    plan: Plan,
    layers: Mapping[str, Node],
    scales: Mapping[str, torch.Tensor],
    shifts: Mapping[str, torch.Tensor],
) -> tuple[Graph, Plan]:
    changed, constants = {}, dict(plan.constants)
    for name, node in layers.items():
        kind, factor = plan.constants[node.inputs[1]], scales[name].detach().exp().numpy()
        q = kind.q
        assert q is not None
        codes = q.quantize(_data(graph, node, 1), kind.dtype)
        q = replace(q, scale=(q.scale.T * factor).T.astype(np.float32))
        constants[node.inputs[1]] = replace(kind, q=q)
        changed[name, 1] = q.dequantize(codes)
        if name in shifts:
            changed[name, 2] = _data(graph, node, 2) + shifts[name].detach().numpy()
    return with_constants(graph, changed), replace(plan, constants=constants)
