"""From a model's name to its float graph: embedded models, .onnx, .pt2, language models, and module:callable."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeforge.errors import InvalidInput
from edgeforge.frontend import Imported
from edgeforge.ir.graph import Graph
from edgeforge.recipe import Shape
from edgeforge.resources import folder

if TYPE_CHECKING:
    from edgeforge.frontend.language import Language


@dataclass(frozen=True)
class Model:
    """A model as named by the user. ``base``: the folder of its recipe and tokenizer; ``code``: the embedded model's
    module (``load``, and perhaps ``calibration`` and ``heldout``). ``language``: of language models with a cache, whose
    ``imported`` graph is the decode step."""

    name: str
    imported: Imported
    base: Path
    code: ModuleType | None = None
    language: Language | None = None

    @property
    def recipe(self) -> Path | None:
        if self.language is not None:
            return Path(__file__).parent / "llm" / "recipe.yaml"
        file = self.base / "recipe.yaml"
        return file if self.code is not None and file.is_file() else None

    def data(self, part: str) -> str | Path | Mapping[str, Any]:
        """What the embedded model offers as ``calibration`` or ``heldout`` data; of a language model, PART.txt beside
        it."""
        if self.language is not None and (self.base / f"{part}.txt").is_file():
            return self.base / f"{part}.txt"
        if self.code is None or not hasattr(self.code, part):
            raise InvalidInput(f"model {self.name} brings no {part} data -> name a .npz, a folder or a .txt")
        return getattr(self.code, part)()


def embedded() -> list[str]:
    """Names of the models that come with EdgeForge."""
    return sorted(path.parent.name for path in folder("models").glob("*/model.py"))


def load_model(name: str, traced: bool = True) -> Model:
    """Import ``name`` to a float graph (and the encodings it carries).

    name: an embedded model (or its folder, if that is no Hugging Face one), a path to .onnx or .pt2, a folder (or hub
    repository) with a Hugging Face language model, a llama2.c .bin, or ``package.module:callable`` that returns
    (nn.Module, example inputs).
    traced: whether a language model's decode step is wanted as a graph (else that is empty).
    Raises InvalidInput or Unsupported."""
    if name in embedded():
        return _embedded(name)
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file() and path.resolve().parent == folder("models").resolve():
        return _embedded(path.resolve().name)
    if path.suffix == ".onnx":
        from edgeforge.frontend.onnx import from_onnx

        return Model(path.stem, from_onnx(_existing(path), path.stem), path.parent)
    if path.suffix == ".pt2":
        from edgeforge.frontend.torch import from_pt2

        return Model(path.stem, from_pt2(_existing(path)), path.parent)
    if path.is_dir() or (path.suffix == ".bin" and path.is_file()):
        return _language(path, traced)
    if ":" in name:
        module, arguments = call(name)
        return Model(name.rpartition(":")[2], _from_torch(name, module, arguments), Path.cwd())
    if name.count("/") == 1 and not path.exists() and not path.parent.exists():
        from edgeforge.frontend.huggingface import from_hub

        return replace(_language(from_hub(name), traced), name=path.name)
    near = difflib.get_close_matches(name, embedded(), 3, 0.4) or embedded()
    raise InvalidInput(
        f"unknown model {name!r} -> an embedded model ({', '.join(near)}), a .onnx or .pt2 file,"
        " a Hugging Face folder or repository, a llama2.c .bin, or package.module:callable"
    )


def _language(path: Path, traced: bool) -> Model:
    """A language model in a Hugging Face folder, or a llama2.c checkpoint."""
    from edgeforge.frontend.huggingface import from_folder
    from edgeforge.frontend.llama2c import from_bin

    name = path.resolve().stem if path.is_file() else path.resolve().name
    language = from_folder(path, name) if path.is_dir() else from_bin(path)
    decode = Graph(name, "float", (), (), (), {})
    if traced:
        decode = language.graph(name, 1, min(Shape().context, language.config.context))
    return Model(name, Imported(decode), path if path.is_dir() else path.parent, language=language)


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
