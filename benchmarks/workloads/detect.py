"""Detectors of two stages, SSD and pose."""

from __future__ import annotations

from benchmarks.workloads import workload
from benchmarks.workloads.classify import bottleneck, inverted, resnet50, stem
from benchmarks.workloads.net import Net, Value
from benchmarks.workloads.yolo import Yolo

# ------------------------------------------------------------------------------------------------------- two stages


@workload("detectron2_detection", "proposal_generator", "rcnn")
def _(net: Net) -> list[Value]:
    image = net.input(1, 3, 800, 800)
    x = stem(net, net.mul(net.binary("sub", net.flip(image, 1))))
    for i, depth in enumerate((3, 4, 6)):
        for j in range(depth):
            x = bottleneck(net, x, 256 * 2**i, 2 if i and j == 0 else 1, 64 * 2**i)
    y = net.conv(x, 1024, 3, act="relu")
    scores, deltas = net.conv(y, 15), net.conv(y, 60)
    boxes = placed(net, net.reshape(net.transpose(deltas, 0, 2, 3, 1), -1, 4))
    return [x, boxes, net.reshape(net.transpose(scores, 0, 2, 3, 1), 1, -1)]


def placed(net: Net, deltas: Value) -> Value:
    """Offsets of every anchor [N, 4] to its corners, one coordinate at a time."""
    x, y, w, h = (net.slice(deltas, i, i + 1) for i in range(4))
    centers = [net.add(net.mul(part)) for part in (x, y)]
    halves = [net.mul(net.mul(net.act(net.act(part, "clip"), "exp"))) for part in (w, h)]
    low = [net.binary("sub", center, half) for center, half in zip(centers, halves, strict=True)]
    high = [net.add(center, half) for center, half in zip(centers, halves, strict=True)]
    return net.concat([*low, *high], 1)


@workload("detectron2_detection", "roi_head", "rcnn")
def _(net: Net) -> list[Value]:
    features, boxes = net.input(1, 1024, 50, 50), net.input(1, 200, 4)
    x = net.emit("roi_align", [features, boxes], (200, 1024, 14, 14))
    for j in range(3):
        x = bottleneck(net, x, 2048, 2 if j == 0 else 1, 512)
    x = net.reshape(net.gap(x), 200, 2048)
    return [net.softmax(net.linear(x, 81)), net.linear(x, 320)]


@workload("maskrcnn", "proposal_generator", "rcnn")
def _(net: Net) -> list[Value]:
    """Torchvision's second version (its RPN has two convolutions per level), with every anchor's box decoded."""
    laterals = [net.conv(x, 256) for x in resnet50(net, net.picture(1, 3, 800, 800))]
    x = laterals[3]
    levels = [net.conv(x, 256, 3)]
    for lateral in laterals[2::-1]:
        x = net.add(lateral, net.resize(x, lateral.shape[2:], "nearest"))
        levels.append(net.conv(x, 256, 3))
    levels = [*levels[::-1], net.pool(levels[0], 1, 2)]
    scores, deltas = [], []
    for x in levels:
        y = net.conv(net.conv(x, 256, 3, act="relu"), 256, 3, act="relu")
        scores.append(net.reshape(net.transpose(net.conv(y, 3), 0, 2, 3, 1), 1, -1, 1))
        deltas.append(net.reshape(net.transpose(net.conv(y, 12), 0, 2, 3, 1), 1, -1, 4))
    boxes = placed(net, net.reshape(net.concat(deltas, 1), -1, 4))
    return [*levels[:4], net.concat(scores, 1), boxes]


# -------------------------------------------------------------------------------------------------------------- pose


@workload("hrnet_face", "HRNetFace", "hrnet")
def _(net: Net) -> Value:
    def basic(x: Value) -> Value:
        return net.add(net.conv(net.conv(x, x.channels, 3, act="relu"), x.channels, 3), x, "relu")

    def fuse(maps: list[Value]) -> list[Value]:
        out = []
        for i, here in enumerate(maps):
            total = None
            for j, x in enumerate(maps):
                if j > i:
                    y = net.resize(net.conv(x, here.channels), here.shape[2:], "bilinear")
                elif j < i:
                    y = x
                    for k in range(i - j):
                        last = k == i - j - 1
                        y = net.conv(y, here.channels if last else x.channels, 3, 2, act=None if last else "relu")
                else:
                    y = x
                total = y if total is None else net.add(total, y)
            out.append(net.act(total, "relu"))
        return out

    x = net.conv(net.conv(net.picture(1, 3, 256, 256), 64, 3, 2, act="relu"), 64, 3, 2, act="relu")
    for _ in range(4):
        x = bottleneck(net, x, 256, 1, 64)
    maps = [net.conv(x, 18, 3, act="relu"), net.conv(x, 36, 3, 2, act="relu")]
    for stage, modules in enumerate((1, 4, 3)):
        if stage:
            maps.append(net.conv(maps[-1], maps[-1].channels * 2, 3, 2, act="relu"))
        for _ in range(modules):
            for i in range(len(maps)):
                for _ in range(4):
                    maps[i] = basic(maps[i])
            maps = fuse(maps)
    size = maps[0].shape[2:]
    x = net.concat([maps[0], *(net.resize(x, size) for x in maps[1:])])
    return net.conv(net.conv(x, 270, act="relu"), 29)


@workload("rtmpose_body2d", "RTMPose-Body2d", "rtmpose")
def _(net: Net) -> list[Value]:
    """RTMPose-m for whole bodies: 133 key points."""
    y = Yolo(net)

    def csp(x: Value, out: int, n: int, shortcut: bool) -> Value:
        half = out // 2
        z = y.conv(x, half)
        for _ in range(n):
            z1 = y.conv(y.conv(z, half, 3), half, 5, g=half)
            z1 = y.conv(z1, half)
            z = net.add(z, z1) if shortcut else z1
        z = net.concat([z, y.conv(x, half)])
        z = net.mul(z, net.act(net.conv(net.gap(z), out), "hardsigmoid"))
        return y.conv(z, out)

    x = y.conv(y.conv(y.conv(net.picture(1, 3, 256, 192), 24, 3, 2), 24, 3), 48, 3)
    for i, (out, n) in enumerate(((96, 2), (192, 4), (384, 4), (768, 2))):
        x = y.conv(x, out, 3, 2)
        x = y.sppf(x, out) if i == 3 else x
        x = csp(x, out, n, i < 3)
    x = net.reshape(net.conv(x, 133, 7), 1, 133, 48)
    x = net.linear(net.norm(x, "rms_norm"), 256)
    z = net.norm(x, "rms_norm")
    u, v, b = (net.linear(z, n, "silu") for n in (512, 512, 128))
    q, k = net.add(net.mul(b)), net.add(net.mul(b))
    a = net.act(net.mul(net.matmul(q, net.transpose(k, 0, 2, 1))), "relu")
    z = net.mul(u, net.matmul(net.mul(a, a), v))
    x = net.add(net.linear(z, 256), x)
    return [net.linear(x, 384), net.linear(x, 512)]


@workload("movenet", "Movenet", "mobilenet")
def _(net: Net) -> list[Value]:
    x = net.conv(net.picture(1, 3, 192, 192), 32, 3, 2, act="relu6")
    kept = []
    for t, c, n, s in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for j in range(n):
            x = inverted(net, x, c, 3, s if j == 0 else 1, x.channels * t, "relu6")
        if c in (24, 32, 96):
            kept.append(x)
    x = net.conv(net.conv(x, 1280, act="relu6"), 64)
    for skip, out in zip(kept[::-1], (64, 32, 24), strict=True):
        x = net.add(net.up(x, 2, "bilinear"), net.conv(skip, x.channels))
        x = net.conv(net.dw(x, 3), out, act="relu")
    heads = []
    for out in (1, 17, 34, 34):
        heads.append(net.conv(net.conv(net.dw(x, 3), 96, act="relu"), out))
    maps = [net.transpose(net.reshape(head, *head.shape[1:]), 1, 2, 0) for head in heads]
    confidence, regression, offsets = net.act(maps[1], "sigmoid"), maps[2], maps[3]
    center = net.reshape(net.mul(net.act(maps[0], "sigmoid")), 1, -1, 1)

    def place(scores: Value) -> list[Value]:
        """Row and column of the best score."""
        index = net.reduce(scores, 1, "argmax")
        row = net.act(net.binary("div", index), "floor")
        return [net.reshape(x, -1) for x in (row, net.binary("sub", index, net.mul(row)))]

    def at(x: Value, where: list[Value], *shape: int) -> Value:
        index = net.concat([net.reshape(part, -1, 1) for part in where], 1)
        return net.emit("gather", [x, index], shape)

    where = place(center)
    picked = net.reshape(at(regression, where, 1, 34), 17, 2)
    squares = []
    for i in range(2):
        guess = net.reshape(net.add(net.reshape(net.slice(picked, i, i + 1), 17), where[i]), 1, 1, 17)
        away = net.emit("sub", [guess], (48, 48, 17))
        squares.append(net.mul(away, away))
    distance = net.add(net.act(net.add(*squares), "sqrt"))
    where = place(net.reshape(net.binary("div", confidence, distance), 1, 2304, 17))
    place_of = net.concat([net.reshape(part, 17, 1) for part in where], 1)
    shift = at(net.reshape(offsets, 48, 48, 17, 2), where, 17, 2)
    sure = net.reshape(at(confidence, where, 17), 17, 1)
    return [net.reshape(net.concat([net.mul(net.add(shift, place_of)), sure], 1), 1, 1, 17, 3)]


@workload("resnet34_ssd1200", "ResNet34-SSD", "ssd")
def _(net: Net) -> list[Value]:
    x = stem(net, net.picture(1, 3, 1200, 1200))
    for i, depth in enumerate((3, 4, 6)):
        for j in range(depth):
            out, s = 64 * 2**i, 2 if i == 1 and j == 0 else 1
            y = net.conv(net.conv(x, out, 3, s, act="relu"), out, 3)
            x = net.add(y, net.conv(x, out, 1, s) if s > 1 or x.channels != out else x, "relu")
    maps = [x]
    for hidden, out, s in ((256, 512, 2), (256, 512, 2), (128, 256, 2), (128, 256, 2), (128, 256, 2)):
        maps.append(net.conv(net.conv(maps[-1], hidden, act="relu"), out, 3, s, act="relu"))
    boxes, scores = [], []
    for i, (x, count) in enumerate(zip(maps, (4, 6, 6, 6, 4, 4), strict=True)):
        s = 3 if i == 0 else 2 if i < 2 else 1
        boxes.append(net.reshape(net.conv(x, count * 4, 3, s), 1, 4, -1))
        scores.append(net.reshape(net.conv(x, count * 81, 3, s), 1, 81, -1))
    deltas = net.transpose(net.concat(boxes, 2), 0, 2, 1)
    centers = net.add(net.mul(net.mul(net.slice(deltas, 0, 2, -1))))
    halves = net.mul(net.mul(net.act(net.mul(net.slice(deltas, 2, 4, -1)), "exp")))
    corners = []
    for op in ("sub", "add"):
        for i in range(2):
            corners.append(net.binary(op, net.slice(centers, i, i + 1, -1), net.slice(halves, i, i + 1, -1)))
    return [net.concat(corners, -1), net.softmax(net.transpose(net.concat(scores, 2), 0, 2, 1))]
