"""The recipe: every choice of a quantization, read from YAML and kept in the bundle."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field

from edgeforge.errors import InvalidInput
from edgeforge.target import Closed

_PRECISION = re.compile(r"w(?P<weights>[48])a(?P<activations>8|16)(?:-b(?P<block>16|32|64))?$")
_DYNAMIC = re.compile(r"8da4w-b(?P<block>32|64)$")

#: a8s: 8 bits with zero point 128.
Width = Literal["a8", "a16", "a8s"]


#: Values of ``Recipe.weights`` that are files in `edgeforge.quantize`, run by `quantize.layerwise`.
LAYERWISE = ("gptaq", "seqmse", "adaround")


class Precision:
    """``w{8,4}a{8,16}[-b16|32|64]``: weight bits, activation bits, and the block size of block-wise weights.

    ``8da4w-b32|64`` is ``dynamic``: linears round the floats that they read to int8, one range per token, and have
    4-bit weights with a scale per group of 32 or 64 inputs; all else is float."""

    def __init__(self, name: str):
        match, dynamic = _PRECISION.match(name), _DYNAMIC.match(name)
        found = match or dynamic
        if not found:
            raise InvalidInput(
                f"precision {name!r} is not w8a8, w8a16, w4a8, w4a16, one of these with -b16|32|64, or 8da4w-b32|64"
            )
        self.name, self.dynamic = name, match is None
        self.weights = f"i{match['weights']}" if match else "i4"
        self.activations = f"u{match['activations']}" if match else "f32"
        self.block = int(found["block"]) if found["block"] else None


def _precision(name: str) -> str:
    try:
        return Precision(name).name
    except InvalidInput as error:
        raise ValueError(str(error)) from None


def _static(name: str) -> str:
    if Precision(_precision(name)).dynamic:
        raise ValueError(f"{name} is for a whole model, not for a layer -> precision")
    return name


PrecisionName = Annotated[str, AfterValidator(_precision)]
StaticPrecision = Annotated[str, AfterValidator(_static)]


class Calibration(Closed):
    """How ranges are estimated; ``percentile`` applies to that method only. ``views``: of each image, for choosing
    weights: itself, and random parts of it (see `Dataset.with_views`)."""

    method: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"
    percentile: float = Field(99.99, gt=50, le=100)
    samples: int = Field(200, ge=1)
    views: int = Field(1, ge=1)


class Override(Closed):
    """For nodes whose name or source matches ``match`` (a glob) and whose op is ``op`` (if given): ``precision`` of
    a linear or conv (weights and input activations), ``output`` width of the node's result. Op ``input`` stands for
    the graph's inputs, which no other override touches."""

    match: str = "*"
    op: str | None = None
    precision: StaticPrecision | None = None
    output: Width | None = None


class ImageData(Closed):
    """Preprocessing of photographs: short side to ``resize`` (bilinear), center crop, x * scale + offset, NCHW."""

    kind: Literal["image"] = "image"
    resize: int = Field(256, ge=1)
    crop: int = Field(224, ge=1)
    scale: tuple[float, float, float] = (1 / 127.5,) * 3
    offset: tuple[float, float, float] = (-1.0,) * 3


class TextData(Closed):
    """Windows of ``window`` tokens (the model's fixed length) from text files, made by ``tokenizer`` (a file name
    beside the recipe)."""

    kind: Literal["text"] = "text"
    tokenizer: str = "tokenizer.json"


class Shape(Closed):
    """The static shape of a language model: positions (its cache holds them), and tokens per prefill step.
    ``prefix``: the token that begins a text, if the model has one, is cached beforehand (see `edgeforge.llm.prefix`).
    ``shared_context``: artifacts for Hexagon come a second time, both graphs in one context binary with their weights
    once; the emulator does not load that."""

    context: int = Field(512, ge=2)
    chunk: int = Field(32, ge=1)
    prefix: bool = False
    shared_context: bool = False


class Smooth(Closed):
    """`compress.smooth`: exponent ``alpha`` of all groups, None to search it per group on the ``samples`` of the
    calibration data that hold most peaks; ``pairs``: norms and the layers that read them, or all."""

    method: Literal["smooth"] = "smooth"
    alpha: float | None = Field(None, ge=0, le=1)
    pairs: Literal["norms", "all"] = "all"
    samples: int = Field(16, ge=1)


class Equalize(Closed):
    """`compress.equalize`: at most ``sweeps`` over all groups."""

    method: Literal["equalize"] = "equalize"
    sweeps: int = Field(50, ge=1)


class Rotate(Closed):
    """`compress.rotate`."""

    method: Literal["rotate"] = "rotate"
    seed: int = 0


Method = Annotated[Smooth | Equalize | Rotate, Field(discriminator="method")]


class Train(Closed):
    """`compress.train`: Adam on free scales, weight clipping, activation encodings and weights, ``steps`` of ``batch``
    samples with a cosine schedule. Learning rates: of log scales, of clipping logits, of log ranges, of weights in
    steps of their codes (0 leaves one as it is).
    ``loss``: divergence of the logits, or squared error of the last hidden state. ``blocks``: one layer of a decoder
    after another instead, each for ``steps``, on the squared error of its output. ``pairs``: scales of norms, or all.
    Stops after ``patience`` checks without gain; ``checkpoint``: a file from which a stopped run goes on."""

    steps: int = Field(400, ge=1)
    batch: int = Field(8, ge=1)
    scale_rate: float = Field(3e-3, ge=0)
    clip_rate: float = Field(1e-2, ge=0)
    range_rate: float = Field(5e-3, ge=0)
    weight_rate: float = Field(0, ge=0)
    loss: Literal["kl", "hidden"] = "kl"
    blocks: bool = False
    pairs: Literal["norms", "all"] = "all"
    check: int = Field(50, ge=1)
    patience: int = Field(4, ge=1)
    checkpoint: str | None = None
    seed: int = 0


class Bounds(Closed):
    """What `validate` demands of an artifact; None demands nothing."""

    identical: float | None = Field(None, ge=0, le=1)
    sqnr_db: float | None = None
    cosine: float | None = None
    metric_drop: float | None = Field(None, ge=0)


class Recipe(Closed):
    """Every choice of a quantization. ``compress``: methods that rewrite the float graph first, in order (see
    `edgeforge.compress`); ``train``: learns what they and the encodings leave open. ``bias_correction``: samples to
    measure the shift of means on, 0 for none (see `quantize.correct`; the LAYERWISE methods of ``weights`` have it
    built in). ``widen``: activations whose rows lose a larger share of their squares to 8 bits get 16, 0 for none (see
    `quantize.widen`). ``bounds`` is keyed by backend, ``*`` for all others."""

    precision: PrecisionName = "w8a8"
    calibration: Calibration = Calibration()
    compress: tuple[Method, ...] = ()
    train: Train | None = None
    weights: Literal["minmax", "mse", "gptq", "gptaq", "seqmse", "adaround"] = "minmax"
    bias_correction: int = Field(0, ge=0)
    widen: float = Field(0, ge=0)
    overrides: tuple[Override, ...] = ()
    language: Shape = Shape()
    data: ImageData | TextData | None = Field(None, discriminator="kind")
    metric: Literal["top1", "perplexity"] | None = None
    class_offset: int = 0
    bounds: dict[str, Bounds] = Field(default_factory=dict)

    def with_set(self, assignments: list[str]) -> Recipe:
        """A copy with ``a.b=value`` assignments applied (values are YAML). Raises InvalidInput on unknown keys."""
        raw = self.model_dump(mode="json", exclude_unset=True)
        for assignment in assignments:
            path, separator, value = assignment.partition("=")
            if not separator:
                raise InvalidInput(f"--set {assignment!r}: expected key=value")
            *parents, leaf = path.split(".")
            place = raw
            for key in parents:
                place = place.setdefault(key, {})
                if not isinstance(place, dict):
                    raise InvalidInput(f"--set {assignment!r}: {key} is not a section")
            place[leaf] = yaml.safe_load(value)
        try:
            return Recipe.model_validate(raw)
        except ValueError as error:
            raise InvalidInput(f"--set: {error}") from None
