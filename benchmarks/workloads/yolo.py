"""The YOLO family, with boxes and scores decoded as it is exported."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.workloads import workload
from benchmarks.workloads.net import Net, Value

# ------------------------------------------------------------------------------------------------------- YOLO blocks


class Yolo:
    """The blocks of the Ultralytics family; every convolution is followed by ``act``."""

    def __init__(self, net: Net, act: str = "silu"):
        self.net, self.act = net, act

    def conv(self, x: Value, out: int, k: int = 1, s: int = 1, g: int = 1) -> Value:
        return self.net.conv(x, out, k, s, g=g, act=self.act)

    def bottleneck(self, x: Value, out: int, shortcut: bool, k: tuple[int, int] = (3, 3), e: float = 1.0) -> Value:
        y = self.conv(self.conv(x, int(out * e), k[0]), out, k[1])
        return self.net.add(x, y) if shortcut and x.channels == out else y

    def c3(self, x: Value, out: int, n: int, shortcut: bool = True, k: tuple[int, int] = (1, 3)) -> Value:
        half = out // 2
        y = self.conv(x, half)
        for _ in range(n):
            y = self.bottleneck(y, half, shortcut, k)
        return self.conv(self.net.concat([y, self.conv(x, half)]), out)

    def c2f(self, x: Value, out: int, n: int, shortcut: bool, inner: str = "bottleneck", e: float = 0.5) -> Value:
        """inner: bottleneck (YOLOv8), c3k (YOLO11, large blocks), half (YOLO11, small blocks), cib (YOLOv10),
        attention (YOLO26)."""
        half = int(out * e)
        parts = self.net.split(self.conv(x, 2 * half), 2)
        for _ in range(n):
            y = parts[-1]
            if inner == "c3k":
                parts.append(self.c3(y, half, 2, shortcut, (3, 3)))
            elif inner == "cib":
                parts.append(self.cib(y, half, shortcut))
            elif inner == "attention":
                parts.append(self.psa_block(self.bottleneck(y, half, shortcut, e=0.5)))
            else:
                parts.append(self.bottleneck(y, half, shortcut, e=0.5 if inner == "half" else 1.0))
        return self.conv(self.net.concat(parts), out)

    def cib(self, x: Value, out: int, shortcut: bool) -> Value:
        y = self.conv(self.conv(x, x.channels, 3, g=x.channels), 2 * out)
        y = self.net.act(self.net.add(self.net.dw(y, 7), self.net.dw(y, 3)), self.act)
        y = self.conv(self.conv(y, out), out, 3, g=out)
        return self.net.add(x, y) if shortcut else y

    def sppf(self, x: Value, out: int) -> Value:
        parts = [self.conv(x, x.channels // 2)]
        for _ in range(3):
            parts.append(self.net.pool(parts[-1], 5, 1, 2))
        return self.conv(self.net.concat(parts), out)

    def psa(self, x: Value) -> Value:
        """Half of the channels through position-sensitive attention (YOLOv10 and later)."""
        a, b = self.net.split(self.conv(x, x.channels), 2)
        return self.conv(self.net.concat([a, self.psa_block(b)]), x.channels)

    def psa_block(self, x: Value) -> Value:
        net, c = self.net, x.channels
        h, w = x.shape[2:]
        y = net.reshape(net.conv(x, c * 2), 1, c // 64, 128, h * w)
        q, k, v = net.slice(y, 0, 32, 2), net.slice(y, 32, 64, 2), net.slice(y, 64, 128, 2)
        scores = net.softmax(net.mul(net.matmul(net.transpose(q, 0, 1, 3, 2), k)))
        y = net.reshape(net.matmul(v, net.transpose(scores, 0, 1, 3, 2)), 1, c, h, w)
        y = net.add(y, net.dw(net.reshape(v, 1, c, h, w), 3))
        x = net.add(x, net.conv(y, c))
        return net.add(x, net.conv(self.conv(x, 2 * c), c))

    def boxes(self, raw: Sequence[Value], classes: Sequence[Value], bins: int = 16) -> list[Value]:
        """Distributions to distances to corners, class scores, the best class."""
        distances, scores = self.distances(raw, classes, bins)
        net = self.net
        low, high = net.split(distances, 2)
        a, b = net.binary("sub", low), net.add(high)
        box = net.mul(net.concat([net.mul(net.add(a, b)), net.binary("sub", b, a)]))
        return [corners(net, net.transpose(box, 0, 2, 1)), *best(net, net.transpose(scores, 0, 2, 1))]

    def distances(self, raw: Sequence[Value], classes: Sequence[Value], bins: int) -> tuple[Value, Value]:
        """Mean distances of each side [1, 4, N] and probabilities of the classes [1, classes, N]."""
        net = self.net
        joined = net.concat([net.reshape(x, 1, x.channels, -1) for x in raw], 2)
        scores = net.concat([net.reshape(x, 1, x.channels, -1) for x in classes], 2)
        count = joined.shape[2]
        if bins > 1:
            y = net.softmax(net.transpose(net.reshape(joined, 1, 4, bins, count), 0, 2, 1, 3), 1)
            joined = net.reshape(net.conv(y, 1, bias=False), 1, 4, count)
        return joined, net.act(scores, "sigmoid")

    def head(
        self, levels: Sequence[Value], kind: str, classes: int = 80, bins: int = 16, hidden: int = 0
    ) -> tuple[list[Value], list[Value]]:
        """Per level the box and the class branch. kind: "v8" or "v11" (depthwise class branch); hidden: width of the
        class branch, default that of the first level and of the classes."""
        net = self.net
        wide_box = max(16, levels[0].channels // 4, bins * 4)
        wide_cls = hidden or max(levels[0].channels, min(classes, 100))
        raw, scores = [], []
        for x in levels:
            raw.append(net.conv(self.conv(self.conv(x, wide_box, 3), wide_box, 3), 4 * bins))
            if kind == "v8":
                y = self.conv(self.conv(x, wide_cls, 3), wide_cls, 3)
            else:
                y = self.conv(self.conv(x, x.channels, 3, g=x.channels), wide_cls)
                y = self.conv(self.conv(y, wide_cls, 3, g=wide_cls), wide_cls)
            scores.append(net.conv(y, classes))
        return raw, scores

    def coefficients(self, levels: Sequence[Value], count: int, least: int = 0) -> Value:
        """An extra branch (masks, key points, angles) of every level, joined."""
        net, parts = self.net, []
        wide = max(levels[0].channels // 4, count, least)
        for x in levels:
            y = net.conv(self.conv(self.conv(x, wide, 3), wide, 3), count)
            parts.append(net.reshape(y, 1, count, -1))
        return net.concat(parts, 2)

    def points(self, x: Value) -> Value:
        """17 key points [1, N, 17, 3] with their visibility."""
        net = self.net
        x = net.reshape(x, 1, 17, 3, -1)
        at = net.mul(net.add(net.mul(net.slice(x, 0, 2, 2))))
        x = net.concat([at, net.act(net.slice(x, 2, 3, 2), "sigmoid")], 2)
        return net.reshape(net.transpose(net.reshape(x, 1, 51, -1), 0, 2, 1), 1, -1, 17, 3)

    def proto(self, x: Value, hidden: int, masks: int = 32) -> Value:
        y = self.net.deconv(self.conv(x, hidden, 3), hidden, 2, 2)
        return self.conv(self.conv(y, hidden, 3), masks)


def corners(net: Net, box: Value) -> Value:
    """[..., center and size] to [..., two corners]"""
    center, size = net.split(box, 2, -1)
    half = net.mul(size)
    return net.concat([net.binary("sub", center, half), net.add(center, half)], -1)


def best(net: Net, scores: Value) -> list[Value]:
    """The highest of the scores [1, N, classes] and its class. A single class is padded to two."""
    scores = net.pad(scores, 1) if scores.shape[-1] == 1 else scores
    return [net.reshape(net.reduce(scores, -1, op), 1, -1) for op in ("reduce_max", "argmax")]


def scored(net: Net, found: Value) -> list[Value]:
    """[1, N, center, size, certainty of an object and of every class] to corners, the best class and its score."""
    certain, scores = net.slice(found, 4, 5, -1), net.slice(found, 5, found.shape[-1], -1)
    return [corners(net, net.slice(found, 0, 4, -1)), *best(net, net.mul(scores, certain))]


def backbone(y: Yolo, x: Value, w: float, d: float, top: int) -> list[Value]:
    """YOLOv8's P3, P4, P5. w, d: factors of widths and depths; top: the most channels before the factor."""
    out = []
    x = y.conv(x, int(64 * w), 3, 2)
    for width, depth in ((128, 3), (256, 6), (512, 6), (1024, 3)):
        c = int(min(width, top) * w)
        x = y.c2f(y.conv(x, c, 3, 2), c, max(round(depth * d), 1), True)
        out.append(x)
    return [*out[1:3], y.sppf(out[3], out[3].channels)]


def yolov8(y: Yolo, w: float, d: float, top: int = 1024) -> list[Value]:
    """Backbone and neck: P3, P4, P5."""
    net, n = y.net, max(round(3 * d), 1)
    p3, p4, p5 = backbone(y, net.input(1, 3, 640, 640), w, d, top)
    m4 = y.c2f(net.concat([net.up(p5), p4]), p4.channels, n, False)
    o3 = y.c2f(net.concat([net.up(m4), p3]), p3.channels, n, False)
    o4 = y.c2f(net.concat([y.conv(o3, p3.channels, 3, 2), m4]), p4.channels, n, False)
    o5 = y.c2f(net.concat([y.conv(o4, p4.channels, 3, 2), p5]), p5.channels, n, False)
    return [o3, o4, o5]


@workload("yolov8_det", "YOLOv8-Detection", "yolov8")
def _(net: Net) -> list[Value]:
    y = Yolo(net)
    levels = yolov8(y, 0.25, 1 / 3)
    return y.boxes(*y.head(levels, "v8"))


@workload("lpdm", "License-Plates-Detector-Model", "yolov8")
def _(net: Net) -> list[Value]:
    y = Yolo(net)
    levels = yolov8(y, 0.25, 1 / 3)
    return y.boxes(*y.head(levels, "v8", 51))


@workload("yolov8_obb", "YOLOv8-OBB", "yolov8")
def _(net: Net) -> list[Value]:
    y = Yolo(net)
    levels = yolov8(y, 0.25, 1 / 3)
    angle = net.mul(net.add(net.act(y.coefficients(levels, 1, 16), "sigmoid")))
    distances, scores = y.distances(*y.head(levels, "v8", 15), 16)
    low, high = net.split(distances, 2)
    across, down = net.split(net.mul(net.binary("sub", high, low)), 2)
    cos, sin = net.act(angle, "cos"), net.act(angle, "sin")
    turned = [
        net.binary("sub", net.mul(across, cos), net.mul(down, sin)),
        net.add(net.mul(across, sin), net.mul(down, cos)),
    ]
    box = net.mul(net.concat([net.add(net.concat(turned)), net.add(low, high)]))
    outputs = [net.transpose(box, 0, 2, 1), *best(net, net.transpose(scores, 0, 2, 1))]
    return [*outputs, net.transpose(angle, 0, 2, 1)]


def fastsam(net: Net, w: float, d: float, top: int) -> list[Value]:
    y = Yolo(net)
    levels = yolov8(y, w, d, top)
    masks = net.transpose(y.coefficients(levels, 32), 0, 2, 1)
    out = y.boxes(*y.head(levels, "v8", 1))
    return [*out, masks, y.proto(levels[0], int(256 * w))]


@workload("fastsam_s", "FastSam-S", "yolov8")
def _(net: Net) -> list[Value]:
    return fastsam(net, 0.5, 1 / 3, 1024)


@workload("fastsam_x", "FastSam-X", "yolov8")
def _(net: Net) -> list[Value]:
    return fastsam(net, 1.25, 1.0, 512)


@workload("yoloe_seg", "YOLOE-Segmentation", "yolov8")
def _(net: Net) -> list[Value]:
    """YOLOE-v8-L: embeddings of 512 numbers against those of 80 names, which are constants."""
    y = Yolo(net)
    levels = yolov8(y, 1.0, 1.0, 512)
    masks = net.transpose(y.coefficients(levels, 32), 0, 2, 1)
    raw, scores = y.head(levels, "v8", 512, hidden=256)
    likeness = []
    for x in scores:
        z = net.linear(net.transpose(x, 0, 2, 3, 1), 80, bias=False)
        likeness.append(net.add(net.mul(net.transpose(z, 0, 3, 1, 2))))
    return [*y.boxes(raw, likeness), masks, y.proto(levels[0], 256)]


@workload("yolo_world", "detector", "yolov8")
def _(net: Net) -> list[Value]:
    """YOLOv8s-World-v2: the image attends to the names' embeddings in the neck. Products with embeddings are
    multiplications that broadcast, and sums: the exporter avoids a matrix product."""
    y = Yolo(net)
    image, text = net.input(1, 3, 640, 640), net.input(1, 80, 512)

    def attend(x: Value, heads: int) -> Value:
        _, c, h, w = x.shape
        each = c // heads
        guide = net.transpose(net.reshape(net.linear(text, c), 1, 80, heads, each), 0, 2, 3, 1)
        z = net.transpose(net.reshape(x, 1, heads, each, h * w), 0, 1, 3, 2)
        z = net.reshape(z, 1, heads, h * w, each, 1)
        guide = net.reshape(guide, 1, heads, 1, each, 80)
        z = net.reduce(net.emit("mul", [z, guide], (1, heads, h * w, each, 80)), 3, "reduce_sum")
        best = net.reduce(net.reshape(z, 1, heads, h * w, 80), 3, "reduce_max")
        gate = net.act(net.add(net.mul(best)), "sigmoid")
        z = net.reshape(net.conv(x, c, 3), 1, heads, each, h * w)
        return net.reshape(net.mul(z, net.reshape(gate, 1, heads, 1, h * w)), 1, c, h, w)

    def likeness(x: Value) -> Value:
        _, width, h, w = x.shape
        names = net.reshape(net.transpose(net.norm(text, "l2_norm"), 0, 2, 1), 1, 1, 1, width, 80)
        x = net.reshape(net.transpose(x, 0, 2, 3, 1), 1, h, w, width, 1)
        z = net.reduce(net.emit("mul", [x, names], (1, h, w, width, 80)), 3, "reduce_sum")
        return net.add(net.mul(net.transpose(net.reshape(z, 1, h, w, 80), 0, 3, 1, 2)))

    def attentive(x: Value, out: int, heads: int) -> Value:
        parts = net.split(y.conv(x, out), 2)
        parts.append(y.bottleneck(parts[-1], out // 2, False))
        parts.append(attend(parts[-1], heads))
        return y.conv(net.concat(parts), out)

    p3, p4, p5 = backbone(y, image, 0.5, 1 / 3, 1024)
    m4 = attentive(net.concat([net.up(p5), p4]), 256, 4)
    o3 = attentive(net.concat([net.up(m4), p3]), 128, 2)
    o4 = attentive(net.concat([y.conv(o3, 128, 3, 2), m4]), 256, 4)
    o5 = attentive(net.concat([y.conv(o4, 256, 3, 2), p5]), 512, 8)
    raw, scores = y.head([o3, o4, o5], "v8", 512, hidden=128)
    return y.boxes(raw, [likeness(x) for x in scores])


def yolo11(y: Yolo, w: float = 0.25, yolo26: bool = False) -> list[Value]:
    """yolo26: a shortcut around the pooling, larger blocks in the neck, attention in the last."""
    net = y.net

    def c(n: int) -> int:
        return int(n * w)

    x = y.conv(net.input(1, 3, 640, 640), c(64), 3, 2)
    x = y.c2f(y.conv(x, c(128), 3, 2), c(256), 1, True, "half", 0.25)
    p3 = y.c2f(y.conv(x, c(256), 3, 2), c(512), 1, True, "half", 0.25)
    p4 = y.c2f(y.conv(p3, c(512), 3, 2), c(512), 1, True, "c3k")
    p5 = y.c2f(y.conv(p4, c(1024), 3, 2), c(1024), 1, True, "c3k")
    pooled = y.sppf(p5, c(1024))
    p5 = y.psa(net.add(pooled, p5) if yolo26 else pooled)
    inner = "c3k" if yolo26 else "half"
    m4 = y.c2f(net.concat([net.up(p5), p4]), c(512), 1, True, inner)
    o3 = y.c2f(net.concat([net.up(m4), p3]), c(256), 1, True, inner)
    o4 = y.c2f(net.concat([y.conv(o3, c(256), 3, 2), m4]), c(512), 1, True, inner)
    inner = "attention" if yolo26 else "c3k"
    o5 = y.c2f(net.concat([y.conv(o4, c(512), 3, 2), p5]), c(1024), 1, True, inner)
    return [o3, o4, o5]


@workload("yolov11_seg", "YOLOv11-Segmentation", "yolo11")
def _(net: Net) -> list[Value]:
    y = Yolo(net)
    levels = yolo11(y)
    masks = net.transpose(y.coefficients(levels, 32), 0, 2, 1)
    return [*y.boxes(*y.head(levels, "v11")), masks, y.proto(levels[0], 64)]


@workload("yolov11_pose", "YOLOv11-Pose", "yolo11")
def _(net: Net) -> list[Value]:
    y = Yolo(net)
    levels = yolo11(y)
    return [*y.boxes(*y.head(levels, "v11", 1)), y.points(y.coefficients(levels, 51))]


@workload("yolo26_det", "YOLO26-Detection", "yolo11")
def _(net: Net) -> list[Value]:
    y = Yolo(net)
    levels = yolo11(y, yolo26=True)
    return y.boxes(*y.head(levels, "v11", bins=1), 1)


@workload("yolo26_seg", "YOLO26-Segmentation", "yolo11")
def _(net: Net) -> list[Value]:
    """The prototypes of the masks read all three levels."""
    y = Yolo(net)
    levels = yolo11(y, yolo26=True)
    x = levels[0]
    for i, level in enumerate(levels[1:], 1):
        x = net.add(x, net.up(y.conv(level, x.channels), 2**i))
    masks = net.transpose(y.coefficients(levels, 32), 0, 2, 1)
    return [*y.boxes(*y.head(levels, "v11", bins=1), 1), masks, y.proto(y.conv(x, 64, 3), 64)]


@workload("yolo26_pose", "YOLO26-Pose", "yolo11")
def _(net: Net) -> list[Value]:
    y = Yolo(net)
    levels = yolo11(y, yolo26=True)
    return [*y.boxes(*y.head(levels, "v11", 1, 1), 1), y.points(y.coefficients(levels, 51, 85))]


@workload("yolov10_det", "YOLOv10-Detection", "yolov10")
def _(net: Net) -> list[Value]:
    y = Yolo(net)

    def down(x: Value, out: int) -> Value:
        x = y.conv(x, out)
        return net.conv(x, out, 3, 2, g=out)

    x = y.conv(net.input(1, 3, 640, 640), 16, 3, 2)
    x = y.c2f(y.conv(x, 32, 3, 2), 32, 1, True)
    p3 = y.c2f(y.conv(x, 64, 3, 2), 64, 2, True)
    p4 = y.c2f(down(p3, 128), 128, 2, True)
    p5 = y.psa(y.sppf(y.c2f(down(p4, 256), 256, 1, True), 256))
    m4 = y.c2f(net.concat([net.up(p5), p4]), 128, 1, False)
    o3 = y.c2f(net.concat([net.up(m4), p3]), 64, 1, False)
    o4 = y.c2f(net.concat([y.conv(o3, 64, 3, 2), m4]), 128, 1, False)
    o5 = y.c2f(net.concat([down(o4, 128), p5]), 256, 1, True, "cib")
    levels = [o3, o4, o5]
    return y.boxes(*y.head(levels, "v11"))


@workload("yolov9_det", "YOLOv9-Detection", "yolov9")
def _(net: Net) -> list[Value]:
    """YOLOv9-t as it was trained: its repeated convolutions are a 3 x 3 and a 1 x 1 side by side."""
    y = Yolo(net)

    def csp(x: Value, out: int) -> Value:
        half = out // 2
        z = y.conv(x, half)
        for _ in range(3):
            both = net.act(net.add(net.conv(z, half, 3), net.conv(z, half)), "silu")
            z = net.add(z, y.conv(both, half, 3))
        return y.conv(net.concat([z, y.conv(x, half)]), out)

    def elan(x: Value, out: int, middle: int) -> Value:
        parts = net.split(y.conv(x, middle), 2)
        for _ in range(2):
            parts.append(y.conv(csp(parts[-1], middle // 2), middle // 2, 3))
        return y.conv(net.concat(parts), out)

    def down(x: Value, out: int) -> Value:
        return y.conv(net.pool(x, 2, 1, 0, "avg_pool"), out, 3, 2)

    x = y.conv(y.conv(net.input(1, 3, 640, 640), 16, 3, 2), 32, 3, 2)
    parts = net.split(y.conv(x, 32), 2)
    for _ in range(2):
        parts.append(y.conv(parts[-1], 16, 3))
    x = y.conv(net.concat(parts), 32)
    p3 = elan(down(x, 64), 64, 64)
    p4 = elan(down(p3, 96), 96, 96)
    x = y.conv(elan(down(p4, 128), 128, 128), 64)
    pooled = [x]
    for _ in range(3):
        pooled.append(net.pool(pooled[-1], 5, 1, 2))
    p5 = y.conv(net.concat(pooled), 128)
    m4 = elan(net.concat([net.up(p5), p4]), 96, 96)
    o3 = elan(net.concat([net.up(m4), p3]), 64, 64)
    o4 = elan(net.concat([down(o3, 48), m4]), 96, 96)
    o5 = elan(net.concat([down(o4, 64), p5]), 128, 128)
    levels = [o3, o4, o5]
    return y.boxes(*y.head(levels, "v8"))


@workload("yolov5", "Yolo-v5", "yolov5")
def _(net: Net) -> list[Value]:
    """YOLOv5-m with an Ultralytics detection head."""
    y = Yolo(net)
    x = net.conv(net.input(1, 3, 640, 640), 48, 6, 2, 2, act="silu")
    x = y.c3(y.conv(x, 96, 3, 2), 96, 2)
    p3 = y.c3(y.conv(x, 192, 3, 2), 192, 4)
    p4 = y.c3(y.conv(p3, 384, 3, 2), 384, 6)
    p5 = y.sppf(y.c3(y.conv(p4, 768, 3, 2), 768, 2), 768)
    m5 = y.conv(p5, 384)
    m4 = y.conv(y.c3(net.concat([net.up(m5), p4]), 384, 2, False), 192)
    o3 = y.c3(net.concat([net.up(m4), p3]), 192, 2, False)
    o4 = y.c3(net.concat([y.conv(o3, 192, 3, 2), m4]), 384, 2, False)
    o5 = y.c3(net.concat([y.conv(o4, 384, 3, 2), m5]), 768, 2, False)
    return y.boxes(*y.head([o3, o4, o5], "v8"))


def cells(net: Net, x: Value) -> Value:
    """What three anchors predict per cell: [1, 3, h, w, numbers]"""
    _, c, h, w = x.shape
    return net.transpose(net.reshape(x, 1, 3, c // 3, h, w), 0, 1, 3, 4, 2)


def squared(net: Net, xy: Value, wh: Value) -> list[Value]:
    """Center and size from their sigmoids: twice the one, the square of twice the other."""
    double = net.mul(wh)
    return [net.mul(net.add(net.mul(xy))), net.mul(net.mul(double, double))]


@workload("yolov5_face", "YoloV5-Face", "yolov5")
def _(net: Net) -> list[Value]:
    """YOLOv5n-face: a backbone of ShuffleNet-v2 blocks; five landmarks per face."""
    y = Yolo(net)

    def shuffle(x: Value, out: int, s: int) -> Value:
        half = out // 2
        a, b = (x, x) if s > 1 else net.split(x, 2)
        a = y.conv(net.dw(a, 3, s), half) if s > 1 else a
        b = y.conv(net.dw(y.conv(b, half), 3, s), half)
        joined = net.concat([a, b])
        _, c, h, w = joined.shape
        z = net.transpose(net.reshape(joined, 1, 2, half, h, w), 0, 2, 1, 3, 4)
        return net.reshape(z, 1, c, h, w)

    x = y.conv(net.input(1, 3, 640, 640), 32, 3, 2)
    x = y.conv(net.concat([y.conv(y.conv(x, 16), 32, 3, 2), net.pool(x, 2, 2)]), 32)
    maps = []
    for out, depth in ((128, 3), (256, 7), (512, 3)):
        x = shuffle(x, out, 2)
        for _ in range(depth):
            x = shuffle(x, out, 1)
        maps.append(x)
    m5 = y.conv(maps[2], 128)
    m4 = y.conv(y.c3(net.concat([net.up(m5), maps[1]]), 128, 1, False), 128)
    o3 = y.c3(net.concat([net.up(m4), maps[0]]), 128, 1, False)
    o4 = y.c3(net.concat([y.conv(o3, 128, 3, 2), m4]), 128, 1, False)
    o5 = y.c3(net.concat([y.conv(o4, 128, 3, 2), m5]), 128, 1, False)
    found = []
    for x in (o3, o4, o5):
        z = cells(net, net.conv(x, 48))
        box, marks, face = net.slice(z, 0, 5, -1), net.slice(z, 5, 15, -1), net.slice(z, 15, 16, -1)
        z = net.concat([marks, net.act(face, "sigmoid")], -1)
        z = net.concat([net.act(box, "sigmoid"), z], -1)
        parts = squared(net, net.slice(z, 0, 2, -1), net.slice(z, 2, 4, -1))
        parts.append(net.slice(z, 4, 5, -1))
        parts += [net.add(net.mul(net.slice(z, k, k + 2, -1))) for k in range(5, 15, 2)]
        parts.append(net.slice(z, 15, 16, -1))
        found.append(net.reshape(net.concat(parts, -1), 1, -1, 16))
    z = net.concat(found, 1)
    certain, face = net.slice(z, 4, 5, -1), net.slice(z, 15, 16, -1)
    return [net.slice(z, 0, 4, -1), net.mul(certain, face), net.slice(z, 5, 15, -1)]


@workload("yolor", "Yolo-R", "yolor")
def _(net: Net) -> list[Value]:
    """YOLOR-P6."""
    y = Yolo(net)

    def residuals(x: Value, c: int, n: int) -> Value:
        for _ in range(n):
            x = net.add(x, y.conv(y.conv(x, c), c, 3))
        return x

    def stage(x: Value, out: int, half: int, n: int) -> Value:
        x = y.conv(x, out, 3, 2)
        aside = y.conv(x, half)
        return y.conv(net.concat([residuals(y.conv(x, half), half, n), aside]), out)

    def join(parts: Sequence[Value], c: int) -> Value:
        x = y.conv(net.concat(parts), c)
        aside = y.conv(x, c)
        for _ in range(3):
            x = y.conv(y.conv(x, c), c, 3)
        return y.conv(net.concat([x, aside]), c)

    x = y.conv(net.shuffle(net.input(1, 3, 640, 640), -2), 64, 3)
    maps = []
    for out, half, n in ((128, 64, 3), (256, 128, 7), (384, 192, 7), (512, 256, 3), (640, 320, 3)):
        x = stage(x, out, half, n)
        maps.append(x)
    aside = y.conv(x, 320)
    x = y.conv(y.conv(y.conv(x, 320), 320, 3), 320)
    pooled = [net.pool(x, k, 1, k // 2) for k in (13, 9, 5)]
    x = y.conv(y.conv(net.concat([*pooled, x]), 320), 320, 3)
    tops = [y.conv(net.concat([x, aside]), 320)]
    for c, skip in zip((256, 192, 128), maps[3:0:-1], strict=True):
        raised = net.up(y.conv(tops[-1], c))
        tops.append(join([y.conv(skip, c), raised], c))
    levels = [tops.pop()]
    for c in (192, 256, 320):
        levels.append(join([y.conv(levels[-1], c, 3, 2), tops.pop()], c))
    found = []
    for x, width in zip(levels, (256, 384, 512, 640), strict=True):
        z = net.mul(net.conv(net.add(y.conv(x, width, 3)), 255))
        z = net.act(net.reshape(cells(net, z), -1, 85), "sigmoid")
        box = squared(net, net.slice(z, 0, 2, -1), net.slice(z, 2, 4, -1))
        found.append(net.reshape(net.concat([*box, net.slice(z, 4, 85, -1)], -1), 1, -1, 85))
    return scored(net, net.concat(found, 1))


@workload("yolov3", "Yolo-v3", "yolov3")
def _(net: Net) -> list[Value]:
    """YOLOv3-tiny with an Ultralytics detection head."""
    y = Yolo(net)
    x = y.conv(net.input(1, 3, 640, 640), 16, 3)
    for out in (32, 64, 128, 256):
        x = y.conv(net.pool(x, 2, 2), out, 3)
    p4 = x
    x = y.conv(net.pool(x, 2, 2), 512, 3)
    x = net.pool(net.pad(x, 1, 1), 2, 1)
    x = y.conv(y.conv(x, 1024, 3), 256)
    o5 = y.conv(x, 512, 3)
    o4 = y.conv(net.concat([net.up(y.conv(x, 128)), p4]), 256, 3)
    levels = [o4, o5]
    return y.boxes(*y.head(levels, "v8"))


@workload("deepbox", "yolo_2d_detection", "yolov3")
def _(net: Net) -> list[Value]:
    """YOLOv3 with an Ultralytics detection head."""
    y = Yolo(net)
    x, skips = y.conv(net.input(1, 3, 416, 416), 32, 3), []
    for out, depth in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        x = y.conv(x, out, 3, 2)
        for _ in range(depth):
            x = y.bottleneck(x, out, True, e=0.5)
        skips.append(x)
    x = y.conv(y.bottleneck(x, 1024, False, e=0.5), 512)
    x = y.conv(y.conv(x, 1024, 3), 512)
    o5 = y.conv(x, 1024, 3)
    x = net.concat([net.up(y.conv(x, 256)), skips[3]])
    x = y.conv(y.bottleneck(y.bottleneck(x, 512, False, e=0.5), 512, False, e=0.5), 256)
    o4 = y.conv(x, 512, 3)
    o3 = net.concat([net.up(y.conv(x, 128)), skips[2]])
    for _ in range(3):
        o3 = y.bottleneck(o3, 256, False, e=0.5)
    levels = [o3, o4, o5]
    return y.boxes(*y.head(levels, "v8"))


@workload("yolov4", "Yolo-v4", "yolov4")
def _(net: Net) -> list[Value]:
    """YOLOv4-tiny, whose two levels are decoded as published: sigmoid and exponential, not the square of Yolo v5."""
    y = Yolo(net, "leaky_relu")
    x = y.conv(y.conv(net.input(1, 3, 416, 416), 32, 3, 2), 64, 3, 2)
    for out in (64, 128, 256):
        whole = y.conv(x, out, 3)
        first = y.conv(net.split(whole, 2)[1], out // 2, 3)
        p4 = y.conv(net.concat([y.conv(first, out // 2, 3), first]), out)
        x = net.pool(net.concat([whole, p4]), 2, 2)
    x = y.conv(y.conv(x, 512, 3), 256)
    raw = [net.conv(y.conv(x, 512, 3), 255)]
    raw.append(net.conv(y.conv(net.concat([net.up(y.conv(x, 128)), p4]), 256, 3), 255))
    parts: list[list[Value]] = [[], [], []]
    for x in raw:
        z = cells(net, x)
        parts[0].append(net.mul(net.add(net.act(net.slice(z, 0, 2, -1), "sigmoid"))))
        parts[1].append(net.mul(net.act(net.slice(z, 2, 4, -1), "exp")))
        parts[2].append(net.concat([net.act(net.slice(z, a, b, -1), "sigmoid") for a, b in ((4, 5), (5, 85))], -1))
    xy, wh, scores = (net.concat([net.reshape(x, 1, -1, x.shape[-1]) for x in part], 1) for part in parts)
    half = net.mul(wh)
    box = net.concat([net.binary("sub", xy, half), net.add(xy, half)], -1)
    certain, scores = net.slice(scores, 0, 1, -1), net.slice(scores, 1, 81, -1)
    score, index = best(net, scores)
    return [box, net.mul(score, net.reshape(certain, 1, -1)), index]


@workload("yolov6", "Yolo-v6", "yolov6")
def _(net: Net) -> list[Value]:
    y = Yolo(net, "relu")

    def rep(x: Value, out: int, n: int = 1, s: int = 1) -> Value:
        """RepVGG blocks as they are trained: 3 x 3, 1 x 1 and identity, each with a batch norm."""
        for _ in range(n):
            total = net.add(net.conv(x, out, 3, s), net.conv(x, out, 1, s))
            total = net.add(total, net.batch_norm(x)) if s == 1 and x.channels == out else total
            x = net.act(total, "relu")
        return x

    def fuse(x: Value, same: Value, high: Value, out: int) -> Value:
        parts = [net.deconv(x, x.channels, 2, 2), y.conv(same, out), y.conv(y.conv(high, out), out, 3, 2)]
        return y.conv(net.concat(parts), out)

    x = rep(net.input(1, 3, 640, 640), 16, s=2)
    p2 = rep(rep(x, 32, s=2), 32, 2)
    p3 = rep(rep(p2, 64, s=2), 64, 4)
    p4 = rep(rep(p3, 128, s=2), 128, 6)
    x = rep(rep(p4, 256, s=2), 256, 2)
    half = [y.conv(x, 128), y.conv(x, 128)]
    parts = [y.conv(y.conv(half[0], 128, 3), 128)]
    for _ in range(3):
        parts.append(net.pool(parts[-1], 5, 1, 2))
    x = y.conv(y.conv(net.concat(parts), 128), 128, 3)
    p5 = y.conv(net.concat([half[1], x]), 256)
    f5 = y.conv(p5, 64)
    m4 = rep(fuse(f5, p4, p3, 64), 64, 4)
    f4 = y.conv(m4, 32)
    o3 = rep(fuse(f4, p3, p2, 32), 32, 4)
    o4 = rep(net.concat([y.conv(o3, 32, 3, 2), f4]), 64, 4)
    o5 = rep(net.concat([y.conv(o4, 64, 3, 2), f5]), 128, 4)
    raw, scores = [], []
    for o in (o3, o4, o5):
        x = net.conv(o, o.channels, act="silu")
        scores.append(net.reshape(net.act(net.conv(net.conv(x, o.channels, 3, act="silu"), 80), "sigmoid"), 1, 80, -1))
        raw.append(net.reshape(net.conv(net.conv(x, o.channels, 3, act="silu"), 4), 1, 4, -1))
    low, high = net.split(net.transpose(net.concat(raw, 2), 0, 2, 1), 2, -1)
    a, b = net.binary("sub", low), net.add(high)
    box = net.mul(net.concat([net.mul(net.add(a, b)), net.binary("sub", b, a)], -1))
    found = net.concat([net.pad(box, 1), net.transpose(net.concat(scores, 2), 0, 2, 1)], -1)
    return scored(net, found)
