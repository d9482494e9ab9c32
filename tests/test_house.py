"""The structure that the README promises: who may import whom, what is generated, and what a graph looks like."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_core import network

import edgeforge
from edgeforge.ir.text import print_graph
from edgeforge.passes import optimize
from edgeforge.quantize.assign import assign
from edgeforge.quantize.convert import convert
from edgeforge.recipe import Override, Recipe
from edgeforge.support import markdown
from edgeforge.target import load_target

ROOT = Path(edgeforge.__file__).parent

#: Each name may import those of the lines above it, and itself.
LAYERS = (
    ("errors", "resources", "progress"),
    ("ir",),
    ("ops", "target"),
    ("passes", "recipe", "support"),
    ("frontend", "dialects", "sim", "data"),
    ("quantize", "models"),
    ("compress",),
    ("backends",),
    ("bundle", "measured"),
    ("steps",),
    ("estimate", "validate", "llm", "conformance"),
    ("devices",),
    ("report",),
    ("pipeline",),
    ("estimator", "tune", "sweep"),
    ("cli",),
)

#: Packages that cost seconds or are optional, and where a module may import them when it is imported itself.
HEAVY = {
    "torch": (
        "frontend/",
        "dialects/pt2e",
        "sim/",
        "quantize/correct",
        "quantize/gptq",
        "quantize/layerwise",
        "quantize/adaround",
        "compress/",
        "conformance/cases",
        "backends/_executorch",
    ),
    "onnx": ("frontend/", "dialects/onnx", "estimate/sketch"),
    "numba": ("sim/",),
    "onnxruntime": ("backends/_qnn_worker",),
    "onnxruntime_qnn": ("backends/_qnn_worker",),
    "executorch": ("backends/_executorch",),
    "torchao": (),
    "transformers": (),
    "qai_hub": (),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())


def imports(statements: list[ast.stmt] | Iterator[ast.AST]) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            named = statement.module == "edgeforge"
            yield from (f"edgeforge.{alias.name}" for alias in statement.names) if named else [statement.module or ""]
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)


def test_imports_go_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for file, tree in modules():
        own = file.removesuffix(".py").partition("/")[0]
        for name in imports(ast.walk(tree)):
            other = name.split(".")[1] if name.startswith("edgeforge.") else own
            if own != "__init__" and other not in (own, "__version__") and rank[other] >= rank[own]:
                wrong.append(f"{file} imports {name}")
    assert wrong == []


def test_heavy_packages_are_imported_where_they_are_needed():
    wrong = []
    for file, tree in modules():
        for name in imports(tree.body):
            package = name.partition(".")[0]
            if package in HEAVY and not file.startswith(HEAVY[package]):
                wrong.append(f"{file} imports {package}")
    assert wrong == []


def test_readme_holds_the_support_matrix_of_the_op_table():
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.is_file():
        pytest.skip("tests run without a checkout")
    assert markdown() in readme.read_text(), "edgeforge ops --markdown prints the matrix"


def snapshots() -> dict[str, str]:
    """A network after each stage. Ranges are given, so that no floating-point sum of this machine shows."""
    graph, target = optimize(network()), load_target("snapdragon-8-gen-3")
    ranges = {name: (-1.0 - i / 7, 2.0 + i / 3) for i, name in enumerate(graph.values)}
    wide = Recipe(overrides=(Override(op="add", output="a16"), Override(match="logits", precision="w4a16")))
    texts = {"float": print_graph(network()), "optimized": print_graph(graph)}
    for name, recipe in {"w8a8": Recipe(), "mixed": wide}.items():
        texts[name] = print_graph(convert(graph, assign(graph, ranges, recipe, target), target))
    return texts


@pytest.mark.parametrize("stage", ["float", "optimized", "w8a8", "mixed"])
def test_the_graph_of_each_stage_is_the_one_on_record(stage, request):
    """A change here is a change of numerics: review it, note it in CHANGELOG.md, then delete the file and run again."""
    file = Path(__file__).parent / "golden" / f"{stage}.txt"
    text = snapshots()[stage]
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        pytest.fail(f"{file.name} was missing and is written now: review it")
    assert text == file.read_text()
