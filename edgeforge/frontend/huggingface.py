"""Hugging Face checkpoints -> `Language`: config.json, safetensors (mapped, never pickled), tokenizer, template."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeforge.errors import InvalidInput, MissingDependency
from edgeforge.frontend.decoder import Decoder, DecoderConfig
from edgeforge.frontend.families import decoder_config
from edgeforge.frontend.language import Language, folded

#: What is read of a repository on the hub.
FILES = ("*.json", "*.safetensors", "chat_template.jinja")
#: Bytes; torch's vectorized sums vary with it in the last bit (see `run_float`).
ALIGNED = 64
#: Elements from which on a tensor gets a file of its own.
LARGE = 1 << 20
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+$")


def from_hub(name: str) -> Path:
    """The local copy of a repository on the Hugging Face hub. Raises MissingDependency or InvalidInput (offline)."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise MissingDependency(f"{name}: huggingface_hub is not installed -> pip install 'edgeforge[hf]'") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise InvalidInput(f"{name} cannot be fetched from the hub ({first}) -> a local folder, or go online") from None


def from_folder(folder: Path, name: str) -> Language:
    """The language model in a folder. Raises InvalidInput naming file, tensor and cause."""
    raw = _json(folder / "config.json")
    config = decoder_config({**raw, **_generation(folder)})
    checkpoint = _Checkpoint(folder)
    weights = checkpoint.weights(config)
    rotary = 2 * len(config.tables[0].inverse)
    tokenizer = _text(folder / "tokenizer.json", "the tokenizer in the format of the `tokenizers` library")
    check_vocabulary(tokenizer, config.vocab, folder)
    return Language(name, config, folded(config, weights, rotary), tokenizer, _chat_template(folder))


def check_vocabulary(tokenizer: str, vocab: int, folder: Path) -> None:
    """Raise InvalidInput unless every id of a tokenizer.json has a row in the embedding."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(tokenizer)
    except Exception as error:  # the library raises nothing narrower
        raise InvalidInput(f"{folder}/tokenizer.json cannot be read: {error}") from None
    most = max(found.get_vocab(with_added_tokens=True).values(), default=-1)
    if most >= vocab:
        raise InvalidInput(
            f"{folder}: tokenizer.json has ids up to {most}, the embedding has {vocab} rows -> files of one model"
        )


def as_float32(tensor: Tensor) -> Tensor:
    """``tensor`` as float32: of a large one that is no such already, a copy in a nameless file that is mapped, so that
    the system can take back the memory of what is not in use."""
    if tensor.numel() < LARGE or (tensor.dtype == torch.float32 and tensor.data_ptr() % ALIGNED == 0):
        return tensor.float()
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * tensor.numel())
        mapped = np.memmap(file, np.float32, "r+", shape=tuple(tensor.shape))
    return torch.from_numpy(mapped).copy_(tensor)


class _Checkpoint:
    """The tensors of a folder's safetensors files by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places = self._places()
        self.prefix = "" if any(name.startswith("model.layers.") for name in self.places) else "language_model."
        self.taken: set[str] = set()
        self.opened: dict[str, Any] = {}

    def _places(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            places = _json(index).get("weight_map")
            if not isinstance(places, dict):
                raise InvalidInput(f"{index}: no weight_map -> fetch the file again")
            missing = sorted({file for file in places.values() if not (self.folder / file).is_file()})
            if missing:
                raise InvalidInput(
                    f"{self.folder}: shard {', '.join(missing)} is missing -> fetch it, {index.name} names it"
                )
            return places
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickled = any(self.folder.glob("*.bin"))
            why = "only pickled weights, which can run code" if pickled else "no weights"
            raise InvalidInput(f"{self.folder}: {why} -> save as model.safetensors (save_pretrained does)")
        return {name: file.name for file in files for name in self._open(file.name, {}).keys()}  # noqa: SIM118

    def _open(self, file: str, kept: dict[str, Any]) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in kept:
            try:
                kept[file] = safe_open(self.folder / file, "pt")
            except (SafetensorError, OSError) as error:
                raise InvalidInput(f"{self.folder / file} cannot be read: {error} -> fetch it again") from None
        return kept[file]

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as float32."""
        name = self.prefix + name
        if name not in self.places:
            raise InvalidInput(f"{self.folder}: tensor {name} is missing -> a complete checkpoint")
        file = self._open(self.places[name], self.opened)
        if name not in file.keys():  # noqa: SIM118
            raise InvalidInput(f"{self.folder}: {self.places[name]} holds no {name} -> fetch it again")
        tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise InvalidInput(f"{self.folder}: {name} is {tuple(tensor.shape)}, config.json makes it {shape}")
        if not tensor.is_floating_point():
            raise InvalidInput(
                f"{self.folder}: {name} holds {tensor.dtype} -> float weights (dequantize the checkpoint)"
            )
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise InvalidInput(f"{self.folder}: {name} holds NaN or infinity -> repair the checkpoint")
        self.taken.add(name)
        return as_float32(tensor)

    def weights(self, config: DecoderConfig) -> dict[str, Tensor]:
        """Every parameter of `Decoder`, and an error if the layers hold more than that."""
        with torch.device("meta"):
            wanted = {name: tuple(p.shape) for name, p in Decoder(config, 2).named_parameters()}
        made = {}
        for name, shape in wanted.items():
            if name not in made and not (config.tied and name == "lm_head.weight"):
                made.update(self.stored(name, shape, config))
        rest = {name for name in self.places if name.startswith(f"{self.prefix}model.")} - self.taken
        rest = {name for name in rest if not name.endswith("rotary_emb.inv_freq")}
        if rest:
            first = sorted(rest)[0]
            raise InvalidInput(
                f"{self.folder}: {config.family} has no use for {first} and {len(rest) - 1} more tensors"
            )
        return made

    def stored(self, name: str, shape: tuple[int, ...], config: DecoderConfig) -> dict[str, Tensor]:
        """The parameter ``name`` of `Decoder`, with those that the checkpoint keeps in the same tensor."""
        if name.startswith("lm_head"):
            return {name: self.take(name, shape)}
        parts = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
        sizes = {part: heads * config.head_dim for part, heads in parts.items()}
        for fused, pieces in (
            ("qkv_proj", sizes),
            ("gate_up_proj", dict.fromkeys(("gate_proj", "up_proj"), config.hidden)),
        ):
            part = name.split(".")[-2]
            stored = f"model.{name.replace(part, fused)}"
            if part in pieces and self.prefix + stored in self.places:
                whole = self.take(stored, (sum(pieces.values()), *shape[1:]))
                split = whole.split(list(pieces.values()))
                return {name.replace(part, piece): tensor for piece, tensor in zip(pieces, split, strict=True)}
        return {name: self.take(f"model.{_norms(name, config)}", shape)}


def _norms(name: str, config: DecoderConfig) -> str:
    """A layer's norms under the checkpoint's names."""
    after = "pre_feedforward_layernorm" if config.output_norms else "post_attention_layernorm"
    for own, theirs in (
        ("attention_output_norm", "post_attention_layernorm"),
        ("mlp_output_norm", "post_feedforward_layernorm"),
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", after),
    ):
        name = name.replace(f".{own}.", f".{theirs}.")
    return name


def _generation(folder: Path) -> dict[str, Any]:
    """The ids that begin and end a text, from generation_config.json (it knows the end of a chat's turn)."""
    file = folder / "generation_config.json"
    raw = _json(file) if file.is_file() else {}
    return {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw.get(key) is not None}


def _chat_template(folder: Path) -> str | None:
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text()
    found = _json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(_text(file, "part of a Hugging Face model"))
    except ValueError as error:
        raise InvalidInput(f"{file} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidInput(f"{file} holds no JSON object")
    return raw


def _text(file: Path, what: str) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise InvalidInput(f"{file} is missing: {what}") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file} is not text: {error}") from None
