"""What Hexagon's compiler takes of an integer graph, and the edits that bring the rest into that form.

Found by compiling each form with QNN 2.49 (soc_model 57) with the CPU fallback disabled; a form that is not taken in
integers is either refused or, silently, computed in float16 between a Dequantize and a Quantize: so are all operations
whose activations differ in width, products with a uint8 second operand apart (see edgeforge/quantize/widths.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgeforge.backends import Edit
from edgeforge.errors import Reason
from edgeforge.ir.graph import Graph, Node, NodeView
from edgeforge.ir.op import OPS
from edgeforge.ir.rules._kinds import averages_apart, covers_image
from edgeforge.ir.rules.htp_norm import narrow_gain
from edgeforge.ir.types import RANGE, QParams, TensorType, Value
from edgeforge.passes.dead import remove_dead
from edgeforge.target import Target

#: QNN 2.49: "API or feature is not supported by implementation" (error 1000) when such a context is created here.
NOT_RUN = "has not run: the x86-64 emulator loads no context binary that shares weights between graphs"


class Editor:
    """A graph under change: new nodes in order, values by name, and the list of what was changed."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.values = dict(graph.values)
        self.nodes: list[Node] = []
        self.edits: list[Edit] = []
        self._producers = graph.producers()

    def producer(self, node: Node) -> Node | None:
        """The node that makes the first input."""
        return self._producers.get(node.inputs[0])

    def put(self, node: Node, kind: TensorType | None = None) -> str:
        """Append a node; ``kind`` is the type of its output where that is a new value."""
        if kind is not None:
            self.values[node.output] = Value(node.output, kind)
        self.nodes.append(node)
        return node.output

    def note(self, node: Node, what: str, why: str) -> None:
        self.edits.append(Edit(node.output, what, why))

    def const(self, name: str, kind: TensorType, data: np.ndarray) -> str:
        """A constant under ``name``, numbered when another value has that name."""
        found, number = name, 0
        while found in self.values:
            number += 1
            found = f"{name}.{number}"
        self.values[found] = Value(found, kind, data)
        return found


def prepare(graph: Graph, target: Target) -> tuple[Graph, tuple[Edit, ...]]:
    """The graph in forms that Hexagon computes in integers, and every change. Names of inputs and outputs stay; the new
    nodes carry no rounding constants (`with_profile` adds them)."""
    forms = (_split_silu, _split_rsqrt, _layer_norm, _average, _transposed, _mean)
    places = (_pad, _pad_behind, _clip_relu, _flat, _transpose)
    graph, edits = rewritten(graph, forms + places)
    return remove_dead(graph), edits


def rewritten(graph: Graph, steps: Sequence[Callable[[Editor, Node], None]]) -> tuple[Graph, tuple[Edit, ...]]:
    """The graph after each step has put (or replaced) every node, and every change."""
    edits: list[Edit] = []
    for step in steps:
        editor = Editor(graph)
        for node in graph.nodes:
            step(editor, node)
        graph = graph.rebuild(editor.nodes, editor.values)
        edits += editor.edits
    return graph, tuple(edits)


def _split_silu(e: Editor, node: Node) -> None:
    """y = silu(x)   =>   s = sigmoid(x); y = mul(x, s)"""
    if node.op != "silu":
        e.put(node)
        return
    kind = e.graph.type(node.inputs[0])
    gate = QParams(np.float32(1 / (RANGE[kind.dtype][1] + 1)))
    name = f"{node.output}.sigmoid"
    e.put(Node("sigmoid", node.inputs, name, {}, node.source), TensorType(kind.shape, kind.dtype, gate))
    e.put(Node("mul", (node.inputs[0], name), node.output, {}, node.source))
    e.note(node, "split into sigmoid and mul", "HTP has no integer kernel for silu")


def _split_rsqrt(e: Editor, node: Node) -> None:
    """y = rsqrt(x)   =>   r = sqrt(x); y = reciprocal(r)"""
    if node.op != "rsqrt":
        e.put(node)
        return
    kind = e.graph.type(node.inputs[0])
    assert kind.q is not None
    top = RANGE[kind.dtype][1]
    largest = max(np.sqrt((top - kind.q.zero) * np.float64(kind.q.scale)), np.finfo(np.float32).tiny)
    name = f"{node.output}.sqrt"
    root = TensorType(kind.shape, kind.dtype, QParams(np.float32(largest / top), 0))
    e.put(Node("sqrt", node.inputs, name, {}, node.source), root)
    e.put(Node("reciprocal", (name,), node.output, {}, node.source))
    e.note(node, "split into sqrt and reciprocal", "HTP has no integer kernel for rsqrt")


def _layer_norm(e: Editor, node: Node) -> None:
    """A uint8 gain, and an int32 bias with one scale (s_x * s_gain): the only form with an integer kernel."""
    if node.op != "layer_norm":
        e.put(node)
        return
    gain, bias = (e.graph.values[name] for name in node.inputs[1:])
    codes, q, offset = narrow_gain(e.graph.view(node))
    single = QParams(e.graph.view(node).q(0).scale * q.scale)
    if gain.type.dtype != "u8":
        e.note(node, "gain re-encoded as uint8", "HTP's integer kernel takes no 16-bit gain")
    gain_name = e.const(f"{gain.name}.gain", TensorType(gain.type.shape, "u8", q), codes)
    bias_name = e.const(f"{bias.name}.bias", TensorType(bias.type.shape, "i32", single), offset)
    e.put(replace(node, inputs=(node.inputs[0], gain_name, bias_name)))


def _average(e: Editor, node: Node) -> None:
    """y = avg_pool(x)   =>   y = reduce_mean(x) where a window is the image, else a convolution by ones: depthwise
    where HTP has that, dense and diagonal where not"""
    if node.op != "avg_pool":
        e.put(node)
        return
    n = e.graph.view(node)
    if covers_image(n):
        e.put(replace(node, op="reduce_mean", attrs={"axes": (2, 3), "keepdims": True}))
        return
    channels, kernel = n.shape(0)[1], node.attrs["kernel"]
    groups = channels if averages_apart(n) else 1
    q = QParams(np.full(channels, np.float32(1 / np.prod(kernel))), 0, axis=0)
    ones = np.ones((channels, 1, *kernel), np.int8)
    if groups == 1:
        ones = ones * np.eye(channels, dtype=np.int8)[:, :, None, None]
    w = e.const(f"{node.output}.ones", TensorType(ones.shape, "i8", q), ones)
    attrs = {key: node.attrs[key] for key in ("stride", "pads")} | {"dilation": (1, 1), "groups": groups}
    e.put(Node("conv2d", (node.inputs[0], w), node.output, attrs, node.source))
    e.note(node, "written as a convolution", "HTP's average rounds twice, and reads beyond a padded edge")


def _transposed(e: Editor, node: Node) -> None:
    """y = conv_transpose2d(x, w)   =>   the same with zeros in w: between the elements for a dilation, at the end for
    rows and columns that no kernel reaches, between the channels of a depthwise layer"""
    plain = {"dilation": (1, 1), "groups": 1, "output_padding": (0, 0)}
    if node.op != "conv_transpose2d" or plain.items() <= node.attrs.items():
        e.put(node)
        return
    w, attrs = e.graph.values[node.inputs[1]], node.attrs
    assert w.data is not None
    codes = w.data
    if attrs["groups"] > 1:
        codes = codes * np.eye(len(codes), dtype=codes.dtype)[:, :, None, None]
    steps = attrs["dilation"]
    sides = [steps[i] * (codes.shape[i + 2] - 1) + 1 for i in (0, 1)]
    wide = np.zeros((*codes.shape[:2], *(sides[i] + attrs["output_padding"][i] for i in (0, 1))), codes.dtype)
    wide[:, :, : sides[0] : steps[0], : sides[1] : steps[1]] = codes
    name = e.const(f"{node.output}.wide", replace(w.type, shape=wide.shape), wide)
    e.put(replace(node, inputs=(node.inputs[0], name, *node.inputs[2:]), attrs={**attrs, **plain}))
    why = "HTP has no dilation or groups here, and leaves garbage where no kernel reaches"
    e.note(node, "zeros in the weights", why)


def _mean(e: Editor, node: Node) -> None:
    """y = reduce_mean(x)   =>   the mean of images of one column: transpose, reshape, reduce_mean, reshape"""
    image = {"axes": (2, 3), "keepdims": True}
    kind, out = e.graph.type(node.inputs[0]), e.graph.type(node.output)
    if node.op != "reduce_mean" or (node.attrs == image and len(kind.shape) == 4):
        e.put(node)
        return
    axes = node.attrs["axes"]
    count = kind.size // out.size
    perm = (*(axis for axis in range(len(kind.shape)) if axis not in axes), *axes)
    name, shape = node.inputs[0], (1, out.size, count, 1)
    if perm != tuple(range(len(perm))):
        moved = replace(kind, shape=tuple(kind.shape[axis] for axis in perm))
        name = e.put(Node("transpose", (name,), f"{node.output}.moved", {"perm": perm}, node.source), moved)
    rows = Node("reshape", (name,), f"{node.output}.image", {"shape": shape}, node.source)
    name = e.put(rows, replace(kind, shape=shape))
    mean = Node("reduce_mean", (name,), f"{node.output}.mean", image, node.source)
    name = e.put(mean, replace(out, shape=(1, out.size, 1, 1)))
    e.put(Node("reshape", (name,), node.output, {"shape": out.shape}, node.source))
    e.note(node, "written as the mean of an image", "HTP's mean of other axes rounds at unknown places")


def _pad(e: Editor, node: Node) -> None:
    """y = conv2d(x), padded on the left   =>   p = pad(x); y = conv2d(p), for depthwise 5x5 with stride 2 at 16 bits"""
    pads = node.attrs.get("pads", (0, 0, 0, 0))
    if node.op != "conv2d" or not pads[1] or node.attrs["stride"] != (2, 2):
        e.put(node)
        return
    (_, depth, *kernel), kind = e.values[node.inputs[1]].type.shape, e.graph.type(node.inputs[0])
    if depth != 1 or kernel != [5, 5] or kind.dtype != "u16":
        e.put(node)
        return
    pad_apart(e, node, "HTP's kernel fills its left edge with a wrong low byte")


def pad_apart(e: Editor, node: Node, why: str) -> None:
    """y = op(x), padded   =>   p = pad(x); y = op(p)"""
    kind, pads = e.graph.type(node.inputs[0]), node.attrs["pads"]
    batch, channels, height, width = kind.shape
    top, left, bottom, right = pads
    padded = replace(kind, shape=(batch, channels, height + top + bottom, width + left + right))
    name = e.put(Node("pad", node.inputs[:1], f"{node.output}.padded", {"pads": pads}, node.source), padded)
    e.put(replace(node, inputs=(name, *node.inputs[1:]), attrs={**node.attrs, "pads": (0, 0, 0, 0)}))
    e.note(node, "padded by an op of its own", why)


def _pad_behind(e: Editor, node: Node) -> None:
    """p = f(x); y = pad(p), at the right and not at the left   =>   m = max_pool(p) of one element; y = pad(m)

    At 16 bits HTP leaves garbage at the right of the rows between. Behind layers and pools it does not."""
    before, kind = e.producer(node), e.graph.type(node.inputs[0])
    if node.op != "pad" or kind.dtype != "u16" or node.attrs["pads"][1] or not node.attrs["pads"][3]:
        e.put(node)
        return
    if before is None or before.op == "max_pool" or OPS[before.op].numerics == "dot":
        e.put(node)
        return
    one = {"kernel": (1, 1), "stride": (1, 1), "pads": (0, 0, 0, 0)}
    name = e.put(Node("max_pool", node.inputs, f"{node.output}.unpadded", one, node.source), kind)
    e.put(replace(node, inputs=(name,)))
    e.note(node, "behind a max_pool of one element", "HTP leaves garbage in the padding of an element-wise op's result")


def _clip_relu(e: Editor, node: Node) -> None:
    """y = relu(clip(x))   =>   y = clip(x), from zero on"""
    before = e.producer(node)
    if node.op != "relu" or before is None or before.op != "clip":
        e.put(node)
        return
    if e.graph.type(node.inputs[0]) != e.graph.type(node.output):
        e.put(node)
        return
    low, high = (max(float(before.attrs[key]), 0.0) for key in ("low_real", "high_real"))
    e.put(replace(before, output=node.output, attrs={"low_real": low, "high_real": high}))
    e.note(node, "joined with the clip before it", "HTP merges the two and drops the upper limit")


def _flat(e: Editor, node: Node) -> None:
    """y = linear(x, w, b) of rank 3 and more   =>   the same on rows: reshape, linear, reshape

    HTP's fully connected op takes a bias; a matrix product takes none, and an int32 addition is not offered."""
    if node.op != "linear" or len(node.inputs) < 3 or len(e.graph.type(node.output).shape) == 2:
        e.put(node)
        return
    x, y = (e.graph.type(name) for name in (node.inputs[0], node.output))
    rows = (x.size // x.shape[-1],)
    flat, out = (replace(kind, shape=(*rows, kind.shape[-1])) for kind in (x, y))
    name = f"{node.output}.rows"
    e.put(Node("reshape", node.inputs[:1], f"{name}.in", {"shape": flat.shape}, node.source), flat)
    e.put(replace(node, inputs=(f"{name}.in", *node.inputs[1:]), output=name), out)
    e.put(Node("reshape", (name,), node.output, {"shape": y.shape}, node.source))


def _transpose(e: Editor, node: Node) -> None:
    """y = transpose(x) of rank 3 from a graph input to a graph output   =>   the same at rank 4

    ONNX Runtime strips such a transpose of its encodings, and HTP takes bare uint8 tensors at rank 4 only."""
    kind, shape = e.graph.type(node.output), e.graph.type(node.inputs[0]).shape
    bare = node.inputs[0] in e.graph.inputs and node.output in e.graph.outputs
    if node.op != "transpose" or not bare or len(shape) != 3:
        e.put(node)
        return
    wide, moved = f"{node.output}.rank4", f"{node.output}.moved"
    perm = (0, *(axis + 1 for axis in node.attrs["perm"]))
    e.put(Node("reshape", node.inputs, wide, {"shape": (1, *shape)}, node.source), replace(kind, shape=(1, *shape)))
    e.put(Node("transpose", (wide,), moved, {"perm": perm}, node.source), replace(kind, shape=(1, *kind.shape)))
    e.put(Node("reshape", (moved,), node.output, {"shape": kind.shape}, node.source))


def refusals(graph: Graph, target: Target) -> list[Reason]:
    """Forms that HTP rejects, computes wrongly, or never finishes to compile."""
    reasons = []
    producers = graph.producers()
    for node in graph.nodes:
        n = graph.view(node)
        found = [*_wrong_layer(n), *_wrong_product(n, target)] if OPS[node.op].numerics == "dot" else []
        found += _wrong_elsewhere(n, producers)
        reasons += [Reason(node.source or node.output, node.op, why, remedy) for why, remedy in found]
    return reasons


def _wrong_layer(n: NodeView) -> Iterator[tuple[str, str]]:
    """(why, remedy) of weights and their shapes."""
    x, w = n.type(0), n.type(1)
    assert w.q is not None
    halves = n.node.op == "conv2d" and w.shape[1:] == (1, 2, 2) and n["stride"] == (2, 2)
    if halves and x.dtype == "u8" and 2 <= n["groups"] == x.shape[1] <= 4:
        why = "HTP computes 8-bit depthwise 2x2 convolutions of stride 2 wrongly for 2 to 4 channels"
        yield why, "a dense convolution, or w8a16"
    if n.node.op == "conv_transpose2d" and w.dtype == "i4" and w.shape[0] == 1 and n.arity == 3:
        why = "HTP's compiler takes no bias beside 4-bit weights of one output channel here"
        yield why, "8-bit weights, or no bias"
    if w.q.block is not None and x.dtype == "u8":
        why = "block-wise weights with 8-bit activations are not offered by HTP"
        yield why, "w4a16 with the same block, or per-channel w4a8"
    elif w.q.block is not None and n.arity > 2:
        yield "block-wise weights with a bias are computed in float16 by HTP", "per-channel w8a16, or no bias"


def _wrong_product(n: NodeView, target: Target) -> Iterator[tuple[str, str]]:
    """(why, remedy) of the widths and encodings of a matmul."""
    if n.node.op != "matmul":
        return
    widths, wanted = (n.type(0).dtype, n.type(1).dtype), target.second_operand_zero
    if (*widths, n.out.dtype) == ("u8", "u16", "u8"):
        yield "HTP takes no uint8 x uint16 -> uint8", "a 16-bit result"
    if widths == ("u16", "u8") and wanted not in (None, n.zero(1)):
        why = f"the uint8 second operand has zero point {n.zero(1)}, HTP computes right results with {wanted} only"
        yield why, "requantize the operand"


def _wrong_elsewhere(n: NodeView, producers: Mapping[str, Node]) -> Iterator[tuple[str, str]]:
    """(why, remedy) of the other ops."""
    if n.node.op == "erf":
        yield "HTP has no kernel for it", "GELU as one op, which it has"
    if n.node.op == "mul" and n.out.dtype == "u16" and _never_ends(n):
        why = "HTP's compiler does not end at this ratio of scales (s_a * s_b / s_y just above a power of two)"
        yield why, "another range of the output"
    if n.node.op == "reshape" and _mixes_rows(n, producers):
        why = "HTP mixes up the rows of an 8-bit product for 2 heads of 8 rows each"
        yield why, "another number of rows (language.chunk), or w4a16-b32"


def _never_ends(n: NodeView) -> bool:
    """Whether a 16-bit product's ratio lies a little above a power of two, from 1/8 on."""
    fraction, exponent = np.frexp(np.float32(n.q(0).scale * n.q(1).scale) / n.q(-1).scale)
    return bool(exponent >= -2 and 0.5 < fraction < 0.5 + 2.0**-16)


def _mixes_rows(n: NodeView, producers: Mapping[str, Node]) -> bool:
    """y: u8 [1, 2g, 8, d] = reshape(requantize(matmul(reshape(a), b) [1, g, 16, d])), g > 1: HTP takes the rows in
    another order. With other counts of rows or heads, or without either reshape, they are right."""
    chain = [n.node]
    while chain[-1].inputs[0] in producers and len(chain) < 4:
        chain.append(producers[chain[-1].inputs[0]])
    if [link.op for link in chain] != ["reshape", "requantize", "matmul", "reshape"]:
        return False
    before, after = n.graph.type(chain[2].output).shape, n.out.shape
    return len(before) == len(after) == 4 and before[1] > 1 and before[2] == 16 and after[1:3] == (2 * before[1], 8)
