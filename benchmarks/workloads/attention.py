"""Transformers for images and text, and convolutional nets of their generation."""

from __future__ import annotations

from benchmarks.workloads import workload
from benchmarks.workloads.classify import classifier, inverted, resnet50
from benchmarks.workloads.net import Net, Value


def encoder(
    net: Net, x: Value, layers: int, heads: int, hidden: int, act: str = "gelu", before: bool = True,
    bias: bool = False, scaled: bool = False,
) -> Value:  # fmt: skip
    """Transformer encoder; before: norms precede the blocks. bias: an addend on the attention scores (a mask, relative
    positions). scaled: a layer scale after each block."""
    for _ in range(layers):
        y = net.attention(net.norm(x) if before else x, heads, bias=bias)
        y = net.mul(y) if scaled else y
        x = net.add(x, y) if before else net.norm(net.add(x, y))
        y = net.mlp(net.norm(x) if before else x, hidden, act)
        y = net.mul(y) if scaled else y
        x = net.add(x, y) if before else net.norm(net.add(x, y))
    return x


def patches(net: Net, x: Value, width: int, size: int, cls: int = 1, positions: bool = True) -> Value:
    x = net.tokens(net.conv(x, width, size, size, 0))
    x = net.pad(x, 0, cls) if cls else x
    return net.add(x) if positions else x


@workload("vit", "VIT", "vit")
def _(net: Net) -> Value:
    """Torchvision's: queries, keys and values are one projection, whose three parts are brought to the front."""
    x = patches(net, net.picture(1, 3, 224, 224), 768, 16)
    for _ in range(12):
        y = net.reshape(net.linear(net.norm(x), 3 * 768), 1, 197, 3, 768)
        y = net.transpose(y, 2, 1, 0, 3)
        parts = [net.reshape(part, 1, 197, 768) for part in net.split(y, 3, 0)]
        y = net.transpose(net.attend(*(net.heads(part, 12) for part in parts)), 0, 2, 1, 3)
        x = net.add(x, net.linear(net.reshape(y, 1, 197, 768), 768))
        x = net.add(x, net.mlp(net.norm(x), 3072))
    return net.linear(net.slice(net.norm(x), 0, 1), 1000)


@workload("beit", "Beit", "vit")
def _(net: Net) -> Value:
    x = patches(net, net.picture(1, 3, 224, 224), 768, 16, positions=False)
    x = encoder(net, x, 12, 12, 3072, bias=True, scaled=True)
    return net.linear(net.norm(net.reduce(x, 1)), 1000)


@workload("video_mae", "Video-MAE", "vit")
def _(net: Net) -> Value:
    x = net.conv(net.picture(1, 3, 16, 224, 224), 768, (2, 16, 16), (2, 16, 16), (0, 0, 0))
    x = net.add(net.transpose(net.reshape(x, 1, 768, -1), 0, 2, 1))
    x = encoder(net, x, 12, 12, 3072)
    return net.linear(net.norm(net.reduce(x, 1)), 400)


@workload("siglip2", "image_encoder", "vit")
def _(net: Net) -> Value:
    x = encoder(net, patches(net, net.picture(1, 3, 224, 224), 768, 16, 0), 12, 12, 3072)
    x = net.norm(x)
    probe = net.slice(x, 0, 1)
    y = net.attention(probe, 12, x)
    return net.norm(net.add(y, net.mlp(net.norm(y), 3072)), "l2_norm")


@workload("siglip2", "text_encoder", "bert")
def _(net: Net) -> Value:
    x = net.add(net.embedding(net.input(1, 64), 256000, 768))
    x = net.norm(encoder(net, x, 12, 12, 3072, bias=True))
    return net.norm(net.linear(net.slice(x, 63, 64), 768), "l2_norm")


def dpt(net: Net, tokens: list[Value], side: int, widths: tuple[int, ...], fused: int) -> Value:
    """Dense prediction head of Depth Anything: four token maps are reassembled and fused."""
    maps = []
    for i, (x, width) in enumerate(zip(tokens, widths, strict=True)):
        x = net.conv(net.image(net.slice(x, 1, x.shape[1]), side, side), width)
        if i < 2:
            x = net.deconv(x, width, 4 >> i, 4 >> i)
        elif i == 3:
            x = net.conv(x, width, 3, 2)
        maps.append(net.conv(x, fused, 3, bias=False))

    def residual(x: Value) -> Value:
        return net.add(net.conv(net.act(net.conv(net.act(x, "relu"), fused, 3), "relu"), fused, 3), x)

    x = None
    for i in (3, 2, 1, 0):
        x = maps[i] if x is None else net.add(x, residual(maps[i]))
        x = residual(x)
        size = maps[i - 1].shape[2:] if i else tuple(2 * n for n in x.shape[2:])
        x = net.conv(net.resize(x, size), fused)
    x = net.resize(net.conv(x, fused // 2, 3), (side * 14, side * 14))
    return net.conv(net.conv(x, 32, 3, act="relu"), 1, act="relu")


def depth(net: Net) -> Value:
    x = patches(net, net.picture(1, 3, 518, 518), 384, 14)
    taken = []
    for _ in range(4):
        x = encoder(net, x, 3, 6, 1536, scaled=True)
        taken.append(net.norm(x))
    return dpt(net, taken, 37, (48, 96, 192, 384), 64)


@workload("depth_anything", "Depth-Anything", "depth")
def _(net: Net) -> Value:
    return depth(net)


@workload("depth_anything_v2", "Depth-Anything-V2", "depth")
def _(net: Net) -> Value:
    return depth(net)


# ------------------------------------------------------------------------------------------------------------- text


def bert(
    net: Net, length: int, layers: int, heads: int, width: int, hidden: int, vocab: int, act: str = "gelu"
) -> Value:
    x = net.norm(net.add(net.embedding(net.input(1, length), vocab, width)))
    return encoder(net, x, layers, heads, hidden, act, before=False, bias=True)


def masked(net: Net, x: Value, width: int, vocab: int) -> Value:
    """Head of a masked language model: logits of every position, of which the best at one is returned."""
    return best(net, net.linear(net.norm(net.linear(x, width, "gelu")), vocab))


def best(net: Net, logits: Value) -> Value:
    at = net.emit("gather", [logits, net.input(1)], (1, logits.shape[-1]))
    return net.reduce(at, 1, "argmax")


@workload("bert_base_uncased_hf", "Bert-Base-Uncased-Hf", "bert")
def _(net: Net) -> Value:
    return masked(net, bert(net, 384, 12, 12, 768, 3072, 30522), 768, 30522)


@workload("distil_bert_base_uncased_hf", "Distil-Bert-Base-Uncased-Hf", "bert")
def _(net: Net) -> Value:
    return masked(net, bert(net, 384, 6, 12, 768, 3072, 30522), 768, 30522)


@workload("albert_base_v2_hf", "Albert-Base-V2-Hf", "bert")
def _(net: Net) -> Value:
    x = net.norm(net.add(net.embedding(net.input(1, 384), 30000, 128)))
    x = encoder(net, net.linear(x, 768), 12, 12, 3072, before=False, bias=True)
    return masked(net, x, 128, 30000)


@workload("minilm_v2", "MiniLM-v2", "bert")
def _(net: Net) -> Value:
    return net.reduce(bert(net, 128, 6, 12, 384, 1536, 30522), 1)


@workload("nomic_embed_text", "Nomic-Embed-Text", "bert")
def _(net: Net) -> Value:
    """Queries, keys and values are stacked again after two of them were rotated."""

    def parts(x: Value) -> list[Value]:
        return [net.reshape(part, 1, 128, 12, 64) for part in net.split(x, 3, 2)]

    x = net.norm(net.add(net.embedding(net.input(1, 128), 30528, 768)))
    for _ in range(12):
        q, k, v = parts(net.reshape(net.linear(x, 2304, bias=False), 1, 128, 3, 12, 64))
        stacked = [net.reshape(part, 1, 128, 1, 12, 64) for part in (rotary(net, q), rotary(net, k), v)]
        q, k, v = (net.transpose(part, 0, 2, 1, 3) for part in parts(net.concat(stacked, 2)))
        y = net.reshape(net.transpose(net.attend(q, k, v, True), 0, 2, 1, 3), 1, 128, 768)
        x = net.norm(net.add(x, net.linear(y, 768, bias=False)))
        y = net.mul(net.linear(x, 3072, bias=False), net.linear(x, 3072, "silu", bias=False))
        x = net.norm(net.add(x, net.linear(y, 768, bias=False)))
    return net.reduce(x, 1)


def rotary(net: Net, x: Value) -> Value:
    half = x.shape[-1] // 2
    a, b = net.slice(x, 0, half, -1), net.slice(x, half, 2 * half, -1)
    turned = net.concat([net.emit("neg", [b], b.shape), a], -1)
    return net.add(net.mul(x), net.mul(turned))


@workload("yolo_world", "text_encoder", "bert")
def _(net: Net) -> Value:
    """CLIP's text transformer for 80 names of 77 tokens, of which the last counts."""
    x = net.add(net.embedding(net.input(80, 77), 49408, 512))
    for _ in range(12):
        x = net.add(x, net.attention(net.norm(x), 8, bias=True))
        y = net.linear(net.norm(x), 2048)
        x = net.add(x, net.linear(net.mul(y, net.act(net.mul(y), "sigmoid")), 512))
    x = net.reshape(net.norm(x), 80, 77, 512)
    x = net.linear(net.emit("gather", [x], (80, 512)), 512, bias=False)
    return net.reshape(net.norm(x, "l2_norm"), 1, 80, 512)


@workload("mobile_bert_uncased_google", "Mobile-Bert-Uncased-Google", "bert")
def _(net: Net) -> Value:
    affine = net.batch_norm
    x = net.embedding(net.input(1, 384), 30522, 128)
    x = affine(net.add(net.linear(net.concat([net.pad(x, 0, 0), x, x], -1), 512)))
    for _ in range(24):
        low, shared = affine(net.linear(x, 128)), affine(net.linear(x, 128))
        q, k, v = (net.heads(net.linear(y, 128), 4) for y in (shared, shared, x))
        y = net.reshape(net.transpose(net.attend(q, k, v, True), 0, 2, 1, 3), 1, 384, 128)
        y = affine(net.add(net.linear(y, 128), low))
        for _ in range(4):
            y = affine(net.add(net.linear(net.linear(y, 512, "relu"), 128), y))
        x = affine(net.add(net.linear(y, 512), x))
    return best(net, net.linear(net.norm(net.linear(x, 512, "relu")), 30522))


# ------------------------------------------------------------------------------------------------------ hierarchical


def swin(
    net: Net, width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, second: bool, size: int = 224
) -> Value:
    """Windows as a batch dimension; every other block rolls the map (a slice and a concat per axis). Where maps
    merge, and for queries, keys and values of the first version, linear layers are exported in parts of at most 512
    channels."""
    x = net.conv(net.picture(1, 3, size, size), width, 4, 4, 0)
    side = x.shape[2]
    x = net.norm(net.tokens(x))

    def roll(x: Value) -> Value:
        for axis in (1, 2):
            x = net.concat([net.slice(x, 3, x.shape[axis], axis), net.slice(x, 0, 3, axis)], axis)
        return x

    def parted(x: Value, out: int, bias: bool = True) -> Value:
        found, count = [], -(-x.shape[-1] // 512)
        pieces = net.split(x, count, -1) if count > 1 else [x]
        for start in range(0, out, 512):
            width = min(512, out - start)
            total = net.linear(pieces[0], width, bias=bias)
            for piece in pieces[1:]:
                total = net.add(total, net.linear(piece, width, bias=False))
            found.append(total)
        return net.concat(found, -1) if len(found) > 1 else found[0]

    def unit(x: Value) -> Value:
        length = net.act(net.reduce(net.mul(x, x), 3, "reduce_sum"), "sqrt")
        return net.binary("div", x, net.act(length, "clip"))

    def block(x: Value, head: int, shift: bool) -> Value:
        c, came = x.shape[-1], x
        y = net.reshape(x if second else net.norm(x), 1, side, side, c)
        y = roll(y) if shift else y
        count = side // window
        y = net.transpose(net.reshape(y, count, window, count, window, c), 0, 2, 1, 3, 4)
        y = net.reshape(y, count * count, window * window, c)
        three = net.split(net.linear(y, 3 * c), 3, -1) if second else [parted(y, c) for _ in range(3)]
        q, k, v = (net.heads(part, head) for part in three)
        q, k = (unit(q), unit(k)) if second else (net.mul(q), k)
        a = net.matmul(q, net.transpose(k, 0, 1, 3, 2))
        a = net.add(net.mul(a) if second else a)
        if shift:
            flat = net.reshape(a, 1, count * count, head, window**4)
            a = net.reshape(net.add(flat), *a.shape)
        a = net.matmul(net.softmax(a), v)
        a = net.reshape(net.transpose(a, 0, 2, 1, 3), count * count, window * window, c)
        a = net.linear(a, c)
        a = net.transpose(net.reshape(a, count, count, window, window, c), 0, 2, 1, 3, 4)
        a = net.reshape(a, 1, side, side, c)
        a = net.reshape(roll(a) if shift else a, 1, side * side, c)
        x = net.add(came, net.norm(a) if second else a)
        if second:
            return net.add(x, net.norm(net.mlp(x, 4 * c)))
        return net.add(x, net.mlp(net.norm(x), 4 * c))

    for i, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        if i:
            c = x.shape[-1]
            y = net.reshape(x, 1, side, side, c)
            y = net.emit("space_to_depth", [y], (1, side // 2, side // 2, 4 * c))
            side //= 2
            y = net.reshape(y, 1, side * side, 4 * c)
            x = net.norm(parted(y, 2 * c, False)) if second else parted(net.norm(y), 2 * c, False)
        for j in range(depth):
            x = block(x, head, bool(j % 2) and side > window)
    return net.linear(net.reduce(net.norm(x), 1), 1000)


@workload("swin_tiny", "Swin-Tiny", "swin")
def _(net: Net) -> Value:
    return swin(net, 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, False)


@workload("swin_base", "Swin-Base", "swin")
def _(net: Net) -> Value:
    return swin(net, 128, (2, 2, 18, 2), (4, 8, 16, 32), 7, False)


@workload("swinv2_base", "SwinV2-Base", "swin")
def _(net: Net) -> Value:
    return swin(net, 128, (2, 2, 18, 2), (4, 8, 16, 32), 8, True, 256)


def convnext(net: Net, v2: bool) -> Value:
    x = net.norm(net.conv(net.picture(1, 3, 224, 224), 128, 4, 4, 0), "channel_norm")
    for i, depth in enumerate((3, 3, 27, 3)):
        if i:
            x = net.conv(net.norm(x, "channel_norm"), x.channels * 2, 2, 2, 0)
        for _ in range(depth):
            c = x.channels
            y = net.transpose(net.dw(x, 7), 0, 2, 3, 1)
            y = net.linear(net.norm(y), 4 * c, "gelu")
            if v2:
                total = net.reduce(net.reduce(net.mul(y, y), 1, "reduce_sum"), 2, "reduce_sum")
                total = net.act(total, "sqrt")
                response = net.binary("div", total, net.add(net.reduce(total, 3)))
                y = net.add(net.add(net.mul(net.mul(y, response))), y)
            y = net.linear(y, c)
            y = y if v2 else net.mul(y)
            x = net.add(net.transpose(y, 0, 3, 1, 2), x)
    x = net.norm(net.reshape(net.gap(x), 1, -1))
    return net.linear(x, 1000)


@workload("convnext_base", "ConvNext-Base", "convnext")
def _(net: Net) -> Value:
    return convnext(net, False)


@workload("convnext_v2_base", "ConvNextV2-Base", "convnext")
def _(net: Net) -> Value:
    return convnext(net, True)


# -------------------------------------------------------------------------------------------------------------- DETR


def detr(net: Net, depths: tuple[int, ...], dilate: int, conditional: bool = False) -> list[Value]:
    x = resnet50(net, net.picture(1, 3, 640, 640), depths, dilate=dilate)[-1]
    x = net.tokens(net.conv(x, 256))
    queries = 300 if conditional else 100

    def attention(q: Value, k: Value, v: Value) -> Value:
        heads = [net.heads(net.linear(y, 256), 8) for y in (q, k, v)]
        y = net.transpose(net.attend(*heads, bias=not conditional), 0, 2, 1, 3)
        return net.linear(net.reshape(y, 1, q.shape[1], 256), 256)

    for _ in range(6):
        at = net.add(x)
        x = net.norm(net.add(x, attention(at, at, x)))
        x = net.norm(net.add(x, net.mlp(x, 2048, "relu")))
    memory, placed = x, net.add(x)
    y = net.slice(net.pad(net.slice(x, 0, 1), 0, queries - 1), 0, queries)
    for _ in range(6):
        at = net.add(y)
        y = net.norm(net.add(y, attention(at, at, y)))
        if conditional:
            at = net.concat([net.linear(y, 256), net.mul(net.mlp(y, 256, "relu"))], -1)
            q = net.heads(at, 8)
            k = net.heads(net.concat([net.linear(memory, 256), net.linear(memory, 256)], -1), 8)
            v = net.heads(net.linear(memory, 256), 8)
            a = net.reshape(net.transpose(net.attend(q, k, v), 0, 2, 1, 3), 1, queries, 256)
            y = net.norm(net.add(y, net.linear(a, 256)))
        else:
            y = net.norm(net.add(y, attention(net.add(y), placed, memory)))
        y = net.norm(net.add(y, net.mlp(y, 2048, "relu")))
    y = net.norm(y)
    boxes = net.linear(net.linear(net.linear(y, 256, "relu"), 256, "relu"), 4, "sigmoid")
    return [net.linear(y, 91 if conditional else 92), boxes]


@workload("detr_resnet50", "DETR-ResNet50", "detr")
def _(net: Net) -> list[Value]:
    return detr(net, (3, 4, 6, 3), 0)


@workload("detr_resnet101", "DETR-ResNet101", "detr")
def _(net: Net) -> list[Value]:
    return detr(net, (3, 4, 23, 3), 0)


@workload("detr_resnet50_dc5", "DETR-ResNet50-DC5", "detr")
def _(net: Net) -> list[Value]:
    return detr(net, (3, 4, 6, 3), 1)


@workload("detr_resnet101_dc5", "DETR-ResNet101-DC5", "detr")
def _(net: Net) -> list[Value]:
    return detr(net, (3, 4, 23, 3), 1)


@workload("conditional_detr_resnet50", "Conditional-DETR-ResNet50", "detr")
def _(net: Net) -> list[Value]:
    return detr(net, (3, 4, 6, 3), 0, True)


# ------------------------------------------------------------------------------------------------------------ hybrids


@workload("mobile_vit", "Mobile-VIT", "mobilevit")
def _(net: Net) -> Value:
    x = net.conv(net.flip(net.input(1, 3, 256, 256), 1), 16, 3, 2, act="silu")
    x = inverted(net, x, 32, 3, 1, 64, "silu")
    for j in range(3):
        x = inverted(net, x, 64, 3, 2 if j == 0 else 1, x.channels * 4, "silu")
    for out, width, layers in ((96, 144, 2), (128, 192, 4), (160, 240, 3)):
        x = came = inverted(net, x, out, 3, 2, x.channels * 4, "silu")
        h, w = x.shape[2:]
        y = net.conv(net.conv(x, out, 3, act="silu"), width)
        y = net.transpose(net.reshape(y, width * h // 2, 2, w // 2, 2), 0, 2, 1, 3)
        y = net.transpose(net.reshape(y, 1, width, h * w // 4, 4), 0, 3, 2, 1)
        y = net.norm(encoder(net, net.reshape(y, 4, h * w // 4, width), layers, 4, width * 2, "silu"))
        y = net.transpose(net.reshape(y, 1, 4, h * w // 4, width), 0, 3, 2, 1)
        y = net.transpose(net.reshape(y, width * h // 2, w // 2, 2, 2), 0, 2, 1, 3)
        y = net.conv(net.reshape(y, 1, width, h, w), out, act="silu")
        x = net.conv(net.concat([came, y]), out, 3, act="silu")
    return classifier(net, net.conv(x, 640, act="silu"))


@workload("efficientformer", "EfficientFormer", "efficientformer")
def _(net: Net) -> Value:
    x = net.conv(net.conv(net.picture(1, 3, 224, 224), 24, 3, 2, act="relu"), 48, 3, 2, act="relu")
    for i, (width, depth) in enumerate(((48, 3), (96, 2), (224, 6), (448, 4))):
        x = net.conv(x, width, 3, 2) if i else x
        for j in range(depth):
            if i == 3 and j == 3:
                break
            pooled = net.binary("sub", net.pool(x, 3, 1, 1, "avg_pool"), x)
            x = net.add(x, net.mul(pooled))
            x = net.add(x, net.mul(net.conv(net.conv(x, 4 * width, act="gelu"), width)))
    x = net.tokens(x)
    y = net.linear(net.norm(x), 8 * (32 + 32 + 128))
    y = net.transpose(net.reshape(y, 1, 49, 8, 192), 0, 2, 1, 3)
    q, k, v = net.slice(y, 0, 32, -1), net.slice(y, 32, 64, -1), net.slice(y, 64, 192, -1)
    y = net.reshape(net.transpose(net.attend(q, k, v, True), 0, 2, 1, 3), 1, 49, 1024)
    x = net.add(x, net.mul(net.linear(y, 448)))
    x = net.add(x, net.mul(net.mlp(net.norm(x), 1792)))
    x = net.norm(x)
    heads = [net.linear(net.reduce(x, 1), 1000) for _ in range(2)]
    return net.mul(net.add(*heads))


def linear_attention(net: Net, x: Value, dim: int, expand: int, kernel: bool = True) -> Value:
    """EfficientViT's multi-scale linear attention and its inverted convolution."""
    c, h, w = x.channels, *x.shape[2:]
    heads = c // dim
    qkv = net.conv(x, 3 * c)
    multi = net.conv(net.dw(qkv, 5), 3 * c, g=3 * heads)
    qkv = net.concat([qkv, multi])
    y = net.transpose(net.reshape(qkv, 1, 2 * heads, 3 * dim, h * w), 0, 1, 3, 2)
    q, k, v = (net.slice(y, i * dim, (i + 1) * dim, -1) for i in range(3))
    q, k = net.act(q, "relu"), net.act(k, "relu")
    v = net.pad(v, 1)
    kv = net.matmul(net.transpose(k, 0, 1, 3, 2), v)
    y = net.matmul(q, kv)
    y = net.binary("div", net.slice(y, 0, dim, -1), net.act(net.slice(y, dim, dim + 1, -1), "clip"))
    y = net.reshape(net.transpose(y, 0, 1, 3, 2), 1, 2 * c, h, w)
    x = net.add(x, net.conv(y, c))
    hidden, act = c * expand, "hardswish" if expand == 4 else "gelu"
    return net.add(x, net.conv(net.dw(net.conv(x, hidden, act=act), 3, 1, act), c))


@workload("efficientvit_b2_cls", "EfficientViT-b2-cls", "efficientvit")
def _(net: Net) -> Value:
    act = "hardswish"
    x = net.conv(net.picture(1, 3, 224, 224), 24, 3, 2, act=act)
    x = net.add(x, net.conv(net.dw(x, 3, 1, act), 24))
    for i, (width, depth) in enumerate(((48, 3), (96, 4), (192, 4), (384, 6))):
        x = net.conv(net.dw(net.conv(x, x.channels * 4, act=act), 3, 2, act), width)
        for _ in range(depth - (i < 2)):
            x = inverted(net, x, width, 3, 1, width * 4, act) if i < 2 else linear_attention(net, x, 32, 4)
    x = net.reshape(net.gap(net.conv(x, 2304, act=act)), 1, -1)
    return net.linear(net.act(net.norm(net.linear(x, 2560)), act), 1000)


@workload("efficientvit_l2_cls", "EfficientViT-l2-cls", "efficientvit")
def _(net: Net) -> Value:
    act = "gelu"
    x = net.conv(net.picture(1, 3, 384, 384), 32, 3, 2, act=act)
    x = net.add(x, net.conv(net.conv(x, 32, 3, act=act), 32, 3))
    for i, (width, depth) in enumerate(((64, 2), (128, 2), (256, 8), (512, 8))):
        if i < 2:
            x = net.conv(net.conv(x, x.channels * 16, 3, 2, act=act), width)
        else:
            x = net.conv(net.dw(net.conv(x, x.channels * 24, act=act), 3, 2, act), width)
        for _ in range(depth):
            if i < 2:
                x = net.add(x, net.conv(net.conv(x, width * 4, 3, act=act), width))
            elif i == 2:
                x = inverted(net, x, width, 3, 1, width * 4, act)
            else:
                x = linear_attention(net, x, 32, 6)
    x = net.reshape(net.gap(net.conv(x, 3072, act=act)), 1, -1)
    return net.linear(net.act(net.norm(net.linear(x, 3200)), act), 1000)


@workload("distil_whisper", "encoder", "whisper")
def _(net: Net) -> list[Value]:
    """distil-small.en: the encoder of whisper-small, and per decoder layer the cross-attention keys and values. Linear
    layers are 1 x 1 convolutions, and every head has projections of its own, as they are exported."""

    def head(x: Value) -> Value:
        q, k, v = (net.conv(x, 64) for _ in range(3))
        return net.attend(*(net.transpose(part, 0, 2, 3, 1) for part in (q, k, v)), scale=False)

    def first(x: Value) -> Value:
        return net.transpose(x, 0, 3, 1, 2)

    def last(x: Value) -> Value:
        return net.transpose(x, 0, 2, 3, 1)

    x = net.reshape(net.input(1, 80, 3000), 1, 80, 1, 3000)
    x = net.conv(net.conv(x, 768, (1, 3), 1, act="gelu"), 768, (1, 3), (1, 2), act="gelu")
    x = net.add(last(x))
    for _ in range(12):
        y = first(net.norm(x))
        y = net.conv(first(net.concat([head(y) for _ in range(12)], -1)), 768)
        x = net.add(x, last(y))
        x = net.add(x, last(net.conv(net.conv(first(net.norm(x)), 3072, act="gelu"), 768)))
    x = first(net.norm(x))
    return [net.concat([net.conv(x, 64) for _ in range(12)], 0) for _ in range(8)]
