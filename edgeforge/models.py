"""From a model's name to its float graph: embedded models, .onnx, .pt2, and module:callable."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeforge.errors import InvalidInput
from edgeforge.frontend import Imported
from edgeforge.resources import folder


@dataclass(frozen=True)
class Model:
    """A model as named by the user. ``base``: the folder of its recipe and tokenizer; ``code``: the embedded model's
    module (``load``, and perhaps ``calibration`` and ``heldout``)."""

    name: str
    imported: Imported
    base: Path
    code: ModuleType | None = None

    @property
    def recipe(self) -> Path | None:
        file = self.base / "recipe.yaml"
        return file if self.code is not None and file.is_file() else None

    def data(self, part: str) -> str | Path | Mapping[str, Any]:
        """What the embedded model offers as ``calibration`` or ``heldout`` data."""
        if self.code is None or not hasattr(self.code, part):
            raise InvalidInput(f"model {self.name} brings no {part} data -> name a .npz, a folder or a .txt")
        return getattr(self.code, part)()


def embedded() -> list[str]:
    """Names of the models that come with EdgeForge."""
    return sorted(path.parent.name for path in folder("models").glob("*/model.py"))


def load_model(name: str) -> Model:
    """Import ``name`` to a float graph (and the encodings it carries).

    name: an embedded model, a path to .onnx or .pt2, or ``package.module:callable`` that returns (nn.Module, example
    inputs). Raises InvalidInput or Unsupported."""
    if name in embedded():
        return _embedded(name)
    path = Path(name)
    if path.suffix == ".onnx":
        from edgeforge.frontend.onnx import from_onnx

        return Model(path.stem, from_onnx(_existing(path), path.stem), path.parent)
    if path.suffix == ".pt2":
        from edgeforge.frontend.torch import from_pt2

        return Model(path.stem, from_pt2(_existing(path)), path.parent)
    if ":" in name:
        module, arguments = call(name)
        return Model(name.rpartition(":")[2], _from_torch(name, module, arguments), Path.cwd())
    near = difflib.get_close_matches(name, embedded(), 3, 0.4) or embedded()
    raise InvalidInput(
        f"unknown model {name!r} -> an embedded model ({', '.join(near)}), a .onnx or .pt2 file,"
        " or package.module:callable"
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InvalidInput(f"model {path}: no such file")
    return path


def _embedded(name: str) -> Model:
    base = folder("models") / name
    spec = importlib.util.spec_from_file_location(f"edgeforge_model_{name}", base / "model.py")
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code
    spec.loader.exec_module(code)
    module, arguments = code.load()
    return Model(name, _from_torch(name, module, arguments), base, code)


def _from_torch(name: str, module: Any, arguments: Any) -> Imported:
    from edgeforge.frontend.torch import from_module

    return from_module(module, arguments, name.rpartition(":")[2].rpartition(".")[2])


def call(name: str) -> Any:
    """The result of ``package.module:callable``; the current folder is importable, as with ``python -m``."""
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(f"{name}: {error} -> package.module:callable, importable from here") from None
    return found()
