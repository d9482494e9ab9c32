"""Calibration and evaluation data: .npz files, folders of photographs, text files, or a callable."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph
from edgeforge.ir.types import NUMPY
from edgeforge.progress import track
from edgeforge.recipe import ImageData, Recipe, TextData

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Dataset:
    """Samples loaded on demand: ``sample(i)`` gives one feed {input name: array [1, ...]}. ``labels``: int64 [N] class
    indices, or None; language models carry their labels in the ids."""

    name: str
    size: int
    sample: Callable[[int], Mapping[str, np.ndarray]]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self.size

    def head(self, count: int) -> Dataset:
        labels = None if self.labels is None else self.labels[:count]
        return Dataset(self.name, min(count, self.size), self.sample, labels)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Feeds of up to ``size`` samples, in order."""
        for start in range(0, self.size, size):
            samples = [self.sample(i) for i in range(start, min(start + size, self.size))]
            yield {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}

    def with_views(self, count: int) -> Dataset:
        """These samples, and ``count`` - 1 random views of each: a part of at least a quarter of every image
        [1, C, H, W], bilinearly brought to its size, half of them mirrored. Repeatable. Inputs of another rank
        stay as they are."""

        def sample(i: int) -> Mapping[str, np.ndarray]:
            feed = self.sample(i % self.size)
            return {name: _view(x, i) if i >= self.size and x.ndim == 4 else x for name, x in feed.items()}

        return Dataset(self.name, count * self.size, sample)

    def stacked(self) -> dict[str, np.ndarray]:
        return next(self.batches(max(self.size, 1)))


def _view(image: np.ndarray, seed: int) -> np.ndarray:
    """A random part of [1, C, H, W] in its size, perhaps mirrored (as Szegedy et al., arXiv:1409.4842, cut theirs)."""
    from torch import from_numpy
    from torch.nn.functional import interpolate

    picks, (height, width) = np.random.default_rng(seed), image.shape[2:]
    area, aspect = picks.uniform(0.25, 1), np.exp(picks.uniform(-1, 1) * np.log(4 / 3))
    rows = min(round(height * np.sqrt(area / aspect)), height)
    columns = min(round(width * np.sqrt(area * aspect)), width)
    top, left = picks.integers(0, height - rows + 1), picks.integers(0, width - columns + 1)
    part = from_numpy(image[:, :, top : top + rows, left : left + columns])
    made = interpolate(part, (height, width), mode="bilinear", antialias=True).numpy()
    return np.ascontiguousarray(made[..., ::-1]) if picks.random() < 0.5 else made


@dataclass(frozen=True)
class Batches:
    """A dataset as feeds of up to ``size`` samples that can be walked more than once."""

    data: Dataset
    size: int = 8

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return track(self.data.batches(self.size), -(-len(self.data) // self.size), "calibrating")


def load_data(source: str | Path | Mapping[str, np.ndarray], graph: Graph, recipe: Recipe, base: Path) -> Dataset:
    """The data that ``source`` names, shaped for the inputs of ``graph``.

    source: arrays by input name, a .npz, a folder of images (needs ``data: {kind: image}`` in the recipe; labels from
    a labels.csv with columns file,label in it or beside it), a .txt file (``data: {kind: text}``), or "random"
    (standard normal numbers, uniform ids). base: folder of the recipe. Raises InvalidInput naming what is missing."""
    if isinstance(source, Mapping):
        return from_arrays("arrays", source, graph)
    if source == "random":
        return _random(graph)
    path = Path(source)
    if path.is_dir():
        return _from_images(path, graph, recipe)
    if not path.is_file():
        raise InvalidInput(
            f"data {str(source)!r}: no such file or folder -> a .npz, a folder of images, a .txt, or module:callable"
        )
    if path.suffix == ".npz":
        return from_arrays(path.name, read_npz(path), graph)
    if path.suffix in (".txt", ".json"):
        return _from_text(path, graph, recipe, base)
    raise InvalidInput(f"data {path.name}: unknown kind {path.suffix!r} -> a .npz, a folder of images or a .txt")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz by name. Raises InvalidInput."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise InvalidInput(f"{path.name} is not a readable .npz of plain arrays: {error}") from None


def from_arrays(name: str, arrays: Mapping[str, np.ndarray], graph: Graph) -> Dataset:
    """Arrays [N, ...] by input name (and optionally ``labels`` [N]) as a dataset of N samples."""
    missing = [i for i in graph.inputs if i not in arrays]
    if missing:
        raise InvalidInput(f"data {name}: no array for input {', '.join(missing)} (has {', '.join(arrays) or 'none'})")
    feeds = {}
    for key in graph.inputs:
        kind, array = graph.type(key), np.asarray(arrays[key])
        if array.ndim != len(kind.shape) or array.shape[1:] != kind.shape[1:]:
            wanted = ", ".join(["N", *map(str, kind.shape[1:])])
            raise InvalidInput(f"data {name}: {key} is {array.shape}, the model takes [{wanted}]")
        if kind.dtype == "i64" and array.dtype.kind not in "iu":
            raise InvalidInput(f"data {name}: {key} holds {array.dtype}, the model takes integer ids")
        feeds[key] = array
    sizes = {len(array) for array in feeds.values()}
    if len(sizes) != 1 or not sizes.copy().pop():
        raise InvalidInput(
            f"data {name}: inputs hold {sorted(sizes)} samples -> the same number, at least one, for each"
        )
    labels = np.asarray(arrays["labels"], np.int64) if "labels" in arrays else None
    real = {key: NUMPY["i64" if graph.type(key).dtype == "i64" else "f32"] for key in feeds}

    def sample(i: int) -> dict[str, np.ndarray]:
        return {key: array[i : i + 1].astype(real[key]) for key, array in feeds.items()}

    return Dataset(name, sizes.pop(), sample, labels)


def _random(graph: Graph) -> Dataset:
    rng = np.random.default_rng(0)

    def ids(name: str) -> int:
        tables = [graph.type(n.inputs[0]).shape[0] for n in graph.users()[name] if n.op == "gather"]
        return min(tables, default=2)

    def sample(i: int) -> dict[str, np.ndarray]:
        feeds = {}
        for name in graph.inputs:
            shape = graph.type(name).shape
            if graph.type(name).dtype == "i64":
                feeds[name] = rng.integers(0, ids(name), shape, dtype=np.int64)
            else:
                feeds[name] = rng.standard_normal(shape).astype(np.float32)
        return feeds

    made = [sample(i) for i in range(8)]
    return Dataset("random", len(made), made.__getitem__)


def _only_input(graph: Graph, kind: str) -> str:
    if len(graph.inputs) != 1:
        raise InvalidInput(f"{kind} data feeds one input, the model has {', '.join(graph.inputs)} -> give a .npz")
    return graph.inputs[0]


def _from_images(folder: Path, graph: Graph, recipe: Recipe) -> Dataset:
    name, spec = _only_input(graph, "image"), recipe.data
    if not isinstance(spec, ImageData):
        raise InvalidInput(f"data {folder.name}: the recipe has no preprocessing -> add data: {{kind: image, ...}}")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES)
    if not files:
        raise InvalidInput(f"data {folder}: no images ({', '.join(IMAGES)}) in this folder")
    return images(name, files, spec, _labels(folder, files))


def images(name: str, files: list[Path], spec: ImageData, labels: np.ndarray | None) -> Dataset:
    """Photographs as samples for input ``name``."""
    return Dataset(files[0].parent.parent.name, len(files), lambda i: {name: preprocess(files[i], spec)}, labels)


def _labels(folder: Path, files: list[Path]) -> np.ndarray | None:
    table = next((f for f in (folder / "labels.csv", folder.parent / "labels.csv") if f.is_file()), None)
    if table is None:
        return None
    with table.open(newline="") as stream:
        known = {Path(row["file"]).name: int(row["label"]) for row in csv.DictReader(stream)}
    missing = [f.name for f in files if f.name not in known]
    if missing:
        raise InvalidInput(f"{table}: no label for {len(missing)} image(s), first {missing[0]}")
    return np.array([known[f.name] for f in files], np.int64)


def preprocess(file: Path, spec: ImageData) -> np.ndarray:
    """One photograph as float32 [1, 3, crop, crop]."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InvalidInput(f"image {file.name} cannot be read: {error}") from None
    ratio = spec.resize / min(rgb.size)
    if ratio != 1:
        rgb = rgb.resize((round(rgb.width * ratio), round(rgb.height * ratio)), Image.Resampling.BILINEAR)
    left, top = (rgb.width - spec.crop) // 2, (rgb.height - spec.crop) // 2
    pixels = np.asarray(rgb.crop((left, top, left + spec.crop, top + spec.crop)), np.float32)
    scaled = pixels * np.float32(spec.scale) + np.float32(spec.offset)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)


def _from_text(path: Path, graph: Graph, recipe: Recipe, base: Path) -> Dataset:
    name = _only_input(graph, "text")
    if not isinstance(recipe.data, TextData):
        raise InvalidInput(
            f"data {path.name}: the recipe has no tokenizer -> add data: {{kind: text, tokenizer: FILE}}"
        )
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"data {path.name}: {error}") from None
    ids = windows([text], load_tokenizer(base / recipe.data.tokenizer), graph.type(name).shape[1])
    if not len(ids):
        raise InvalidInput(f"data {path.name}: shorter than one window of {graph.type(name).shape[1]} tokens")
    return from_arrays(path.name, {name: ids}, graph)


def load_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer` from tokenizer.json; raises InvalidInput."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise InvalidInput(f"tokenizer {path}: no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise InvalidInput(f"tokenizer {path.name} cannot be read: {error}") from None


def bos_id(tokenizer: Any) -> int | None:
    """The id of the token that begins a text, if the vocabulary has one."""
    names = ("<s>", "<|bos|>", "<bos>", "<|begin_of_text|>", "<|endoftext|>")
    return next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)


def windows(texts: list[str], tokenizer: Any, length: int) -> np.ndarray:
    """int64 [N, length]: per text non-overlapping windows, each led by the BOS token if the tokenizer has one."""
    bos = bos_id(tokenizer)
    step = length if bos is None else length - 1
    rows = []
    for text in texts:
        ids = [i for i in tokenizer.encode(text, add_special_tokens=False).ids]
        rows += [ids[s : s + step] for s in range(0, len(ids) - step + 1, step)]
    return np.array([row if bos is None else [bos, *row] for row in rows], np.int64).reshape(-1, length)
