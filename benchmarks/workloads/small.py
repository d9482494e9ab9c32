"""Small detectors, landmark and attribute nets that run on every camera frame."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.workloads import workload
from benchmarks.workloads.classify import inverted
from benchmarks.workloads.net import Net, Value
from benchmarks.workloads.yolo import scored

# ---------------------------------------------------------------------------------------------------------- MediaPipe


def blaze(net: Net, x: Value, out: int, k: int = 3, stride: int = 1, act: str = "relu") -> Value:
    """Depthwise and pointwise convolution beside a shortcut, which is pooled and padded to fit."""
    if stride == 2:
        y = net.conv(net.pad(x, k - 1, k - 1) if k == 3 else net.pad(x, 3, 3), x.channels, k, 2, 0, x.channels)
        x = net.pool(x, 2, 2)
    else:
        y = net.dw(x, k)
    y = net.conv(y, out)
    x = net.pad(x, 0, 0, out - x.channels) if out > x.channels else x
    return net.add(y, x, act)


def blazes(net: Net, x: Value, stages: Sequence[tuple[int, int]], k: int = 3, act: str = "relu") -> Value:
    """stages: (channels, blocks after the one with stride 2)"""
    for out, count in stages:
        x = blaze(net, x, out, k, 2, act)
        for _ in range(count):
            x = blaze(net, x, out, k, 1, act)
    return x


def anchored(net: Net, levels: Sequence[tuple[Value, int]], coordinates: int) -> list[list[Value]]:
    """Boxes and scores of every level's anchors; levels: features, anchors per cell."""
    found = []
    for width in (coordinates, 1):
        parts = [net.transpose(net.conv(x, each * width), 0, 2, 3, 1) for x, each in levels]
        found.append([net.reshape(y, 1, -1, width) for y in parts])
    return found


@workload("mediapipe_face", "face_detector", "blaze")
def _(net: Net) -> list[Value]:
    x = net.conv(net.pad(net.input(1, 3, 256, 256), 4, 4), 24, 5, 2, 0, act="relu")
    for _ in range(7):
        x = blaze(net, x, 24)
    x = blazes(net, x, ((24, 7), (48, 7), (96, 7)))
    final = net.conv(net.conv(net.pad(x, 2, 2), 96, 3, 2, 0, 96), 96, act="relu")
    boxes, scores = anchored(net, ((x, 2), (final, 6)), 16)
    return [*boxes, *scores]


@workload("mediapipe_face", "face_landmark_detector", "blaze")
def _(net: Net) -> list[Value]:
    x = net.conv(net.pad(net.input(1, 3, 192, 192), 1, 1), 16, 3, 2, 0, act="prelu")
    for _ in range(2):
        x = blaze(net, x, 16, act="prelu")
    x = blazes(net, x, ((32, 2), (64, 2), (128, 2), (128, 2)), act="prelu")
    outputs = []
    for blocks, size in ((2, 1404), (0, 1)):
        y = blazes(net, x, ((128, blocks),), act="prelu")
        y = blaze(net, net.conv(y, 32, act="prelu"), 32, act="prelu")
        outputs.append(net.conv(y, size, 3, p=0))
    return [net.mul(net.reshape(outputs[0], 1, 468, 3)), net.act(outputs[1], "sigmoid")]


def palms(net: Net) -> list[Value]:
    x = net.conv(net.pad(net.input(1, 3, 256, 256), 1, 1), 32, 3, 2, 0, act="relu")
    for _ in range(7):
        x = blaze(net, x, 32)
    x = blazes(net, x, ((64, 7), (128, 7)))
    y = blazes(net, x, ((256, 7),))
    z = blazes(net, y, ((256, 7),))
    y = blaze(net, net.add(y, net.deconv(z, 256, 2, 2, act="relu")), 256)
    x = blaze(net, net.add(x, net.deconv(y, 128, 2, 2, act="relu")), 128)
    return [net.concat(parts, 1) for parts in anchored(net, ((x, 2), (y, 2), (z, 6)), 18)]


workload("mediapipe_hand", "hand_detector", "blaze")(palms)


@workload("mediapipe_hand_gesture", "palm_detector", "blaze")
def _(net: Net) -> list[Value]:
    """The detector of hands with its boxes decoded."""
    boxes, scores = palms(net)
    boxes = net.reshape(net.add(net.mul(net.reshape(boxes, 1, -1, 9, 2))), 1, -1, 18)
    corner, size, marks = (net.slice(boxes, a, b, -1) for a, b in ((0, 2), (2, 4), (4, 18)))
    half = net.mul(size)
    boxes = net.concat([net.binary("sub", corner, half), net.add(corner, half), marks], -1)
    return [boxes, net.reshape(net.act(net.act(scores, "clip"), "sigmoid"), 1, -1)]


@workload("mediapipe_hand_gesture", "hand_landmark_detector", "mobilenet")
def _(net: Net) -> list[Value]:
    x = net.conv(net.input(1, 3, 224, 224), 24, 3, 2, act="relu6")
    x = net.conv(net.dw(x, 3, act="relu6"), 16)
    for hidden, k, s, out in (
        (64, 3, 2, 24), (144, 3, 1, 24), (144, 5, 2, 40), (240, 5, 1, 40), (240, 3, 2, 80), (480, 3, 1, 80),
        (480, 3, 1, 80), (480, 5, 1, 112), (672, 5, 1, 112), (672, 5, 1, 112), (672, 5, 2, 192), (1152, 5, 1, 192),
        (1152, 5, 1, 192), (1152, 5, 1, 192),
    ):  # fmt: skip
        x = inverted(net, x, out, k, s, hidden, "relu6")
    x = net.dw(net.conv(x, 1152, act="relu6"), 3, act="relu6")
    x = net.reshape(net.gap(x), 1, 1152)
    marks, certain, hand, world = (net.linear(x, n) for n in (63, 1, 1, 63))
    return [marks, net.act(certain, "sigmoid"), net.act(hand, "sigmoid"), world]


@workload("mediapipe_hand", "hand_landmark_detector", "blaze")
def _(net: Net) -> list[Value]:
    x = net.conv(net.pad(net.input(1, 3, 256, 256), 1, 1), 24, 3, 2, 0, act="relu")
    levels = []
    for out in (48, 96, 96, 96):
        x = blaze(net, blaze(net, x, x.channels, 5), x.channels, 5)
        x = blaze(net, x, out, 5, 2)
        levels.append(x)
    x = levels.pop()
    for skip in levels[:0:-1]:
        x = blaze(net, net.add(skip, net.up(x, 2, "bilinear")), 96, 5)
    x = net.add(levels[0], net.up(net.conv(x, 48), 2, "bilinear"))
    for _ in range(4):
        x = blaze(net, x, 48, 5)
    x = blazes(net, x, ((96, 4), (288, 4), (288, 4), (288, 4), (288, 4)), 5)
    flag, handed, marks = (net.conv(x, n, 2, p=0) for n in (1, 1, 63))
    return [net.act(flag, "sigmoid"), net.act(handed, "sigmoid"), net.mul(net.reshape(marks, 1, 21, 3))]


@workload("mediapipe_hand_gesture", "canned_gesture_classifier", "gesture")
def _(net: Net) -> Value:
    """A hand's landmarks and their mirror image through the same residual layers; norms precede the activations."""

    def active(x: Value) -> Value:
        return net.act(net.add(net.mul(x)), "silu")

    def embed(x: Value) -> Value:
        x = net.linear(x, 128)
        for _ in range(7):
            x = net.add(x, net.linear(active(x), 128))
        return x

    x = net.add(embed(net.input(1, 64)), embed(net.input(1, 64)))
    x = net.act(net.add(net.mul(net.linear(active(x), 128))), "relu")
    return net.softmax(net.linear(x, 8))


# -------------------------------------------------------------------------------------------------------------- faces


@workload("face_det_lite", "Lightweight-Face-Detection", "facedet")
def _(net: Net) -> list[Value]:
    def conv(x: Value, out: int, k: int = 3, s: int = 1) -> Value:
        return net.conv(x, out, k, s, act="relu")

    x = conv(net.picture(1, 1, 480, 640), 16, 3, 2)
    kept = []
    blocks = (
        (3, 16, 16, 2), (3, 64, 32, 2), (3, 96, 32, 1), (5, 96, 32, 2), (5, 224, 32, 1), (5, 224, 32, 1),
        (5, 128, 64, 1), (5, 160, 64, 1), (5, 256, 96, 2),
    )  # fmt: skip
    for k, hidden, out, s in blocks:
        y = conv(x, hidden, 1)
        y = conv(y, out, 3, s) if k == 3 else net.se(conv(conv(y, out), out, 3, s), out // 4)
        if s == 1:
            y = net.add(y, x if x.channels == out else net.conv(x, out))
        x = y
        kept.append(x)
    x = conv(x, 32, 1)
    for skip in (kept[7], kept[2]):
        x = net.add(conv(net.up(x), 32), conv(skip, 32, 1))
    context = conv(x, 8)
    x = net.concat([conv(x, 16), net.concat([conv(context, 8), conv(conv(context, 8), 8)])])
    return [net.conv(x, out) for out in (1, 4, 10)]


@workload("face_attrib_net", "Facial-Attribute-Detection", "faceattrib")
def _(net: Net) -> Value:
    def pair(x: Value, middle: int, out: int, s: int = 1, act: str | None = "prelu", group: int = 32) -> Value:
        """3 x 3 in groups of channels, then pointwise."""
        return net.conv(net.conv(x, middle, 3, s, g=x.channels // group), out, act=act)

    x = net.conv(net.picture(1, 3, 128, 128), 64, 3, act="prelu")
    x = net.add(pair(pair(x, 64, 64, 2), 64, 64, act=None), pair(x, 64, 64, 2, None), "prelu")
    features = []
    for depth in (2, 6, 3):
        c = x.channels
        y = pair(pair(x, 4 * c, 2 * c, 2), 4 * c, 2 * c, act=None, group=64)
        x = net.add(pair(x, 2 * c, 2 * c, 2), y, "prelu")
        for _ in range(depth - 1):
            y = pair(pair(x, 4 * c, 2 * c), 4 * c, 2 * c, act=None)
            x = net.add(y, x, "prelu")
        features.append(x)
    logits = []
    for _ in range(5):
        y = net.concat([pair(features[1], 128, 128, 2), x])
        y = net.conv(net.conv(y, 320, 3, 2, g=20), 128, act="prelu")
        logits.append(net.reshape(net.linear(net.reshape(net.gap(y), 1, 128), 2), 1, 1, 2))
    logit = net.concat(logits, 1)
    return net.slice(net.softmax(logit), 1, 2, -1)


@workload("eyegaze", "EyeGaze", "eyegaze")
def _(net: Net) -> list[Value]:
    """EyeNet: three stacked hourglasses for 34 landmarks, and a branch for the direction."""

    def residual(x: Value, out: int) -> Value:
        """The norms of the inner convolutions fold, that of the input does not."""
        y = net.conv(net.act(net.batch_norm(x), "relu"), out // 2, act="relu")
        y = net.conv(net.conv(y, out // 2, 3, act="relu"), out)
        return net.add(y, net.conv(x, out) if x.channels != out else x)

    def before(x: Value, s: int) -> Value:
        x = net.pool(residual(net.conv(x, 64, 7, s, act="relu"), 128), 2, 2)
        return residual(residual(x, 128), 32)

    def hourglass(x: Value, n: int) -> Value:
        low = residual(net.pool(x, 2, 2), 32)
        low = residual(hourglass(low, n - 1) if n > 1 else residual(low, 32), 32)
        return net.add(residual(x, 32), net.resize(low, x.shape[2:]))

    x = before(net.reshape(net.input(1, 96, 160), 1, 1, 96, 160), 1)
    gaze = net.reshape(before(x, 2), 1, -1)
    heat = []
    for i in range(3):
        feature = net.conv(residual(hourglass(x, 4), 32), 32, act="relu")
        heat.append(net.conv(feature, 34))
        if i < 2:
            x = net.add(net.add(x, net.conv(heat[-1], 32)), net.conv(feature, 32))
    spread = net.softmax(net.mul(net.reshape(heat[-1], 1, 34, -1)))
    at = [net.reduce(net.mul(net.mul(spread)), -1, "reduce_sum") for _ in range(2)]
    marks = net.concat(at, -1)
    gaze = net.concat([gaze, net.reshape(marks, 1, -1)], -1)
    gaze = net.linear(net.linear(gaze, 256, "relu"), 2)
    return [net.concat([net.reshape(x, 1, 1, 34, 48, 80) for x in heat], 1), marks, gaze]


# --------------------------------------------------------------------------------------------------------- detection


@workload("gear_guard_net", "PPE-Detection", "gearguard")
def _(net: Net) -> list[Value]:
    def conv(x: Value, out: int, k: int = 3, s: int = 1) -> Value:
        return net.conv(x, out, k, s, act="relu")

    def double(x: Value, out: int, count: int) -> Value:
        for _ in range(count):
            half = max(out, x.channels) // 2
            y = net.conv(net.dw(net.conv(net.dw(x, 5), half, act="relu"), 5), out)
            x = net.add(y, x if x.channels == out else net.conv(x, out), "relu")
        return x

    x = net.conv(net.input(1, 3, 320, 192), 32, 6, 2, 2, act="relu")
    kept = []
    for out, count in ((64, 1), (128, 1), (256, 3), (512, 1)):
        x = double(conv(x, out, 3, 2), out, count)
        kept.append(x)
    low = conv(conv(x, 512), 256, 1)
    x = double(net.concat([net.up(low), kept[2]]), 256, 1)
    middle = conv(x, 128, 1)
    small = double(net.concat([net.up(middle), kept[1]]), 128, 1)
    medium = double(net.concat([conv(small, 128, 3, 2), middle]), 256, 1)
    large = double(net.concat([conv(medium, 256, 3, 2), low]), 512, 1)
    found = []
    for x in (small, medium, large):
        _, _, h, w = x.shape
        y = net.transpose(net.reshape(net.conv(x, 21), 1, 3, 7, h, w), 0, 3, 4, 1, 2)
        certain = net.reshape(net.act(net.slice(y, 4, 5, -1), "sigmoid"), 1, h * w * 3)
        classes = net.reshape(net.act(net.slice(y, 5, 7, -1), "sigmoid"), 1, h * w * 3, 2)
        flat, parts = net.reshape(y, 1, h * w * 3, 7), []
        for i in range(4):
            z = net.act(net.reshape(net.slice(flat, i, i + 1, -1), 1, -1), "sigmoid")
            parts.append(net.mul(net.add(net.mul(z))) if i < 2 else net.mul(net.mul(net.mul(z, z))))
        box = net.concat([net.reshape(z, 1, -1, 1) for z in (*parts, certain)], 2)
        found.append(net.concat([box, classes], -1))
    return scored(net, net.concat(found, 1))
