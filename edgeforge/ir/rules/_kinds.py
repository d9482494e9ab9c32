"""Kinds of nodes that a runtime has a kernel of its own for: a profile names a rule for those of its runtime. All so
far are Hexagon's."""

from __future__ import annotations

from collections.abc import Iterator

from edgeforge.ir.graph import NodeView
from edgeforge.ir.op import OPS


def kinds(n: NodeView) -> Iterator[str]:
    """The kinds that a node is of, the most special first."""
    if _is_depthwise_stride_2(n):
        yield "depthwise_2"
    if n.node.op == "softmax" and n.shape(0)[n["axis"]] < 3:
        yield "softmax_short"
    if n.node.op == "softmax" and n.shape(0)[n["axis"]] <= 16:
        yield "softmax_narrow"
    if covers_image(n):
        yield "global"
    if n.node.op == "resize_bilinear" and _doubles(n):
        yield "doubled"
    if OPS[n.node.op].numerics == "dot" and n.type(1).dtype == "i4":
        yield "dot_i4"
    if n.node.op == "requantize" and _beside_table(n):
        yield "requantize_beside_table"


def covers_image(n: NodeView) -> bool:
    """Whether a node averages over windows as large as the image."""
    return n.node.op == "avg_pool" and n["kernel"] == n.shape(0)[2:] and not any(n["pads"])


def averages_apart(n: NodeView) -> bool:
    """Whether Hexagon averages as a depthwise convolution: those of strides above 4 it refuses, those of 2 to 4
    channels it computes wrongly."""
    return n.shape(0)[1] > 4 and max(n["stride"]) <= 4


def _doubles(n: NodeView) -> bool:
    """Whether bilinear resizing puts one place between every two of the input, along both axes."""
    extra = {"asymmetric": 0, "align_corners": 1}.get(n["coordinates"])
    return extra is not None and all(new == 2 * old - extra for old, new in zip(n.shape(0)[2:], n["size"], strict=True))


def _beside_table(n: NodeView) -> bool:
    """Whether a function that Hexagon looks up stands directly before or behind: the two become one table."""
    name, output = n.node.inputs[0], n.node.output
    before = [node for node in n.graph.nodes if node.output == name]
    readers = [node for node in n.graph.nodes if name in node.inputs]
    behind = [node for node in n.graph.nodes if output in node.inputs]
    alone = len(readers) == 1 and name not in n.graph.outputs
    near = (before if alone else []) + (behind if len(behind) == 1 and output not in n.graph.outputs else [])
    return any(_is_looked_up(n.graph.view(node)) for node in near)


def _is_looked_up(n: NodeView) -> bool:
    """Whether a node is a function of 8-bit codes; silu is a product, and a relu that changes nothing is left out."""
    if OPS[n.node.op].real is None or n.node.op in ("requantize", "silu") or n.type(0).dtype != "u8":
        return False
    return not (n.node.op == "relu" and n.q(0) == n.q(-1) and n.zero(0) == 0)


def _is_depthwise_stride_2(n: NodeView) -> bool:
    """Whether Hexagon has its own kernel: for sides of 3 to 7, but not of 4 at 16 bits."""
    if n.node.op not in ("conv2d", "avg_pool") or n["stride"] != (2, 2):
        return False
    channels, sides = n.shape(0)[1], n["kernel"] if "kernel" in n.attrs else n.shape(1)[2:]
    if covers_image(n):
        return False
    alone = averages_apart(n) if n.node.op == "avg_pool" else n["groups"] == channels == n.out.shape[1]
    fits = min(sides) >= 3 and max(sides) <= 7 and not (n.type(0).dtype == "u16" and 4 in sides)
    return alone and fits and channels > 1
