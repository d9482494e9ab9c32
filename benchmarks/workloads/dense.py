"""Segmentation, restoration and super-resolution."""

from __future__ import annotations

from benchmarks.workloads import workload
from benchmarks.workloads.classify import basic, bottleneck, resnet50
from benchmarks.workloads.net import Net, Value

# ----------------------------------------------------------------------------------------------------- segmentation


@workload("fcn_resnet50", "FCN-ResNet50", "fcn")
def _(net: Net) -> Value:
    x = resnet50(net, net.picture(1, 3, 520, 520), dilate=2)[-1]
    x = net.conv(net.conv(x, 512, 3, act="relu"), 21)
    x = net.resize(x, (520, 520))
    return net.reduce(x, 1, "argmax")


@workload("deeplab_xception", "DeepLabXception", "deeplab")
def _(net: Net) -> Value:
    def separable(x: Value, out: int, s: int = 1, d: int = 1, act: bool = False) -> Value:
        kind = "relu" if act else None
        return net.conv(net.dw(x, 3, s, kind, d), out, act=kind)

    def block(x: Value, widths: tuple[int, int, int], s: int, skip: str, d: int = 1) -> Value:
        y = x
        for i, width in enumerate(widths):
            y = separable(net.act(y, "relu"), width, s if i == 2 else 1, d)
        if skip == "conv":
            return net.add(y, net.conv(x, widths[-1], 1, s))
        return net.add(y, x) if skip == "sum" else y

    x = net.conv(net.conv(net.picture(1, 3, 480, 520), 32, 3, 2, act="relu"), 64, 3, act="relu")
    x = block(x, (128, 128, 128), 2, "conv")
    x = low = block(x, (256, 256, 256), 2, "conv")
    x = block(x, (728, 728, 728), 2, "conv")
    for _ in range(16):
        x = block(x, (728, 728, 728), 1, "sum")
    x = block(x, (728, 1024, 1024), 1, "conv")
    for width in (1536, 1536, 2048):
        x = separable(x, width, d=2, act=True)
    h, w = x.shape[2:]
    parts = [net.conv(x, 256, act="relu")]
    parts += [separable(x, 256, d=d, act=True) for d in (6, 12, 18)]
    parts.append(net.resize(net.conv(net.gap(x), 256, act="relu"), (h, w)))
    x = net.conv(net.concat(parts), 256, act="relu")
    x = net.resize(x, low.shape[2:])
    x = net.concat([x, net.conv(low, 48, act="relu")])
    x = separable(separable(x, 256, act=True), 256, act=True)
    return net.reduce(net.resize(net.conv(x, 21), (480, 520)), 1, "argmax")


@workload("pspnet", "PSPNet", "fcn")
def _(net: Net) -> Value:
    """The picture and its mirror image as a batch, whose softmaxes are averaged."""
    x = net.input(1, 3, 473, 473)
    x = net.mul(net.binary("sub", net.concat([x, net.flip(x, 3)], 0)))
    x = net.conv(net.conv(net.conv(x, 64, 3, 2, act="relu"), 64, 3, act="relu"), 128, 3, act="relu")
    x = net.pool(x, 3, 2, 1)
    for i, depth in enumerate((3, 4, 23, 3)):
        for j in range(depth):
            x = bottleneck(net, x, 256 * 2**i, 2 if i == 1 and j == 0 else 1, 64 * 2**i, 1, (1, 1, 2, 4)[i])
    size = x.shape[2:]
    parts = [x]
    for bins in (1, 2, 3, 6):
        y = net.emit(
            "avg_pool", [x], (2, 2048, bins, bins), kernel=(size[0] // bins,) * 2, stride=(size[0] // bins,) * 2
        )
        parts.append(net.resize(net.conv(y, 512, act="relu"), size))
    x = net.conv(net.concat(parts), 512, 3, act="relu")
    x = net.softmax(net.resize(net.conv(x, 150), (473, 473)), 1)
    plain, mirrored = net.split(x, 2, 0)
    return net.mul(net.add(plain, net.flip(mirrored, 3)))


@workload("unet_segmentation", "Unet-Segmentation", "unet")
def _(net: Net) -> Value:
    def double(x: Value, out: int) -> Value:
        return net.conv(net.conv(x, out, 3, act="relu"), out, 3, act="relu")

    x = double(net.input(1, 3, 640, 1280), 64)
    skips = []
    for out in (128, 256, 512, 1024):
        skips.append(x)
        x = double(net.pool(x, 2, 2), out)
    for out in (512, 256, 128, 64):
        x = double(net.concat([skips.pop(), net.deconv(x, out, 2, 2)]), out)
    return net.conv(x, 2)


def ffnet_head(net: Net, features: list[Value], base: tuple[int, ...], widths: tuple[int, ...], k: int) -> Value:
    """Up-head that joins four scales, and a segmentation head; base: channels of each scale (fine to coarse), widths:
    of the maps that are joined, k: kernel of the last convolution."""
    adapted = [net.conv(x, width, act="relu") for x, width in zip(features, base, strict=True)]
    x, joined = adapted[3], []
    for i in (3, 2, 1, 0):
        x = adapted[3] if i == 3 else net.add(net.up(net.conv(x, base[i], act="relu"), 2), adapted[i])
        joined.append(net.conv(x, widths[i], 3, act="relu"))
    target = joined[3].shape[2:]
    x = net.concat([joined[3], *[net.resize(y, target, "nearest") for y in joined[2::-1]]])
    return net.conv(net.conv(x, 256 if k == 3 else 128, 3, act="relu"), 19, k)


def ffnet(net: Net, size: tuple[int, int], depths: tuple[int, ...], mobile: str) -> Value:
    """FFNet: a slim ResNet (or, CCC, a narrow one of three stages) of basic blocks. Stage by stage B or C: dBBB
    starts with stride 2 and has wider heads."""
    x = net.picture(1, 3, *size)
    features = []
    if mobile == "CCC":
        x = net.conv(net.conv(net.conv(x, 64, 3, 2, act="relu"), 64, 3, 2, act="relu"), 64, 3, act="relu")
        features.append(x)
    else:
        x = net.conv(net.conv(x, 32, 3, 2, act="relu"), 64, 3, 2, act="relu")
    for i, depth in enumerate(depths):
        width = (64, 128, 256)[i] if mobile == "CCC" else (64, 128, 192, 320)[i]
        for j in range(depth):
            x = basic(net, x, width, 2 if j == 0 and (i or mobile != "BCC") else 1)
        features.append(x)
    if mobile == "dBBB":
        return ffnet_head(net, features, (64, 128, 128, 256), (96, 96, 64, 32), 3)
    return ffnet_head(net, features, (128, 128, 128, 128), (128, 16, 16, 16), 1)


@workload("mediapipe_selfie", "MediaPipe-Selfie-Segmentation", "mobilenet")
def _(net: Net) -> Value:
    x = one = net.conv(net.input(1, 3, 256, 256), 16, 3, 2, act="hardswish")
    x = net.conv(x, 16, act="relu")
    x = net.conv(net.se(net.dw(x, 3, 2, "relu"), 8), 16)
    two = x
    y = net.conv(net.dw(net.conv(x, 72, act="relu"), 3, 2, "relu"), 24)
    x = three = net.add(net.conv(net.dw(net.conv(y, 88, act="relu"), 3, 1, "relu"), 24), y)
    x = net.conv(net.se(net.dw(net.conv(x, 96, act="hardswish"), 5, 2, "hardswish"), 24), 32)
    for _ in range(2):
        y = net.se(net.dw(net.conv(x, 128, act="hardswish"), 5, 1, "hardswish"), 32)
        x = net.add(net.conv(y, 32), x)
    for _ in range(2):
        y = net.se(net.dw(net.conv(x, 96, act="hardswish"), 5, 1, "hardswish"), 24)
        x = net.add(net.conv(y, 32), x)
    x = net.mul(net.conv(x, 128, act="relu"), net.conv(net.gap(x), 128, act="sigmoid"))
    for skip in (three, two, one):
        y = net.conv(net.up(x, 2, "bilinear"), skip.channels)
        gate = net.conv(net.conv(net.gap(net.add(skip, y)), skip.channels, act="relu"), skip.channels, act="sigmoid")
        y = net.conv(net.add(net.mul(skip, gate), y), skip.channels, act="relu")
        x = net.add(net.dw(y, 3, 1, "relu"), y)
    return net.act(net.deconv(x, 1, 2, 2), "sigmoid")


@workload("pidnet", "PidNet", "pidnet")
def _(net: Net) -> Value:
    def block(x: Value, out: int, stride: int = 1, relu: bool = True) -> Value:
        y = net.conv(net.conv(x, out, 3, stride, act="relu"), out, 3)
        skip = net.conv(x, out, 1, stride) if stride > 1 or x.channels != out else x
        return net.add(y, skip, "relu" if relu else None)

    def narrow(x: Value, width: int, stride: int = 1, relu: bool = False) -> Value:
        y = net.conv(net.conv(net.conv(x, width, act="relu"), width, 3, stride, act="relu"), width * 2)
        skip = net.conv(x, width * 2, 1, stride) if stride > 1 or x.channels != width * 2 else x
        return net.add(y, skip, "relu" if relu else None)

    def bag(p: Value, i: Value, d: Value) -> Value:
        edge = net.act(d, "sigmoid")
        p_add = net.conv(net.add(net.mul(net.add(net.mul(edge)), i), p), 64 * 2)
        i_add = net.conv(net.add(net.mul(edge, p), i), 64 * 2)
        return net.add(p_add, i_add)

    def pag(x: Value, y: Value) -> Value:
        a, b = net.conv(x, 32), net.resize(net.conv(y, 32), x.shape[2:])
        gate = net.act(net.reduce(net.mul(a, b), 1, "reduce_sum"), "sigmoid")
        y = net.resize(y, x.shape[2:])
        return net.add(net.mul(x, net.add(net.mul(gate))), net.mul(gate, y)) if x.channels == y.channels else x

    def ready(x: Value) -> Value:
        return net.act(net.batch_norm(x), "relu")

    x = net.conv(net.conv(net.picture(1, 3, 1024, 2048), 32, 3, 2, act="relu"), 32, 3, 2, act="relu")
    x = block(block(x, 32), 32, relu=False)
    x = net.act(x, "relu")
    x = net.act(block(block(x, 64, 2), 64, relu=False), "relu")
    p, d = block(block(x, 64), 64, relu=False), block(x, 32, relu=False)
    i = block(x, 128, 2)
    for _ in range(2):
        i = block(i, 128)
    p = pag(p, net.conv(i, 64))
    d = net.add(d, net.resize(net.conv(i, 32, 3), d.shape[2:]))
    p = net.act(block(block(net.act(p, "relu"), 64), 64, relu=False), "relu")
    d = narrow(net.act(d, "relu"), 32)
    i = block(i, 256, 2)
    for _ in range(2):
        i = block(i, 256)
    p = pag(p, net.conv(i, 64))
    d = net.add(d, net.resize(net.conv(i, 64, 3), d.shape[2:]))
    p, d = narrow(net.act(p, "relu"), 64), narrow(net.act(d, "relu"), 64)
    i = narrow(narrow(i, 256, 2), 256)
    parts = [net.conv(ready(i), 96)]
    for k in (5, 9, 17, 0):
        y = net.pool(i, k, max(2, k // 2), k // 2, "avg_pool") if k else net.gap(i)
        parts.append(net.add(net.resize(net.conv(ready(y), 96), i.shape[2:]), parts[0]))
    y = net.conv(ready(net.concat(parts[1:])), 384, 3, g=4)
    i = net.add(net.conv(ready(net.concat([parts[0], y])), 128), net.conv(ready(i), 128))
    i = net.resize(i, d.shape[2:])
    x = bag(p, i, d)
    return net.conv(net.conv(ready(x), 128, 3, act="relu"), 19)


@workload("salsanext", "SalsaNext", "salsanext")
def _(net: Net) -> Value:
    def conv(x: Value, out: int, k: int, d: int = 1, p: int | None = None, norm: bool = True) -> Value:
        """The batch norm follows the activation function, so it does not fold into the convolution."""
        y = net.conv(x, out, k, d=d, p=p, act="leaky_relu")
        return net.batch_norm(y) if norm else y

    def context(x: Value, out: int) -> Value:
        a = conv(x, out, 1, norm=False)
        return net.add(a, conv(conv(a, out, 3), out, 3, 2))

    def branches(x: Value, out: int) -> Value:
        one = conv(x, out, 3)
        two = conv(one, out, 3, 2)
        return conv(net.concat([one, two, conv(two, out, 2, 2, 1)]), out, 1)

    def res(x: Value, out: int, pool: bool = True) -> list[Value]:
        y = net.add(conv(x, out, 1, norm=False), branches(x, out))
        return [net.pool(y, 3, 2, 1, "avg_pool"), y] if pool else [y]

    def up(x: Value, skip: Value, out: int) -> Value:
        return branches(net.concat([net.shuffle(x, 2), skip]), out)

    x = net.input(1, 5, 64, 2048)
    for _ in range(3):
        x = context(x, 32)
    skips = []
    for out in (64, 128, 256, 256):
        x, skip = res(x, out)
        skips.append(skip)
    x = res(x, 256, False)[0]
    for out in (128, 128, 64, 32):
        x = up(x, skips.pop(), out)
    return net.softmax(net.conv(x, 20), 1)


@workload("rangenet_plus_plus", "RangeNet-Plus-Plus", "rangenet")
def _(net: Net) -> Value:
    """Darknet-53 on a range image; only its width is halved."""

    def residual(x: Value) -> Value:
        c = x.channels
        return net.add(net.conv(net.conv(x, c // 2, act="leaky_relu"), c, 3, act="leaky_relu"), x)

    x = net.conv(net.input(1, 5, 64, 2048), 32, 3, act="leaky_relu")
    skips = []
    for out, depth in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        skips.append(x)
        x = net.conv(x, out, 3, (1, 2), act="leaky_relu")
        for _ in range(depth):
            x = residual(x)
    for out in (512, 256, 128, 64, 32):
        n, _, h, w = x.shape
        y = net.emit(
            "conv_transpose", [x], (n, out, h, 2 * w), x.channels * out * 4, n * x.channels * h * w * out * 4,
            kernel=(1, 4), stride=(1, 2), dilation=(1, 1), groups=1, fan_in=x.channels,
        )  # fmt: skip
        x = net.add(residual(net.act(y, "leaky_relu")), skips.pop())
    return net.conv(x, 20, 3)


# --------------------------------------------------------------------------------------------------- FFNet variants


@workload("ffnet_40s", "FFNet-40S", "ffnet")
def _(net: Net) -> Value:
    return ffnet(net, (1024, 2048), (4, 5, 6, 4), "dBBB")


@workload("ffnet_78s", "FFNet-78S", "ffnet")
def _(net: Net) -> Value:
    return ffnet(net, (1024, 2048), (6, 12, 12, 8), "dBBB")


@workload("ffnet_78s_lowres", "FFNet-78S-LowRes", "ffnet")
def _(net: Net) -> Value:
    return ffnet(net, (512, 1024), (6, 12, 12, 8), "BCC")


@workload("ffnet_122ns_lowres", "FFNet-122NS-LowRes", "ffnet")
def _(net: Net) -> Value:
    return ffnet(net, (512, 1024), (16, 24, 20), "CCC")


# --------------------------------------------------------------------------------------------------- restoration


@workload("quicksrnetsmall", "QuickSRNetSmall", "quicksr")
def _(net: Net) -> Value:
    return quicksr(net, 2)


@workload("quicksrnetlarge", "QuickSRNetLarge", "quicksr")
def _(net: Net) -> Value:
    return quicksr(net, 11, 64)


def quicksr(net: Net, blocks: int, width: int = 32) -> Value:
    x = net.conv(net.input(1, 3, 128, 128), width, 3, act="clip")
    for _ in range(blocks):
        x = net.conv(x, width, 3, act="clip")
    return net.act(net.shuffle(net.conv(x, 3 * 16, 3), 4), "clip")


@workload("xlsr", "XLSR", "quicksr")
def _(net: Net) -> Value:
    image = net.input(1, 3, 128, 128)

    def block(x: Value) -> Value:
        return net.conv(net.conv(x, 32, 3, g=4, act="relu"), 32)

    x = net.conv(image, 32, 3)
    for _ in range(3):
        x = block(x)
    y = net.concat([net.conv(image, 16, 3), x])
    y = net.conv(net.conv(y, 32, act="relu"), 3 * 16, 3)
    return net.act(net.shuffle(y, 4), "clip")


def rrdb(net: Net) -> Value:
    x = first = net.conv(net.input(1, 3, 128, 128), 64, 3)
    for _ in range(23):
        outer = x
        for _ in range(3):
            parts = [x]
            for _ in range(4):
                joined = net.concat(parts) if len(parts) > 1 else x
                parts.append(net.conv(joined, 32, 3, act="leaky_relu"))
            x = net.add(net.mul(net.conv(net.concat(parts), 64, 3)), x)
        x = net.add(net.mul(x), outer)
    x = net.add(first, net.conv(x, 64, 3))
    for _ in range(2):
        x = net.conv(net.up(x, 2), 64, 3, act="leaky_relu")
    return net.conv(net.conv(x, 64, 3, act="leaky_relu"), 3, 3)


@workload("esrgan", "ESRGAN", "esrgan")
def _(net: Net) -> Value:
    return rrdb(net)


@workload("real_esrgan_x4plus", "Real-ESRGAN-x4plus", "esrgan")
def _(net: Net) -> Value:
    return rrdb(net)


@workload("srgan", "SRGAN", "srgan")
def _(net: Net) -> Value:
    x = first = net.conv(net.input(1, 3, 128, 128), 64, 9, act="prelu")
    for _ in range(16):
        x = net.add(net.conv(net.conv(x, 64, 3, act="prelu"), 64, 3), x)
    x = net.add(net.conv(x, 64, 3), first)
    for _ in range(2):
        x = net.act(net.shuffle(net.conv(x, 256, 3), 2), "prelu")
    return net.conv(x, 3, 9, act="clip")


def nafnet(
    net: Net, width: int, size: tuple[int, int], encoder: tuple[int, ...], middle: int, decoder: tuple[int, ...]
) -> Value:
    def block(x: Value) -> Value:
        c = x.channels
        y = net.dw(net.conv(net.norm(x, "channel_norm"), 2 * c), 3)
        y = net.mul(*net.split(y, 2))
        y = net.mul(y, net.conv(net.gap(y), c))
        x = net.add(x, net.mul(net.conv(y, c)))
        y = net.conv(net.norm(x, "channel_norm"), 2 * c)
        return net.add(x, net.mul(net.conv(net.mul(*net.split(y, 2)), c)))

    image = net.input(1, 3, *size)
    rows, columns = ((-n) % 2 ** len(encoder) for n in size)
    image = net.pad(image, columns, rows) if rows or columns else image
    x = net.conv(image, width, 3)
    skips = []
    for depth in encoder:
        for _ in range(depth):
            x = block(x)
        skips.append(x)
        x = net.conv(x, x.channels * 2, 2, 2, 0)
    for _ in range(middle):
        x = block(x)
    for depth in decoder:
        x = net.add(net.shuffle(net.conv(x, x.channels * 2), 2), skips.pop())
        for _ in range(depth):
            x = block(x)
    x = net.add(net.conv(x, 3, 3), image)
    return net.slice(x, 0, size[0], 2) if rows or columns else x


@workload("nafnet_denoise", "NAFNet-DeNoise", "nafnet")
def _(net: Net) -> Value:
    return nafnet(net, 64, (256, 256), (2, 2, 4, 8), 12, (2, 2, 2, 2))


@workload("nafnet_deblur", "NAFNet-DeBlur", "nafnet")
def _(net: Net) -> Value:
    return nafnet(net, 64, (360, 640), (1, 1, 1, 28), 1, (1, 1, 1, 1))


def mirrored(net: Net, x: Value, by: int = 1) -> Value:
    """A map continued by its mirror image at every edge."""
    return net.pad(x, 2 * by, 2 * by, mode="reflect")


def aot(net: Net) -> Value:
    x = net.concat([net.input(1, 3, 512, 512), net.input(1, 1, 512, 512)])
    x = net.conv(mirrored(net, x, 3), 64, 7, p=0, act="relu")
    x = net.conv(net.conv(x, 128, 4, 2, 1, act="relu"), 256, 4, 2, 1, act="relu")
    for _ in range(8):
        parts = [net.conv(mirrored(net, x, d), 64, 3, d=d, p=0, act="relu") for d in (1, 2, 4, 8)]
        y = net.conv(mirrored(net, net.concat(parts)), 256, 3, p=0)
        gate = net.conv(mirrored(net, x), 256, 3, p=0)
        centered = net.binary("sub", gate, net.gap(gate))
        deviation = net.act(net.gap(net.mul(centered, centered)), "sqrt")
        gate = net.binary("div", net.mul(centered), deviation)
        gate = net.act(net.mul(net.binary("sub", gate)), "sigmoid")
        x = net.add(net.mul(x, net.binary("sub", gate)), net.mul(y, gate))
    for out in (128, 64):
        x = net.conv(net.up(x, 2, "bilinear"), out, 3, act="relu")
    return net.act(net.conv(x, 3, 3), "tanh")


@workload("aotgan", "AOT-GAN", "inpaint")
def _(net: Net) -> Value:
    return aot(net)


@workload("lama_dilated", "LaMa-Dilated", "inpaint")
def _(net: Net) -> Value:
    """The picture outside the mask, continued by mirror images; what is painted is put under the mask. A quarter of
    the channels each is convolved with a dilation of its own, and the sum taken."""

    def conv(x: Value, out: int, k: int, s: int = 1, d: int = 1, act: str | None = "relu") -> Value:
        return net.conv(mirrored(net, x, d * (k // 2)), out, k, s, 0, d=d, act=act)

    def dilated(x: Value, act: str | None = "relu") -> Value:
        parts = [conv(part, 512, 3, d=d, act=None) for part, d in zip(net.split(x, 4), (1, 2, 4, 8), strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = net.add(total, part)
        return net.act(net.batch_norm(total), act)

    image, mask = net.input(1, 3, 512, 512), net.input(1, 1, 512, 512)
    kept = net.mul(image, net.binary("sub", mask))
    x = conv(net.concat([kept, mask]), 64, 7)
    for out in (128, 256, 512):
        x = conv(x, out, 3, 2)
    for _ in range(9):
        x = net.add(x, dilated(dilated(x), None))
    for out in (256, 128, 64):
        x = net.deconv(x, out, 3, 2, 1, "relu", 1)
    x = net.act(conv(x, 3, 7, act=None), "sigmoid")
    return net.add(net.mul(x, mask), net.mul(net.binary("sub", mask), image))


@workload("easyocr", "detector", "unet")
def _(net: Net) -> Value:
    """CRAFT on VGG-16."""
    x = net.input(1, 3, 608, 800)
    skips = []
    for widths, pool in (((64, 64), 0), ((128, 128), 1), ((256, 256, 256), 1), ((512, 512, 512), 1), ((512, 512), 1)):
        x = net.pool(x, 2, 2) if pool else x
        for width in widths:
            x = net.conv(x, width, 3, act="relu")
        skips.append(x)
    x = net.conv(net.conv(net.pool(x, 3, 1, 1), 1024, 3, d=6, act="relu"), 1024, act="relu")
    for skip, middle, out in zip(skips[:0:-1], (512, 256, 128, 64), (256, 128, 64, 32), strict=True):
        x = net.resize(x, skip.shape[2:]) if x.shape[2:] != skip.shape[2:] else x
        x = net.conv(net.conv(net.concat([x, skip]), middle, act="relu"), out, 3, act="relu")
    for out, k in ((32, 3), (32, 3), (16, 3), (16, 1)):
        x = net.conv(x, out, k, act="relu")
    return net.conv(x, 2)
