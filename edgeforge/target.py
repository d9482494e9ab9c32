"""Targets: what a chip or a runtime offers, read from ``targets/<name>.yaml``. Hardware is data, not code."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

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


class Target(Closed):
    """A chip or a runtime. ``ops`` lists activation widths per op where they differ from ``activations``;
    ``encodings`` are forced output encodings per op and width; ``second_operand_zero`` is the zero point that the
    uint8 second operand of an activation matmul must have."""

    name: str
    description: str
    numerics: Annotated[str, AfterValidator(_known_profile)]
    backends: tuple[str, ...]
    precisions: tuple[str, ...]
    soc: Soc | None = None
    encodings: dict[str, dict[Literal["a8", "a16"], FixedEncoding]] = Field(default_factory=dict)
    second_operand_zero: int | None = None
    max_rank: int = 5
    unsupported: dict[str, str] = Field(default_factory=dict)
    figures: dict[str, Figure] = Field(default_factory=dict)


def names() -> list[str]:
    """Every target of the catalogue."""
    return sorted(path.stem for path in folder("targets").glob("*.yaml"))


def load_target(name: str) -> Target:
    """Read ``name`` from the catalogue, or a path to a YAML file. Raises InvalidInput with the nearest names."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder("targets") / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), 3, 0.4) or names()
        raise InvalidInput(f"unknown target {name!r} -> did you mean {', '.join(near)}? (edgeforge targets lists all)")
    return read_yaml(path, Target)


def read_yaml(path: Path, kind: type[T]) -> T:
    """A YAML file as ``kind``; raises InvalidInput listing every wrong key at once."""
    try:
        raw = yaml.safe_load(path.read_text())
        return kind.model_validate(raw if raw is not None else {})
    except ValidationError as error:
        lines = "\n".join(f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors())
        raise InvalidInput(f"{path.name}: {error.error_count()} problem(s):\n{lines}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path.name} is not YAML: {error}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None
