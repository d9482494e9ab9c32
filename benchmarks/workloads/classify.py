"""Convolutional classifiers and their relatives for faces and sounds."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.workloads import workload
from benchmarks.workloads.net import Net, Value


def classifier(net: Net, x: Value, classes: int = 1000) -> Value:
    x = net.gap(x)
    return net.linear(net.reshape(x, x.shape[0], -1), classes)


# ---------------------------------------------------------------------------------------------------------- ResNets


def stem(net: Net, x: Value, width: int = 64) -> Value:
    return net.pool(net.conv(x, width, 7, 2, act="relu"), 3, 2, 1)


def basic(net: Net, x: Value, out: int, stride: int, d: int = 1) -> Value:
    y = net.conv(net.conv(x, out, 3, stride, act="relu", d=d), out, 3, d=d)
    skip = net.conv(x, out, 1, stride) if stride > 1 or x.channels != out else x
    return net.add(y, skip, "relu")


def bottleneck(net: Net, x: Value, out: int, stride: int, width: int, groups: int = 1, d: int = 1) -> Value:
    y = net.conv(x, width, 1, act="relu")
    y = net.conv(net.conv(y, width, 3, stride, g=groups, act="relu", d=d), out)
    skip = net.conv(x, out, 1, stride) if stride > 1 or x.channels != out else x
    return net.add(y, skip, "relu")


def resnet50(
    net: Net, x: Value, depths: Sequence[int] = (3, 4, 6, 3), base: int = 64, groups: int = 1, dilate: int = 0
) -> list[Value]:
    """Features of the four stages; dilate: how many of the last stages keep their resolution."""
    x, out, dilation = stem(net, x), [], 1
    for i, depth in enumerate(depths):
        stride = 1 if i == 0 else 2
        before = dilation
        if i >= 4 - dilate:
            dilation, stride = dilation * 2, 1
        for j in range(depth):
            d = before if j == 0 else dilation
            x = bottleneck(net, x, 256 * 2**i, stride if j == 0 else 1, base * 2**i, groups, d)
        out.append(x)
    return out


def resnet18(net: Net, x: Value, depths: Sequence[int] = (2, 2, 2, 2)) -> list[Value]:
    x, out = stem(net, x), []
    for i, depth in enumerate(depths):
        for j in range(depth):
            x = basic(net, x, 64 * 2**i, 2 if i and j == 0 else 1)
        out.append(x)
    return out


@workload("resnet18", "ResNet18", "resnet")
def _(net: Net) -> Value:
    return classifier(net, resnet18(net, net.picture(1, 3, 224, 224))[-1])


@workload("resnet101", "ResNet101", "resnet")
def _(net: Net) -> Value:
    return classifier(net, resnet50(net, net.picture(1, 3, 224, 224), (3, 4, 23, 3))[-1])


@workload("wideresnet50", "WideResNet50", "resnet")
def _(net: Net) -> Value:
    return classifier(net, resnet50(net, net.picture(1, 3, 224, 224), base=128)[-1])


@workload("resnext101", "ResNeXt101", "resnet")
def _(net: Net) -> Value:
    return classifier(net, resnet50(net, net.picture(1, 3, 224, 224), (3, 4, 23, 3), 256, 32)[-1])


def regnet(net: Net, x: Value, widths: Sequence[int], depths: Sequence[int], group: int, se: bool) -> Value:
    x = net.conv(x, 32, 3, 2, act="relu")
    for width, depth in zip(widths, depths, strict=True):
        for j in range(depth):
            stride, came = (2 if j == 0 else 1), x
            y = net.conv(net.conv(x, width, act="relu"), width, 3, stride, g=width // group, act="relu")
            y = net.se(y, came.channels // 4) if se else y
            y = net.conv(y, width)
            x = net.add(y, net.conv(came, width, 1, stride) if j == 0 else came, "relu")
    return x


@workload("regnet", "RegNet", "regnet")
def _(net: Net) -> Value:
    x = net.picture(1, 3, 224, 224)
    return classifier(net, regnet(net, x, (96, 192, 432, 1008), (2, 6, 15, 2), 48, False))


@workload("regnet_y_800mf", "RegNet-Y-800MF", "regnet")
def _(net: Net) -> Value:
    x = net.picture(1, 3, 224, 224)
    return classifier(net, regnet(net, x, (64, 144, 320, 784), (1, 3, 8, 2), 16, True))


# ------------------------------------------------------------------------------------------------------- MobileNets


def inverted(
    net: Net, x: Value, out: int, k: int, stride: int, hidden: int, act: str, se: int = 0, gate: str = "sigmoid"
) -> Value:
    """Expand, depthwise, squeeze and excitation, project."""
    y = net.conv(x, hidden, act=act) if hidden != x.channels else x
    y = net.dw(y, k, stride, act)
    y = net.se(y, se, "relu" if gate == "hardsigmoid" else act, gate) if se else y
    y = net.conv(y, out)
    return net.add(y, x) if stride == 1 and x.channels == out else y


def mobilenet_v2(net: Net, x: Value, act: str = "relu6") -> Value:
    x = net.conv(x, 32, 3, 2, act=act)
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
            x = inverted(net, x, c, 3, s if j == 0 else 1, x.channels * t, act)
    return net.conv(x, 1280, act=act)


@workload("mobilenet_v2", "MobileNet-v2", "mobilenet")
def _(net: Net) -> Value:
    return classifier(net, mobilenet_v2(net, net.picture(1, 3, 224, 224)))


@workload("mobilenet_v3_small", "MobileNet-v3-Small", "mobilenet")
def _(net: Net) -> Value:
    x = net.conv(net.picture(1, 3, 224, 224), 16, 3, 2, act="hardswish")
    for k, e, c, se, act, s in (
        (3, 16, 16, 1, "relu", 2), (3, 72, 24, 0, "relu", 2), (3, 88, 24, 0, "relu", 1),
        (5, 96, 40, 1, "hardswish", 2), (5, 240, 40, 1, "hardswish", 1), (5, 240, 40, 1, "hardswish", 1),
        (5, 120, 48, 1, "hardswish", 1), (5, 144, 48, 1, "hardswish", 1), (5, 288, 96, 1, "hardswish", 2),
        (5, 576, 96, 1, "hardswish", 1), (5, 576, 96, 1, "hardswish", 1),
    ):  # fmt: skip
        x = inverted(net, x, c, k, s, e, act, max(8, e // 4 // 8 * 8) if se else 0, "hardsigmoid")
    x = net.gap(net.conv(x, 576, act="hardswish"))
    return net.linear(net.linear(net.reshape(x, 1, -1), 1024, "hardswish"), 1000)


@workload("mnasnet05", "MNASNet05", "mobilenet")
def _(net: Net) -> Value:
    x = net.conv(net.picture(1, 3, 224, 224), 16, 3, 2, act="relu")
    x = net.conv(net.dw(x, 3, 1, "relu"), 8)
    for k, t, c, n, s in (
        (3, 3, 16, 3, 2),
        (5, 3, 24, 3, 2),
        (5, 6, 40, 3, 2),
        (3, 6, 48, 2, 1),
        (5, 6, 96, 4, 2),
        (3, 6, 160, 1, 1),
    ):
        for j in range(n):
            x = inverted(net, x, c, k, s if j == 0 else 1, x.channels * t, "relu")
    return classifier(net, net.conv(x, 1280, act="relu"))


EFFICIENT = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


@workload("efficientnet_b0", "EfficientNet-B0", "efficientnet")
def _(net: Net) -> Value:
    x = net.conv(net.picture(1, 3, 224, 224), 32, 3, 2, act="silu")
    for t, k, c, n, s in EFFICIENT:
        for j in range(n):
            x = inverted(net, x, c, k, s if j == 0 else 1, x.channels * t, "silu", x.channels // 4)
    return classifier(net, net.conv(x, 1280, act="silu"))


@workload("efficientnet_lite4", "EfficientNet-Lite4", "efficientnet")
def _(net: Net) -> Value:
    x = net.conv(net.picture(1, 3, 300, 300), 32, 3, 2, act="relu6")
    widths, depths = (24, 32, 56, 112, 160, 272, 448), (1, 4, 4, 6, 6, 8, 1)
    for (t, k, _c, _n, s), width, depth in zip(EFFICIENT, widths, depths, strict=True):
        for j in range(depth):
            x = inverted(net, x, width, k, s if j == 0 else 1, x.channels * t, "relu6")
    return classifier(net, net.conv(x, 1280, act="relu6"))


@workload("efficientnet_v2_s", "EfficientNet-V2-s", "efficientnet")
def _(net: Net) -> Value:
    x = net.conv(net.picture(1, 3, 384, 384), 24, 3, 2, act="silu")
    for fused, t, c, n, s in (
        (1, 1, 24, 2, 1),
        (1, 4, 48, 4, 2),
        (1, 4, 64, 4, 2),
        (0, 4, 128, 6, 2),
        (0, 6, 160, 9, 1),
        (0, 6, 256, 15, 2),
    ):
        for j in range(n):
            stride, came = (s if j == 0 else 1), x
            if not fused:
                x = inverted(net, x, c, 3, stride, x.channels * t, "silu", x.channels // 4)
                continue
            y = net.conv(x, x.channels * t if t > 1 else c, 3, stride, act="silu")
            y = net.conv(y, c) if t > 1 else y
            x = net.add(y, came) if stride == 1 and came.channels == c else y
    return classifier(net, net.conv(x, 1280, act="silu"))


@workload("shufflenet_v2", "Shufflenet-v2", "shufflenet")
def _(net: Net) -> Value:
    x = net.pool(net.conv(net.picture(1, 3, 224, 224), 24, 3, 2, act="relu"), 3, 2, 1)
    for out, repeats in ((48, 4), (96, 8), (192, 4)):
        for j in range(repeats):
            half = out // 2
            if j == 0:
                a = net.conv(net.dw(x, 3, 2), half, act="relu")
                b = net.conv(net.dw(net.conv(x, half, act="relu"), 3, 2), half, act="relu")
            else:
                a, b = net.split(x, 2)
                b = net.conv(net.dw(net.conv(b, half, act="relu"), 3), half, act="relu")
            y = net.concat([a, b])
            n, c, h, w = y.shape
            y = net.transpose(net.reshape(y, n, 2, c // 2, h, w), 0, 2, 1, 3, 4)
            x = net.reshape(y, n, c, h, w)
    return classifier(net, net.conv(x, 1024, act="relu"))


@workload("deepbox", "vgg_3d_detection", "vgg")
def _(net: Net) -> list[Value]:
    """VGG-19 with three heads: orientation, confidence, dimension."""
    x = net.mul(net.binary("sub", net.flip(net.input(1, 3, 224, 224), 1)))
    for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(depth):
            x = net.conv(x, width, 3, act="relu")
        x = net.pool(x, 2, 2)
    x = net.reshape(x, 1, -1)
    outputs = []
    for hidden, out in ((256, 4), (256, 2), (512, 3)):
        outputs.append(net.linear(net.linear(net.linear(x, hidden, "relu"), hidden, "relu"), out))
    turn = net.reshape(outputs[0], 1, 2, 2)
    return [net.norm(turn, "l2_norm"), *outputs[1:]]


# ------------------------------------------------------------------------------------------------------------ others


@workload("inception_v4", "Inception-v4", "inception")
def _(net: Net) -> Value:
    def conv(x: Value, out: int, k: int | Sequence[int] = 1, s: int = 1, p: int | None = None) -> Value:
        return net.conv(x, out, k, s, p, act="relu")

    def average(x: Value) -> Value:
        return net.pool(x, 3, 1, 1, "avg_pool")

    x = conv(conv(conv(net.picture(1, 3, 299, 299), 32, 3, 2, 0), 32, 3, 1, 0), 64, 3)
    x = net.concat([net.pool(x, 3, 2), conv(x, 96, 3, 2, 0)])
    a = conv(conv(x, 64), 96, 3, 1, 0)
    b = conv(conv(conv(conv(x, 64), 64, (1, 7)), 64, (7, 1)), 96, 3, 1, 0)
    x = net.concat([a, b])
    x = net.concat([conv(x, 192, 3, 2, 0), net.pool(x, 3, 2)])
    for _ in range(4):
        b = conv(conv(x, 64), 96, 3)
        c = conv(conv(conv(x, 64), 96, 3), 96, 3)
        x = net.concat([conv(x, 96), b, c, conv(average(x), 96)])
    a = conv(conv(conv(x, 192), 224, 3), 256, 3, 2, 0)
    x = net.concat([conv(x, 384, 3, 2, 0), a, net.pool(x, 3, 2)])
    for _ in range(7):
        b = conv(conv(conv(x, 192), 224, (1, 7)), 256, (7, 1))
        c = conv(conv(conv(conv(conv(x, 192), 192, (7, 1)), 224, (1, 7)), 224, (7, 1)), 256, (1, 7))
        x = net.concat([conv(x, 384), b, c, conv(average(x), 128)])
    a = conv(conv(x, 192), 192, 3, 2, 0)
    b = conv(conv(conv(conv(x, 256), 256, (1, 7)), 320, (7, 1)), 320, 3, 2, 0)
    x = net.concat([a, b, net.pool(x, 3, 2)])
    for _ in range(3):
        b = conv(x, 384)
        c = conv(conv(conv(x, 384), 448, (3, 1)), 512, (1, 3))
        x = net.concat(
            [
                conv(x, 256), conv(b, 256, (1, 3)), conv(b, 256, (3, 1)),
                conv(c, 256, (1, 3)), conv(c, 256, (3, 1)), conv(average(x), 256),
            ]
        )  # fmt: skip
    return classifier(net, x)


@workload("osnet", "OSNet", "osnet")
def _(net: Net) -> Value:
    def light(x: Value, out: int) -> Value:
        return net.conv(net.conv(x, out), out, 3, g=out, act="relu")

    def block(x: Value, out: int) -> Value:
        middle, branches = out // 4, []
        y = net.conv(x, middle, act="relu")
        for count in range(1, 5):
            b = y
            for _ in range(count):
                b = light(b, middle)
            branches.append(net.se(b, middle // 16))
        total = branches[0]
        for b in branches[1:]:
            total = net.add(total, b)
        skip = net.conv(x, out) if x.channels != out else x
        return net.add(net.conv(total, out), skip, "relu")

    x = stem(net, net.input(1, 3, 256, 128))
    for i, out in enumerate((256, 384, 512)):
        x = block(block(x, out), out)
        x = net.pool(net.conv(x, out, act="relu"), 2, 2, 0, "avg_pool") if i < 2 else net.conv(x, out, act="relu")
    return net.linear(net.reshape(net.gap(x), 1, -1), 512, "relu")


@workload("mobile_facenet", "MobileFaceNet", "mobilenet")
def _(net: Net) -> Value:
    """Two faces, each also mirrored: a batch of four whose embeddings are added in pairs."""
    faces = [net.picture(1, 3, 112, 112) for _ in range(2)]
    mirrored = [net.flip(face, 3) for face in faces]
    x = net.concat([faces[0], mirrored[0], faces[1], mirrored[1]], 0)
    x = net.dw(net.conv(x, 64, 3, 2, act="prelu"), 3, 1, "prelu")
    for t, c, n, s in ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1)):
        for j in range(n):
            x = inverted(net, x, c, 3, s if j == 0 else 1, x.channels * t, "prelu")
    x = net.conv(x, 512, act="prelu")
    x = net.reshape(net.conv(net.conv(x, 512, 7, p=0, g=512), 128), 4, 128)
    sums = [net.add(net.slice(x, i, i + 1, 0), net.slice(x, i + 1, i + 2, 0)) for i in (0, 2)]
    return net.concat(sums, 0)


@workload("yamnet", "YamNet", "mobilenet")
def _(net: Net) -> Value:
    x = net.conv(net.input(1, 1, 96, 64), 32, 3, 2, act="relu")
    for out, s in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)):
        x = net.conv(net.dw(x, 3, s, "relu"), out, act="relu")
    return net.act(classifier(net, x, 521), "sigmoid")


def resnet3d(net: Net, x: Value, conv2plus1: bool) -> Value:
    """Video ResNet-18: (2+1)D everywhere, or 3-D in the first stage and 2-D after it (mixed)."""

    def conv(x: Value, out: int, stride: int, came: int, three: bool, act: str | None) -> Value:
        """came: channels of the block's input, which set the width between the two parts of a convolution."""
        if conv2plus1:
            middle = (came * out * 27) // (came * 9 + 3 * out)
            y = net.conv(x, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), act="relu")
            return net.conv(y, out, (3, 1, 1), (stride, 1, 1), (1, 0, 0), act=act)
        if three:
            return net.conv(x, out, (3, 3, 3), stride, (1, 1, 1), act=act)
        return net.conv(x, out, (1, 3, 3), (1, stride, stride), (0, 1, 1), act=act)

    if conv2plus1:
        x = net.conv(x, 45, (1, 7, 7), (1, 2, 2), (0, 3, 3), act="relu")
        x = net.conv(x, 64, (3, 1, 1), 1, (1, 0, 0), act="relu")
    else:
        x = net.conv(x, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), act="relu")
    for i in range(4):
        for j in range(2):
            out, stride = 64 * 2**i, 2 if i and j == 0 else 1
            y = conv(x, out, stride, x.channels, i == 0, "relu")
            y = conv(y, out, 1, x.channels, i == 0, None)
            down = (stride,) * 3 if conv2plus1 else (1, stride, stride)
            skip = net.conv(x, out, (1, 1, 1), down, (0, 0, 0)) if stride > 1 else x
            x = net.add(y, skip, "relu")
    return classifier(net, x, 400)


@workload("resnet_2plus1d", "ResNet-2Plus1D", "resnet3d")
def _(net: Net) -> Value:
    return resnet3d(net, net.picture(1, 3, 16, 112, 112), True)


@workload("resnet_mixed", "ResNet-Mixed-Convolution", "resnet3d")
def _(net: Net) -> Value:
    return resnet3d(net, net.picture(1, 3, 16, 112, 112), False)


@workload("facemap_3dmm", "Facial-Landmark-Detection", "resnet")
def _(net: Net) -> Value:
    """A gray ResNet-18 of half the width, except for its last block."""
    x = net.conv(net.mul(net.input(1, 3, 128, 128)), 1)
    x = net.pool(net.pad(net.conv(x, 32, 7, 2, act="relu"), 1, 1), 3, 2)
    for out, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), (512, 1)):
        x = basic(net, x, out, stride)
    return net.linear(net.reshape(net.gap(x), 1, -1), 265)


@workload("gpunet", "GPUNet", "efficientnet")
def _(net: Net) -> Value:
    """GPUNet-0."""
    x = net.conv(net.picture(1, 3, 224, 224), 32, 3, 2, act="relu")
    for _ in range(2):
        x = net.conv(x, 32, 3, act="relu")
    for out, s in ((32, 2), (32, 1), (64, 2), (64, 1), (64, 1)):
        y = net.conv(net.conv(x, x.channels * 5, 3, s, act="relu"), out)
        x = net.add(x, y) if y.shape == x.shape else y
    for out, s, act in ((256, 2, "silu"), (256, 1, "silu"), (256, 1, "silu"), (704, 2, "relu"), (704, 1, "relu")):
        y = net.dw(net.conv(x, x.channels * 5, act=act), 3, s, act=act)
        y = net.conv(net.se(y, x.channels // 4) if act == "relu" else y, out)
        x = net.add(x, y) if y.shape == x.shape else y
    return classifier(net, net.conv(x, 1280, act="relu"))
