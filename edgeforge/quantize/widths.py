"""widths: changes of encoding around nodes whose activations differ in width, for runtimes that compute at one width.

    y: u16 = op(a: u16, b: u8)   =>   b16 = requantize(b) (codes times 256); y = op(a, b16)
    y: u8 = op(a: u16)           =>   y16: u16 = op(a); y = requantize(y16)

The wide encoding of an 8-bit value stands for the same real numbers: widening rounds nothing. A narrow result is
rounded twice, as in the runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeforge.ir.fixed import clamp_codes
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import ACT, OPS
from edgeforge.ir.types import RANGE, QParams, TensorType, Value


def equal_widths(graph: Graph) -> Graph:
    """``graph`` with one width at each node; changes of encoding, data movement and the uint8 second operand of a
    16-bit product stay. The new nodes have no rounding constants yet."""
    values, nodes = dict(graph.values), []
    for node in graph.nodes:
        activations, out = _activations(node), graph.type(node.output)
        kinds = [graph.type(node.inputs[i]).dtype for i in activations]
        if len({out.dtype, *kinds}) < 2:
            nodes.append(node)
            continue
        inputs = list(node.inputs)
        for i, kind in zip(activations, kinds, strict=True):
            if kind == "u8":
                inputs[i] = _widen(graph, inputs[i], values, nodes)
        if kinds[0] == "u8" and OPS[node.op].numerics == "dot" and len(inputs) == 3:
            inputs[2] = _finer_bias(graph.values[inputs[2]], values)
        if out.dtype == "u16":
            nodes.append(replace(node, inputs=tuple(inputs)))
            continue
        output16 = f"{node.output}.u16"
        values[output16] = Value(output16, widened(out))
        attrs = {k: v for k, v in node.attrs.items() if k != "clamp" or clamp_codes(graph.view(node)) != RANGE["u8"]}
        nodes.append(replace(node, inputs=tuple(inputs), output=output16, attrs=attrs))
        nodes.append(Node("requantize", (output16,), node.output, {}, node.source))
    return graph.rebuild(nodes, values)


def _activations(node: Node) -> list[int]:
    """The inputs whose width counts: none where codes move or change their encoding, of a product the first, of a norm
    the normalized one."""
    op = OPS[node.op]
    if op.numerics == "move" or node.op == "requantize":
        return []
    if op.numerics in ("dot", "norm"):
        return [0]
    return [i for i in range(len(node.inputs)) if op.port(i).role == ACT]


def widened(kind: TensorType) -> TensorType:
    """The 16-bit encoding whose codes are 256 times the 8-bit ones."""
    assert kind.q is not None
    return TensorType(kind.shape, "u16", QParams(kind.q.scale / np.float32(256), kind.q.zero * 256))


def _widen(graph: Graph, name: str, values: dict[str, Value], nodes: list[Node]) -> str:
    """The 16-bit form of an 8-bit value, one for all its readers."""
    made, value = f"{name}.u16", graph.values[name]
    if made not in values:
        data = None if value.data is None else value.data.astype(np.uint16) * np.uint16(256)
        values[made] = Value(made, widened(value.type), data)
        if data is None:
            nodes.append(Node("requantize", (name,), made))
    return made


def _finer_bias(bias: Value, values: dict[str, Value]) -> str:
    """The bias at 1/256 of its scale, as a widened input demands."""
    assert bias.data is not None and bias.type.q is not None
    codes = np.clip(bias.data.astype(np.int64) * 256, *RANGE["i32"]).astype(np.int32)
    q = replace(bias.type.q, scale=bias.type.q.scale / np.float32(256))
    made = f"{bias.name}.fine"
    values[made] = Value(made, replace(bias.type, q=q), codes)
    return made
