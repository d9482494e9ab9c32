"""The bundle: a folder with everything a phone or a colleague needs, hashed, written atomically."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError

import edgeforge.ops  # noqa: F401 (registers the op table)
from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph
from edgeforge.ir.text import parse_graph, print_graph, tensors
from edgeforge.ir.types import TensorType
from edgeforge.ir.verify import verify
from edgeforge.recipe import Recipe
from edgeforge.target import Closed, Target, read_yaml

SCHEMA = 1
MANIFEST = "manifest.json"
#: Bytes of a file whose hash is remembered, by device, inode, size and time stamp.
LARGE = 1 << 24
_hashes: dict[tuple[int, ...], str] = {}
#: What `write_core` writes.
CORE = ("graph.txt", "prefill.txt", "graph.safetensors", "golden.safetensors", "recipe.yaml", "target.yaml")
TOOLS = ("numpy", "torch", "onnx", "onnxruntime", "onnxruntime-qnn", "executorch", "torchao", "tosa-tools")


class Port(Closed):
    """One input or output: codes of ``dtype``; real = scale * (code - zero_point); ids have no encoding."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None


class EditRecord(Closed):
    where: str
    what: str
    why: str


class BackendRecord(Closed):
    """What became of one backend: built with these files, or skipped for this reason."""

    status: Literal["built", "skipped"]
    reason: str = ""
    files: tuple[str, ...] = ()
    options: dict[str, str] = Field(default_factory=dict)
    edits: tuple[EditRecord, ...] = ()
    islands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    deterministic: bool = True


class FigureRecord(Closed):
    """A number about the bundle, its kind, and where it comes from."""

    name: str
    value: float
    unit: str
    kind: Literal["measured", "emulated", "simulated", "estimated", "counted"]
    source: str


class LanguageRecord(Closed):
    """What a runner of a language model must know. The bundle's own graph is "decode" (one token); "prefill" takes
    ``chunk`` tokens. windows: of the mask inputs, None for all positions. prefix: the file that holds ``bos`` in the
    cache and the logits behind it, where no graph computes that token: a text's second token, at position 1, is the
    first that is fed. prompt, greedy: a golden generation, the token ids that the simulator's integers give behind the
    prompt, always taking the likeliest."""

    context: int
    chunk: int
    windows: tuple[int | None, ...]
    bos: int | None
    prefix: str | None = None
    stop: tuple[int, ...]
    tokenizer: str
    chat_template: str | None
    prompt: tuple[int, ...]
    greedy: tuple[int, ...]
    prefill_hash: str
    prefill_inputs: tuple[Port, ...]
    prefill_outputs: tuple[Port, ...]


class Manifest(Closed):
    """manifest.json. ``calibrated`` is False when ranges came from random data. ``exceptions`` lists every activation
    whose width is not the precision's. ``notes`` say which rounding rules were measured, and how."""

    schema_version: Literal[1] = SCHEMA
    edgeforge: str
    model: str
    target: str
    precision: str
    calibrated: bool
    calibration: str
    graph_hash: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    exceptions: dict[str, str]
    notes: tuple[str, ...] = ()
    language: LanguageRecord | None = None
    backends: dict[str, BackendRecord]
    figures: tuple[FigureRecord, ...]
    tools: dict[str, str]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, verified. ``golden``: per input ``input/<name>`` codes and ``real/<name>`` values, per
    output ``float/<name>`` (float model) and ``output/<name>`` (the simulator's integers). part, prefill: of a language
    model, see `parts`."""

    path: Path
    manifest: Manifest
    graph: Graph
    recipe: Recipe
    target: Target
    golden: Mapping[str, np.ndarray]
    part: str = ""
    prefill: Bundle | None = None

    @property
    def parts(self) -> tuple[Bundle, ...]:
        """The bundle's graphs, each as a bundle: itself, or of a language model "prefill" and "decode"."""
        return (self,) if self.prefill is None else (self.prefill, self)

    def golden_part(self, part: str) -> dict[str, np.ndarray]:
        return {key.split("/", 1)[1]: array for key, array in self.golden.items() if key.startswith(f"{part}/")}

    def artifact(self, backend: str) -> Path:
        return self.path / "artifacts" / backend / self.part


def port(name: str, kind: TensorType) -> Port:
    if kind.q is None:
        return Port(name=name, shape=kind.shape, dtype=kind.dtype)
    return Port(name=name, shape=kind.shape, dtype=kind.dtype, scale=float(kind.q.scale), zero_point=kind.q.zero)


def tool_versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_hash(path: Path) -> str:
    """sha256; a large file is read once, as long as its time stamp stays."""
    status = path.stat()
    if status.st_size < LARGE:
        return _file_hash(path)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = _file_hash(path)
    return _hashes[key]


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes otherwise.

    An existing bundle is replaced; any other existing path is refused with InvalidInput."""
    writable(out)
    folder = out.parent / f".{out.name}.{secrets.token_hex(8)}"
    try:
        folder.mkdir(0o700)
        yield folder
        put(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def writable(out: Path) -> None:
    """Make the folder that ``out`` will lie in. Raises InvalidInput when ``out`` is anything but a bundle."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise InvalidInput(f"{out} exists and is not a bundle -> choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)


def put(folder: Path, out: Path) -> None:
    """Make ``folder`` the bundle ``out``, in place of an older one."""
    folder.chmod(0o755)
    if not out.exists():
        folder.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(old / "bundle")
    folder.rename(out)
    shutil.rmtree(old)


def write_core(
    folder: Path,
    graph: Graph,
    recipe: Recipe,
    target: Target,
    golden: Mapping[str, np.ndarray],
    prefill: Graph | None = None,
) -> None:
    """Graphs, recipe, target and golden vectors; artifacts and manifest follow. ``prefill`` shares the constants."""
    arrays = tensors(graph)
    (folder / "graph.txt").write_text(print_graph(graph))
    if prefill is not None:
        more = tensors(prefill)
        shared = [(arrays[name], more[name]) for name in arrays.keys() & more.keys()]
        assert all(a is b or np.array_equal(a, b) for a, b in shared)
        arrays |= more
        (folder / "prefill.txt").write_text(print_graph(prefill))
    save_arrays(folder / "graph.safetensors", arrays)
    save_arrays(folder / "golden.safetensors", golden)
    for name, model in (("recipe.yaml", recipe), ("target.yaml", target)):
        (folder / name).write_text(yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False))


def read_core(folder: Path) -> tuple[Graph, Graph, dict[str, np.ndarray]]:
    """The graphs of a language model, decode and prefill, on mapped constants, and the golden vectors."""
    arrays = load_arrays(folder / "graph.safetensors")
    decode, prefill = (parse_graph((folder / name).read_text(), arrays) for name in ("graph.txt", "prefill.txt"))
    return decode, prefill, load_arrays(folder / "golden.safetensors")


def write_manifest(folder: Path, **fields: Any) -> Manifest:
    """manifest.json with the sha256 of every file already in ``folder``; written last."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    hashes = {f.relative_to(folder).as_posix(): file_hash(f) for f in files}
    manifest = Manifest(tools=tool_versions(), sha256=hashes, **fields)
    (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")
    return manifest


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file({key: np.ascontiguousarray(array) for key, array in sorted(arrays.items())}, path)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped: memory holds what is read, and a change of it stays private."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import _TYPES

    try:
        with safe_open(path, "np") as checked:
            names = list(checked.keys())
        mapped = np.memmap(path, mode="c")
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{path.name} cannot be read: {error}") from None
    data = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:data].tobytes())
    return {
        name: np.ndarray(shape, _TYPES[kind], mapped, data + begin)
        for name in names
        for shape, kind, (begin, _) in [[header[name][key] for key in ("shape", "dtype", "data_offsets")]]
    }


def load_bundle(path: Path) -> Bundle:
    """Open a bundle, checking schema, hashes and the graph. Raises InvalidInput naming file and cause."""
    manifest = _read_manifest(path)
    for name, expected in manifest.sha256.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise InvalidInput(f"bundle {path}: {name} lies outside the bundle")
        if not file.is_file():
            raise InvalidInput(f"bundle {path}: {name} is missing -> export again")
        if file_hash(file) != expected:
            raise InvalidInput(
                f"bundle {path}: {name} is not the file that was written (sha256 differs) -> export again"
            )
    arrays, golden = load_arrays(path / "graph.safetensors"), load_arrays(path / "golden.safetensors")
    graph = _read_graph(path / "graph.txt", arrays, manifest.graph_hash)
    recipe, target = read_yaml(path / "recipe.yaml", Recipe), read_yaml(path / "target.yaml", Target)
    if manifest.language is None:
        return Bundle(path, manifest, graph, recipe, target, golden)
    first = _read_graph(path / "prefill.txt", arrays, manifest.language.prefill_hash)
    own = {key.partition("/")[2]: array for key, array in golden.items() if key.startswith("prefill/")}
    prefill = Bundle(path, manifest, first, recipe, target, own, "prefill")
    return Bundle(path, manifest, graph, recipe, target, golden, "decode", prefill)


def _read_graph(file: Path, arrays: dict[str, np.ndarray], expected: str) -> Graph:
    graph = verify(parse_graph(file.read_text(), arrays))
    if graph.hash() != expected:
        raise InvalidInput(f"bundle {file.parent}: {file.name} is not the graph of the manifest -> export again")
    return graph


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise InvalidInput(f"{path} is not a bundle: no {MANIFEST} -> the folder that export --out named")
    try:
        raw = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise InvalidInput(f"bundle {path}: {MANIFEST} is damaged: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        raise InvalidInput(
            f"bundle {path}: schema version {version!r}, this EdgeForge reads {SCHEMA} -> use the version that wrote it"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"bundle {path}: {MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
