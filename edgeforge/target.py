"""Targets: what a chip or a runtime offers, read from ``targets/<name>.yaml``. Hardware is data, not code."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from edgeforge.errors import InvalidInput
from edgeforge.ir.rules import PROFILES
from edgeforge.resources import folder

T = TypeVar("T", bound=BaseModel)


class Closed(BaseModel):
    """Unknown keys are errors; values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Closed):
    """A number with its unit and where it comes from."""

    value: float
    unit: str
    source: str


class Soc(Closed):
    """Qualcomm's identifiers: ``model`` is the QNN ``soc_model``, ``name`` the chipset (SM8650)."""

    model: int
    name: str
    hexagon: str


class FixedEncoding(Closed):
    """An output encoding that the hardware writes whatever the graph declares: scale = 1 / ``steps``."""

    steps: int
    zero: int


def _known_profile(name: str) -> str:
    if name not in PROFILES:
        raise ValueError(f"unknown numerics profile, one of {', '.join(PROFILES)}")
    return name


class Latency(Closed):
    """Parameters of the latency model, written by `edgeforge calibrate`.

    rates: precision -> term -> microseconds per unit (units: edgeforge/estimate/work.py), fitted over many chips.
    factors: what a chip's times are multiplied by, see `estimate.latency.FACTORS`: {"all": {"all": f}, "group": ...}.
    interval: factor of the 80 % interval (x / factor to x * factor) "calibrated", "uncalibrated" (no factors), "few"
    (factors from a few measurements), "carried" (the model was measured on another chip), "llm" and "memory".
    llm: rates of decoder language models; memory: MB per unit (edgeforge/estimate/memory.py). fit, calibration: where
    rates and factors come from, with their residuals."""

    rates: dict[str, dict[str, float]] = Field(default_factory=dict)
    factors: dict[str, dict[str, float]] = Field(default_factory=dict)
    interval: dict[str, float] = Field(default_factory=dict)
    llm: dict[str, float] = Field(default_factory=dict)
    memory: dict[str, float] = Field(default_factory=dict)
    fit: dict[str, str | float] = Field(default_factory=dict)
    calibration: dict[str, str | float] = Field(default_factory=dict)


class Target(Closed):
    """A chip or a runtime. ``ops`` lists activation widths per op where they differ from ``activations``;
    ``encodings`` are forced output encodings per op and width; ``second_operand_zero`` is the zero point that the
    uint8 second operand of an activation matmul must have; ``equal_widths``: a node's activations all have one width
    (products with a uint8 second operand apart); ``context_bytes``: constants that one context of the NPU can hold;
    ``weight_sharing``: graphs of one context binary can share weights; ``abi``: Android's name of the CPU's machine.
    ``aliases`` (part numbers, marketing names) and ``devices`` can be used in place of the name; ``source`` says where
    these identifiers come from."""

    name: str
    description: str
    numerics: Annotated[str, AfterValidator(_known_profile)]
    backends: tuple[str, ...]
    precisions: tuple[str, ...]
    soc: Soc | None = None
    abi: str = "arm64-v8a"
    encodings: dict[str, dict[Literal["a8", "a16"], FixedEncoding]] = Field(default_factory=dict)
    second_operand_zero: int | None = None
    equal_widths: bool = False
    max_rank: int = 5
    unsupported: dict[str, str] = Field(default_factory=dict)
    fp16: bool = False
    context_bytes: int | None = None
    weight_sharing: bool = False
    aliases: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    source: str = ""
    figures: dict[str, Figure] = Field(default_factory=dict)
    latency: Latency | None = None


def names() -> list[str]:
    """Every target of the catalogue."""
    return sorted(path.stem for path in folder("targets").glob("*.yaml"))


def load_target(name: str) -> Target:
    """Read a target by its name, part number, marketing name or device ("Galaxy S24", "S24"), or a path to a YAML file.

    Raises InvalidInput with the nearest names."""
    return _resolved(target_file(name))


def target_file(name: str) -> Path:
    """The YAML of a target named as for `load_target`."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    path = folder("targets") / f"{name}.yaml"
    return path if path.is_file() else folder("targets") / f"{_lookup(name)}.yaml"


def _resolved(path: Path) -> Target:
    return _validated(path, _merged(path), Target)


def _merged(path: Path) -> dict[str, Any]:
    """The mapping in ``path`` on top of its base (``bases/<base>.yaml`` beside the catalogue), and that one's base.
    The nearer file wins; the entries of `figures` and `latency` are merged. ``latency_of`` names the target that has
    the same silicon under another name."""
    raw = _mapping(path)
    if other := raw.pop("latency_of", None):
        raw["latency"] = _merged(folder("targets") / f"{other}.yaml")["latency"] | raw.get("latency", {})
    while base := raw.pop("base", None):
        file = folder("targets") / "bases" / f"{base}.yaml"
        if not file.is_file():
            raise InvalidInput(f"{path.name}: unknown base {base!r} -> one of {', '.join(_bases())}")
        below = _mapping(file)
        nested = {
            key: {**below.get(key, {}), **raw.get(key, {})}
            for key in ("figures", "latency")
            if key in below or key in raw
        }
        raw = {**below, **raw, **nested}
    return raw


def _bases() -> list[str]:
    return sorted(path.stem for path in (folder("targets") / "bases").glob("*.yaml"))


#: Words that name no chip: makers, their series and kinds of products.
NOISE = ("qualcomm", "samsung", "galaxy", "google", "5g", "mobile", "proxy")


def plain(name: str) -> str:
    """A name without `NOISE`, case, spaces and punctuation: "Samsung Galaxy S24+" -> "s24plus"."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower().replace("+", " plus ")).split()
    return "".join(word for word in words if word not in NOISE)


@functools.cache
def _index() -> dict[str, str]:
    """Every plain name, alias and device -> target."""
    found: dict[str, str] = {}
    for name in names():
        raw = _mapping(folder("targets") / f"{name}.yaml")
        part = raw.get("soc", {}).get("name", name)
        for known in (name, part, *raw.get("aliases", ()), *raw.get("devices", ())):
            found.setdefault(plain(known), name)
    return found


def _lookup(name: str) -> str:
    """The target that ``name`` means."""
    index, asked = _index(), plain(name)
    if asked in index:
        return index[asked]
    near = [index[key] for key in difflib.get_close_matches(asked, index, 3, 0.0)]
    raise InvalidInput(
        f"unknown target {name!r} -> did you mean {', '.join(dict.fromkeys(near))}? (edgeforge targets lists all)"
    )


def read_yaml(path: Path, kind: type[T]) -> T:
    """A YAML file as ``kind``; raises InvalidInput listing every wrong key at once."""
    return _validated(path, _mapping(path), kind)


def _validated(path: Path, raw: Any, kind: type[T]) -> T:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = "\n".join(f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors())
        raise InvalidInput(f"{path.name}: {error.error_count()} problem(s):\n{lines}") from None


def _mapping(path: Path) -> Any:
    """The YAML document of a file; an empty file is an empty mapping."""
    try:
        raw = yaml.safe_load(path.read_text())
        return raw if raw is not None else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path.name} is not YAML: {error}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None
