"""Segment anything: image encoders, mask decoders and the memory of a video. Linear layers are 1 x 1 convolutions and
every head of the decoders has projections of its own, as the exporter writes them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.workloads import workload
from benchmarks.workloads.net import Net, Value


def point(net: Net, x: Value, out: int, act: str | None = None) -> Value:
    """A linear layer of [N, H, W, C] as a convolution."""
    return net.transpose(net.conv(net.transpose(x, 0, 3, 1, 2), out, act=act), 0, 2, 3, 1)


def line(net: Net, x: Value, out: int, act: str | None = None) -> Value:
    """A linear layer of [N, T, C] as a convolution."""
    n, t, c = x.shape
    return net.reshape(point(net, net.reshape(x, n, 1, t, c), out, act), n, t, out)


def lines(net: Net, x: Value, out: int, act: str | None = None) -> Value:
    """Three layers of which the inner two have 256 channels."""
    return net.act(line(net, line(net, line(net, x, 256, "relu"), 256, "relu"), out), act)


def prompt(net: Net, points: int = 2) -> Value:
    """Points and labels, padded by one, to embeddings [1, points + 1, 256]."""
    at, labels = net.input(1, points, 2), net.input(1, points)
    at = net.pad(net.add(net.mul(at)), 0, 1)
    labels = net.reshape(net.pad(labels, 1), 1, points + 1, 1)
    angles = net.mul(net.linear(at, 128, bias=False))
    x = net.add(net.concat([net.act(angles, "sin"), net.act(angles, "cos")], -1))
    x = net.mul(x, net.act(labels, "not_equal"))
    absent = net.emit("mul", [net.act(labels, "equal")], x.shape, 256)
    return net.add(x, absent)


def embeddings(net: Net, stages: Sequence[Value]) -> list[Value]:
    """The pyramid's three finest levels, the finer two narrowed, and the coarsest with the embedding of no memory."""
    coarse, third, second, first = (net.conv(x, 256) for x in reversed(stages))
    image = net.add(third, net.up(coarse))
    return [image, net.conv(first, 32), net.conv(second, 64), net.add(image)]


def attention(net: Net, q: Value, k: Value, v: Value, width: int) -> Value:
    """Eight heads of width / 8 channels."""
    heads = []
    for _ in range(8):
        parts = (line(net, x, width // 8) for x in (q, k, v))
        heads.append(net.attend(*parts))
    return net.linear(net.concat(heads, -1), 256)


def decoder(net: Net) -> tuple[Value, Value, Value]:
    """The tokens after the two-way transformer [1, 9, 256] (object, quality, four masks, prompt), four masks
    [1, 4, 256, 256] and their qualities [1, 1, 4]."""
    image = net.add(net.input(1, 256, 64, 64))
    fine, middle = net.input(1, 32, 256, 256), net.input(1, 64, 128, 128)
    tokens = queries = net.pad(net.input(1, 3, 256), 0, 6)
    keys = net.tokens(image)
    for i in range(2):
        if i == 0:
            queries = net.norm(attention(net, queries, queries, queries, 256))
        else:
            at = net.add(queries, tokens)
            queries = net.norm(net.add(queries, attention(net, at, at, queries, 256)))
        at, where = net.add(queries, tokens), net.add(keys)
        queries = net.norm(net.add(queries, attention(net, at, where, keys, 128)))
        queries = net.norm(net.add(queries, line(net, line(net, queries, 2048, "relu"), 256)))
        at, where = net.add(queries, tokens), net.add(keys)
        keys = net.norm(net.add(keys, attention(net, where, at, queries, 128)))
    at, where = net.add(queries, tokens), net.add(keys)
    queries = net.norm(net.add(queries, attention(net, at, where, keys, 128)))
    x = net.act(net.add(net.deconv(net.image(keys, 64, 64), 64, 2, 2), middle), "gelu")
    x = net.act(net.add(net.deconv(x, 32, 2, 2), fine), "gelu")
    weights = [lines(net, net.slice(queries, i, i + 1), 32) for i in range(2, 6)]
    masks = net.matmul(net.concat(weights, 1), net.reshape(x, 1, 32, 256 * 256))
    quality = lines(net, net.slice(queries, 1, 2), 4, "sigmoid")
    return queries, net.reshape(masks, 1, 4, 256, 256), quality


@workload("sam2", "decoder", "sam")
def _(net: Net) -> list[Value]:
    _, masks, quality = decoder(net)
    return [net.slice(masks, 0, 1), net.slice(quality, 0, 1, 2)]


@workload("edgetam", "video_decoder", "sam")
def _(net: Net) -> list[Value]:
    """Where the first mask is not stable, the best of the others."""
    queries, masks, quality = decoder(net)
    mask, others = net.slice(masks, 0, 1), net.slice(masks, 1, 4)
    first, rest = net.slice(quality, 0, 1, 2), net.slice(quality, 1, 4, 2)
    index = net.reduce(rest, 2, "argmax")
    other = net.emit("gather", [others, index], mask.shape)
    best = net.emit("gather", [rest, index], first.shape)
    flat = net.reshape(mask, 1, 1, 256 * 256)
    areas = [net.reduce(net.act(flat, "greater"), 2, "reduce_sum") for _ in range(2)]
    stability = net.emit("add", [net.act(areas[1], "greater"), net.binary("div", *areas)], areas[0].shape)
    stable = net.act(stability, "greater")
    outputs = [
        net.emit("add", [net.reshape(stable, 1, 1, 1, 1), mask, other], mask.shape),
        net.emit("add", [stable, first, best], first.shape),
    ]
    score = net.slice(queries, 0, 1)
    for out, act in ((256, "relu"), (256, "relu"), (1, None)):
        score = net.linear(score, out, act)
    pointer = net.slice(queries, 2, 3)
    for act in ("relu", "relu", None):
        pointer = net.linear(pointer, 256, act)
    return [*outputs, pointer, score]


# -------------------------------------------------------------------------------------------------------------- images


@workload("edgetam", "encoder", "repvit")
def _(net: Net) -> list[Value]:
    """RepViT-M1 as it was trained, with a pyramid on its four stages."""

    def mix(x: Value) -> Value:
        return net.add(x, net.conv(net.conv(x, 2 * x.channels, act="gelu"), x.channels))

    def block(x: Value, squeezed: int = 0) -> Value:
        x = net.add(net.add(net.dw(x, 3), net.dw(x, 1)), x)
        return mix(net.se(x, squeezed) if squeezed else x)

    x = net.conv(net.conv(net.picture(1, 3, 1024, 1024), 24, 3, 2, act="gelu"), 48, 3, 2)
    stages = []
    for out, depth, squeezed in ((48, 2, 16), (96, 2, 24), (192, 14, 48), (384, 2, 96)):
        if stages:
            x = mix(net.conv(net.dw(block(x), 3, 2), out))
        for i in range(depth):
            x = block(x, 0 if i % 2 else squeezed)
        stages.append(x)
    image, first, second, without = embeddings(net, stages)
    return [image, first, second, prompt(net), without]


@workload("sam2", "encoder", "hiera")
def _(net: Net) -> list[Value]:
    """Hiera-T: attention within windows, padded to whole ones, and over the whole map in three blocks; queries are
    pooled where a stage begins."""

    def windows(x: Value, size: int) -> Value:
        _, h, w, c = x.shape
        if h % size:
            x = net.pad(x, 0, -w % size, -h % size)
        down, across = x.shape[1] // size, x.shape[2] // size
        x = net.transpose(net.reshape(x, 1, down, size, across, size, c), 0, 1, 3, 2, 4, 5)
        return net.reshape(x, down * across, size, size, c)

    def whole(x: Value, side: int) -> Value:
        _, size, _, c = x.shape
        count = -(-side // size)
        x = net.transpose(net.reshape(x, 1, count, count, size, size, c), 0, 1, 3, 2, 4, 5)
        x = net.reshape(x, 1, count * size, count * size, c)
        return net.slice(net.slice(x, 0, side, 1), 0, side, 2) if count * size > side else x

    def pooled(x: Value) -> Value:
        return net.transpose(net.pool(net.transpose(x, 0, 3, 1, 2), 2, 2), 0, 2, 3, 1)

    def block(x: Value, out: int, heads: int, window: int) -> Value:
        side, grows = x.shape[1], x.shape[-1] != out
        y = net.norm(x)
        came = pooled(net.linear(y, out)) if grows else x
        y = windows(y, window) if window else y
        q, k, v = (point(net, y, out) for _ in range(3))
        q = pooled(q) if grows else q
        n, size = q.shape[:2]
        parts = [
            net.reshape(
                net.transpose(net.reshape(z, n, z.shape[1] ** 2, heads, out // heads), 0, 2, 1, 3), n * heads, -1,
                out // heads,
            )
            for z in (q, k, v)
        ]  # fmt: skip
        y = net.reshape(net.attend(*parts), n, heads, size * size, out // heads)
        y = point(net, net.reshape(net.transpose(y, 0, 2, 1, 3), n, size, size, out), out)
        x = net.add(came, whole(y, side // 2 if grows else side) if window else y)
        return net.add(x, point(net, point(net, net.norm(x), 4 * out, "gelu"), out))

    x = net.conv(net.picture(1, 3, 1024, 1024), 96, 7, 4, 3)
    x = net.add(net.transpose(x, 0, 2, 3, 1))
    stages, number = [], 0
    for i, (depth, window) in enumerate(((1, 8), (2, 4), (7, 14), (2, 7))):
        for j in range(depth):
            entered = (8, 8, 4, 14)[i] if j == 0 else window
            x = block(x, 96 * 2**i, 2**i, 0 if number in (5, 7, 9) else entered)
            number += 1
        stages.append(net.transpose(x, 0, 3, 1, 2))
    image, first, second, without = embeddings(net, stages)
    return [image, first, second, prompt(net), without]


# -------------------------------------------------------------------------------------------------------------- memory


@workload("edgetam", "memory_encoder", "sam")
def _(net: Net) -> Value:
    """A mask and the image's features to 512 latents: 256 of the whole map and one per window of 4 x 4."""

    def channel_norm(x: Value) -> Value:
        """Written out, over the channels."""
        centered = net.emit("sub", [x, net.reduce(x, 1)], x.shape)
        variance = net.reduce(net.mul(centered, centered), 1)
        return net.add(net.mul(net.binary("div", centered, net.act(net.add(variance), "sqrt"))))

    features, x = net.input(1, 256, 64, 64), net.add(net.mul(net.input(1, 1, 1024, 1024)))
    for out in (4, 16, 64, 256):
        x = net.act(channel_norm(net.conv(x, out, 3, 2)), "gelu")
    x = net.add(net.conv(features, 256), net.conv(x, 256))
    for _ in range(2):
        y = net.transpose(channel_norm(net.dw(x, 7)), 0, 2, 3, 1)
        y = net.mul(net.linear(net.linear(y, 1024, "gelu"), 256))
        x = net.add(x, net.transpose(y, 0, 3, 1, 2))
    x = net.transpose(net.conv(x, 64), 0, 2, 3, 1)

    def attend(latents: Value, x: Value, placed: bool) -> Value:
        q = net.linear(latents, 64, bias=False)
        k, v = net.split(net.linear(x, 128, bias=False), 2, -1)
        k, v = (net.add(k), net.add(v)) if placed else (k, v)
        return net.linear(net.attend(q, k, v), 64, bias=False)

    def feed(x: Value) -> Value:
        y = net.linear(net.linear(net.norm(x), 256, "gelu", bias=False), 64, bias=False)
        return net.add(y, x)

    def resample(latents: Value, x: Value, placed: bool) -> Value:
        for _ in range(2):
            latents = feed(net.add(attend(net.norm(latents), net.norm(x), placed), latents))
            y = net.norm(latents)
            latents = feed(net.add(attend(y, y, False), latents))
        return latents

    tokens = net.reshape(x, 1, 4096, 64)
    windows = net.transpose(net.reshape(x, 1, 16, 4, 16, 4, 64), 0, 1, 3, 2, 4, 5)
    windows = net.reshape(windows, 256, 16, 64)
    found = []
    for x, n, t in ((tokens, 1, 256), (windows, 256, 1)):
        start = net.emit("expand", [], (n, t, 64), n * t * 64)
        found.append(net.norm(net.reshape(resample(start, x, n == 1), 1, 256, 64)))
    return net.concat(found, 1)
