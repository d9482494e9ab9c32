"""Work of each layer as an NPU runs it: fused, padded to its tiles, split into terms that the latency model prices.

The terms and what they count (per inference):
    MAC terms, in million padded multiply-accumulates: conv, point, stem, dilated, grouped, depthwise, transposed,
        volume, dense, attend
    vector terms, in thousand padded elements: feed (read and written by MAC layers), load (weights of convolutions,
        into the array of multipliers), add (and other arithmetic of two values), scale (arithmetic with a constant and
        clamps that nothing fuses: a pass of their own), curve, softmax, norm, pool (and means and maxima), resize,
        exotic; window (additions of means over windows that overlap, 3 x 3 excepted) and sum (elements that are
        summed): the compiler has no fast kernel for them, but makes a pooling of a mean
    move terms, in thousand padded elements: copy, permute (also reshapes that change the depth)
    io terms: input, output, in thousand elements of whole tiles; image (arithmetic on up to 4 channels: those of a
        picture, mostly), in thousand elements
    overheads, in layers: mac_op, vector_op, move_op, sum_op (sums); batch_op (matrices of an activation product, each
        by the root of its second operand's size: it is rearranged as weights are); graph (1)
    DDR terms, in kB: weights, spill
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgeforge.estimate.program import Layer, Program, Shape

MAC = ("conv", "point", "stem", "dilated", "grouped", "depthwise", "transposed", "volume", "dense", "attend")
VECTOR = ("feed", "load", "add", "scale", "curve", "softmax", "norm", "pool", "window", "sum", "resize", "exotic")
MOVE = ("copy", "permute")
IO = ("input", "output", "image")
OVERHEAD = ("graph", "mac_op", "vector_op", "move_op", "sum_op", "batch_op")
DDR = ("weights", "spill")
TERMS = (*MAC, *VECTOR, *MOVE, *IO, *OVERHEAD, *DDR)
#: What a chip's own factors apply to.
GROUPS = {"compute": MAC, "vector": (*VECTOR, *MOVE, *IO), "overhead": OVERHEAD, "ddr": DDR}
MAC_OPS = ("conv2d", "conv3d", "conv_transpose", "linear", "matmul")
CLAMPS = ("relu", "relu6", "clip", "leaky_relu", "prelu")
CLAMPED = ("conv2d", "conv3d", "conv_transpose", "linear", "add")
COPIES = ("concat", "slice", "pad", "gather", "expand", "depth_to_space", "space_to_depth")
FOLDING = ("conv2d", "conv3d", "linear")
CLASSES = {
    "add": "add", "sub": "add", "mul": "add", "div": "exotic", "reciprocal": "exotic", "neg": "add", "relu": "add",
    "relu6": "add", "clip": "add", "leaky_relu": "add", "prelu": "add", "requantize": "add", "batch_norm": "add",
    "softmax": "softmax",
    "layer_norm": "norm", "rms_norm": "norm", "instance_norm": "norm", "group_norm": "norm", "channel_norm": "norm",
    "l2_norm": "norm", "max_pool": "pool", "avg_pool": "pool", "resize": "resize", "reduce_mean": "pool",
    "reduce_sum": "sum", "reduce_max": "pool", "argmax": "pool", "roi_align": "exotic",
}  # fmt: skip
IMAGE_OPS = ("conv2d", "conv3d", "conv_transpose", "max_pool", "avg_pool", "resize", "roi_align")
TILE_DEPTH, TILE_SIDE = 32, 8
#: A tile is 8 x 8 x 32 bytes (`8h8w32c` in Apache TVM's layouts for Hexagon); at 16 bits it is taken to be half as
#: wide, which fits the measurements better.
TILE_WIDTH = {8: 8, 16: 4}
#: Channels that a convolution of more than 1 x 1 makes at least in an integer graph, by the evidence of the fit.
DEEP = 64
#: Convolutions whose weights are loaded into the array of multipliers, which counts on small maps.
LOADED = ("conv", "point", "stem", "dilated", "volume")
#: What fills its tiles badly: a linear layer of a sequence that is no multiple of 4 (49, 197), a 1 x 1 convolution of a
#: map of one row. Times its multiply-accumulates, by the evidence of the fit.
RAGGED, ONE_ROW = 1.75, 2.5
#: Layers that the vendor's converter makes of a batch norm of its own in an integer graph (one in float).
NORM_LAYERS = 3
#: Elements of a second operand of an activation product that makes one unit of batch_op.
OPERAND = 2048


@dataclass(frozen=True)
class Precision:
    """Bits of weights and activations; ``name`` picks the fitted rates."""

    name: str
    weights: int
    activations: int


PRECISIONS = {
    "float": Precision("float", 16, 16),
    "w8a8": Precision("w8a8", 8, 8),
    "w8a16": Precision("w8a16", 8, 16),
    "w4a8": Precision("w8a8", 4, 8),
    "w4a16": Precision("w8a16", 4, 16),
}


@dataclass
class Work:
    """Amounts of one layer, by term; ``fused``: computed inside its producer."""

    layer: Layer
    amounts: dict[str, float] = field(default_factory=dict)
    weight_bytes: float = 0.0
    moved_bytes: float = 0.0


def up(size: int, tile: int) -> int:
    return -(-size // tile) * tile


class Layout:
    """Which axis of each value is stored as depth (the innermost, tiled by 32): channels of images, the last axis of
    everything else. A permutation that keeps the order of the other axes moves nothing."""

    def __init__(self, program: Program):
        self.shapes = program.shapes
        self.axis = {name: 1 if len(self.shapes[name]) >= 4 else len(self.shapes[name]) - 1 for name in program.inputs}

    def padded(self, name: str, narrow: int = 4) -> int:
        """Elements with the depth filled up to its tile; up to 4 channels take ``narrow``."""
        shape = self.shapes[name]
        if not shape:
            return 1
        depth = shape[self.axis.get(name, len(shape) - 1)]
        return math.prod(shape) // max(depth, 1) * up(depth, TILE_DEPTH if depth > 4 else narrow)

    def ports(self, names: Sequence[str]) -> float:
        """Thousand elements of inputs or outputs: they are converted from and to whole tiles."""
        return sum(self.padded(name, TILE_DEPTH) for name in names) / 1e3

    def follow(self, layer: Layer) -> bool:
        """Set the output's axis; returns whether a transpose or reshape has to move elements."""
        shape, source = self.shapes[layer.output], layer.inputs[0] if layer.inputs else ""
        old = self.axis.get(source, len(shape) - 1)
        last = len(shape) - 1
        if layer.op in IMAGE_OPS:
            self.axis[layer.output] = 1
        elif layer.op in ("linear", "matmul", "gather"):
            self.axis[layer.output] = last
        elif layer.op == "transpose":
            perm = tuple(layer.attrs["perm"])
            rest = [axis for axis in perm if axis != old and self.shapes[source][axis] > 1]
            kept = rest == sorted(rest)
            self.axis[layer.output] = perm.index(old) if kept else last
            return not kept
        elif layer.op == "reshape":
            before = self.shapes[source]
            if old == 1 and len(shape) > 1 and before[1] == shape[1] and before[0] == shape[0]:
                self.axis[layer.output] = 1
                return False
            self.axis[layer.output] = last
            same = old == len(before) - 1 and before[-1] == shape[-1]
            return not same and math.prod(before) != max(before)
        else:
            reduced = layer.op in ("reduce_mean", "reduce_sum") and old != 1
            self.axis[layer.output] = last if reduced else min(old, last)
        return False


#: Bytes of on-chip memory that decide what spills. Chips with less show it in their factor of the spill term.
VTCM_BYTES = 8e6


def works(program: Program, precision: Precision) -> list[Work]:
    """One `Work` per layer, in order; fused layers and views have no amounts. The first layer also carries the fixed
    cost and the graph's inputs, the last its outputs."""
    made = {layer.output: layer for layer in program.layers}
    readers: dict[str, list[Layer]] = {}
    for layer in program.layers:
        for name in layer.inputs:
            readers.setdefault(name, []).append(layer)
    layout, out = Layout(program), []
    for layer in program.layers:
        moved = layout.follow(layer)
        work = Work(layer)
        out.append(work)
        if _fused(layer, made, readers, program):
            continue
        bits = layer.bits or precision.activations
        encoded = layer.bits is not None or precision.name != "float"
        kind, work.amounts = _amounts(layer, layout, moved, TILE_WIDTH.get(bits, TILE_SIDE), encoded)
        if not kind:
            continue
        work.amounts[kind] = 1.0
        if layer.op == "batch_norm" and precision.name != "float":
            work.amounts = {term: NORM_LAYERS * amount for term, amount in work.amounts.items()}
        if layer.op != "gather":
            work.weight_bytes = layer.weights * (layer.weight_bits or precision.weights) / 8
        work.amounts["weights"] = work.weight_bytes / 1e3
        work.moved_bytes = sum(layout.padded(name) for name in {*layer.inputs, layer.output}) * bits / 8
        if work.moved_bytes > VTCM_BYTES:
            work.amounts["spill"] = work.moved_bytes / 1e3
    out[0].amounts |= {"graph": 1.0, "input": layout.ports(program.inputs)}
    out[-1].amounts["output"] = layout.ports(program.outputs)
    return out


def _fused(layer: Layer, made: dict[str, Layer], readers: dict[str, list[Layer]], program: Program) -> bool:
    """Clamps and constant factors or addends go into the layer before, zeros around a map into the convolution after;
    a matmul transposes its second operand; whole tiles of an image's channels are a view."""
    if layer.op == "expand":
        return True
    if layer.op == "pad" and layer.attrs.get("mode", "constant") == "constant":
        found = readers.get(layer.output, [])
        around = program.shapes[layer.inputs[0]][:2] == program.shapes[layer.output][:2]
        return around and bool(found) and all(reader.op in ("conv2d", "conv3d") for reader in found)
    if layer.op == "slice" and layer.output not in program.outputs:
        before, shape = program.shapes[layer.inputs[0]], program.shapes[layer.output]
        return len(shape) == 4 and before[2:] == shape[2:] and shape[1] % TILE_DEPTH == 0
    if layer.op == "transpose" and layer.output not in program.outputs:
        rank = len(layer.attrs["perm"])
        swapped = tuple(layer.attrs["perm"]) == (*range(rank - 2), rank - 1, rank - 2)
        found = readers.get(layer.output, [])
        return swapped and all(reader.op == "matmul" and reader.inputs[-1] == layer.output for reader in found)
    if len(layer.inputs) != 1:
        return False
    before = made.get(layer.inputs[0])
    alone = before is not None and len(readers[before.output]) == 1
    into = CLAMPED if layer.op in CLAMPS else FOLDING if layer.op in ("add", "sub", "mul", "batch_norm") else ()
    return alone and before.op in into


def _amounts(layer: Layer, layout: Layout, moved: bool, tile_width: int, encoded: bool) -> tuple[str, dict[str, float]]:
    """The kind of overhead, and the terms of one layer. encoded: its values are integers. Those of a gray picture are
    then shifted and scaled as one number, not by channel: a pass like any other."""
    shape, size = layout.shapes[layer.output], layout.padded(layer.output)
    read = sum(layout.padded(name) for name in layer.inputs)
    if layer.op in MAC_OPS:
        kind = _mac_class(layer, shape)
        least = DEEP if encoded and kind == "conv" else 0
        found = {kind: _padded_macs(layer, shape, tile_width, least) / 1e6, "feed": (read + size) / 1e3}
        if kind in LOADED:
            window, fan_in = math.prod(layer.attrs["kernel"]), layer.attrs["fan_in"]
            found["load"] = window * max(up(shape[1], TILE_DEPTH), least) * up(fan_in, TILE_DEPTH) / 1e3
        if layer.op == "matmul":
            matrices = math.prod(shape[:-2])
            found["batch_op"] = matrices * math.sqrt(layout.padded(layer.inputs[-1]) / matrices / OPERAND)
        return "mac_op", found
    if layer.op in ("transpose", "reshape"):
        return ("move_op", {"permute": size / 1e3}) if moved else ("", {})
    if layer.op in COPIES:
        return "move_op", {"copy": size / 1e3}
    term = CLASSES.get(layer.op, "curve")
    if layer.op in ("add", "sub", "mul") and len(shape) >= 4 and shape[1] <= 4 and layout.axis[layer.output] == 1:
        gray = encoded and shape[1] == 1 and len(layer.inputs) == 1
        return "vector_op", {"scale" if gray else "image": math.prod(shape) / 1e3}
    if len(layer.inputs) == 1 and (term == "add" or layer.op == "div"):
        term = "scale"
    amount = max(size, read) if term in ("pool", "sum") else size
    if layer.op in ("max_pool", "avg_pool"):
        kernel, stride = layer.attrs.get("kernel", (1, 1)), layer.attrs.get("stride", (1, 1))
        window = math.prod(kernel)
        amount = size * min(window, 25) / 4 + read / 2
        if layer.op == "avg_pool" and max(kernel) > max(stride) and max(kernel) != 3:
            term, amount = "window", size * window
    return "sum_op" if term == "sum" else "vector_op", {term: amount / 1e3}


def _mac_class(layer: Layer, shape: Shape) -> str:
    a = layer.attrs
    if layer.op == "matmul":
        return "attend"
    if layer.op == "linear":
        return "dense"
    if layer.op == "conv_transpose":
        return "transposed"
    if math.prod(shape[2:]) == 1:
        return "dense"
    if a["groups"] > 1:
        return "depthwise" if a["fan_in"] == 1 else "grouped"
    if len(shape) == 5 and a["kernel"][0] > 1:
        return "volume"
    if max(a["dilation"]) > 1:
        return "dilated"
    if a["fan_in"] <= 4:
        return "stem"
    return "point" if math.prod(a["kernel"]) == 1 else "conv"


def _padded_macs(layer: Layer, shape: Shape, tile_width: int, least: int) -> float:
    """Multiply-accumulates with channels padded to 32 (at least ``least`` made ones) and maps to whole tiles, 8 high
    (single rows and columns are not padded)."""
    a = layer.attrs
    if layer.op in ("matmul", "linear"):
        rows = float(math.prod(shape[:-1]))
        if layer.op == "matmul":
            rows = math.prod(shape[:-2]) * up(shape[-2], TILE_SIDE)
        elif len(shape) > 1 and shape[-2] > 1 and shape[-2] % 4:
            rows *= RAGGED
        return rows * up(shape[-1], TILE_DEPTH) * up(a["fan_in"], TILE_DEPTH)
    groups = a["groups"]
    window = math.prod(a["kernel"])
    if layer.op == "conv_transpose":
        return layer.macs / (shape[1] * a["fan_in"]) * up(shape[1], TILE_DEPTH) * up(a["fan_in"], TILE_DEPTH)
    sides = (*[TILE_SIDE] * (len(shape) - 3), tile_width)
    spatial = [up(n, side) if n > 1 else 1 for n, side in zip(shape[2:], sides, strict=True)]
    if len(shape) == 5:
        spatial[0] = shape[2]
    area = shape[0] * math.prod(spatial)
    if a["fan_in"] == 1 and groups > 1:
        # A vector unit: larger windows reuse what was loaded.
        return area * window * up(shape[1], TILE_DEPTH)
    if groups > 1:
        return area * window * up(shape[1], TILE_DEPTH) * up(a["fan_in"], TILE_DEPTH)
    if window == 1 and math.prod(shape[2:-1]) == 1 < shape[-1]:
        area *= ONE_ROW
    fan_in = up(a["fan_in"], 4) if a["fan_in"] <= 4 else up(a["fan_in"], TILE_DEPTH)
    return area * window * max(up(shape[1], TILE_DEPTH), least) * fan_in


#: Weights that are fetched ahead of the layers that need them, kB: time is counted in stretches of this much traffic.
AHEAD = 3000.0


def stretches(found: Sequence[Work]) -> list[Sequence[Work]]:
    """Runs of layers within which fetching and computing overlap."""
    out, start, traffic = [], 0, 0.0
    for i, work in enumerate(found, 1):
        traffic += work.amounts.get("weights", 0.0) + work.amounts.get("spill", 0.0)
        if traffic >= AHEAD or i == len(found):
            out.append(found[start:i])
            start, traffic = i, 0.0
    return out


def summed(works: Sequence[Work]) -> dict[str, float]:
    """Amounts of a stretch."""
    total: Counter[str] = Counter()
    for work in works:
        total.update(work.amounts)
    return dict(total)
