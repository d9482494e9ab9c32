"""The whole product in straight lines: load -> optimize -> calibrate -> assign -> convert -> lower -> bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge import __version__, backends
from edgeforge.backends import Artifact, Backend
from edgeforge.bundle import (
    CORE,
    BackendRecord,
    Bundle,
    EditRecord,
    FigureRecord,
    load_bundle,
    port,
    read_core,
    save_arrays,
    write_core,
    write_manifest,
    writing,
)
from edgeforge.compress import compress
from edgeforge.data import Batches, Dataset, load_data
from edgeforge.errors import InvalidInput, Reason, Unsupported
from edgeforge.ir.graph import Graph
from edgeforge.ir.op import LAYERS
from edgeforge.llm.export import PREFIX, TEMPLATE, TOKENIZER, calibration_tokens, describe, golden_steps
from edgeforge.llm.quantize import quantize_language
from edgeforge.measured import measure
from edgeforge.models import Model, call, load_model
from edgeforge.passes import optimize
from edgeforge.quantize.assign import assign, bits
from edgeforge.quantize.calibrate import Range, calibrate
from edgeforge.quantize.convert import convert
from edgeforge.quantize.correct import correct_biases
from edgeforge.quantize.keep import plan_from
from edgeforge.quantize.rounding import round_weights
from edgeforge.quantize.widen import widen
from edgeforge.recipe import LAYERWISE, Precision, Recipe
from edgeforge.report.text import bundle_readme, quantization_report
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.parity import sqnr_db
from edgeforge.steps import Step, at_once, resumable
from edgeforge.target import Target, load_target, read_yaml

#: Samples whose codes and results a bundle keeps.
GOLDEN = 4

Progress = Callable[[str], None]


def load(name: str, traced: bool = True) -> Model:
    """Import a model (see `load_model`) and optimize its float graph."""
    from dataclasses import replace

    model = load_model(name, traced)
    if model.language is not None:
        return model
    return replace(model, imported=replace(model.imported, graph=optimize(model.imported.graph)))


def read_recipe(model: Model, file: Path | None, precision: str | None, assignments: Sequence[str]) -> Recipe:
    """The recipe file (or the embedded model's for that precision), then --precision, then --set."""
    if file is None and precision is not None and model.recipe is not None:
        special = model.recipe.with_name(f"recipe-{precision}.yaml")
        file = special if special.is_file() else None
    file = file or model.recipe
    recipe = Recipe() if file is None else read_yaml(file, Recipe)
    if precision is not None:
        recipe = recipe.model_copy(update={"precision": Precision(precision).name})
    return recipe.with_set(list(assignments))


def quantize(model: Model, recipe: Recipe, target: Target, data: Dataset, requantize: bool = False) -> Graph:
    """The integer graph of a float model, for the rounding rules of ``target``. Encodings that the model brings along
    (QDQ) are kept unless ``requantize``.

    Raises Unsupported with every node (or kept encoding) that the target cannot run as asked."""
    graph = model.imported.graph
    if Precision(recipe.precision).dynamic:
        raise InvalidInput(f"{recipe.precision} is offered for language models with a cache -> --precision w4a8")
    if model.imported.encodings and not requantize:
        return convert(graph, plan_from(model.imported, recipe, target), target)
    samples = data.head(recipe.calibration.samples)
    graph = compress(graph, recipe, target, samples)
    plan = assign(graph, ranges_of(graph, recipe, samples, bits(graph, recipe, target)), recipe, target)
    if recipe.widen:
        recipe = widen(graph, plan, recipe, samples)
        plan = assign(graph, ranges_of(graph, recipe, samples, bits(graph, recipe, target)), recipe, target)
    # Training has clipped the weights already.
    scales = "minmax" if recipe.weights == "minmax" or recipe.train is not None else "mse"
    if recipe.train is not None:
        from edgeforge.compress.train import train

        graph, plan = train(graph, plan, recipe.train, target, samples)

    views = samples.with_views(recipe.calibration.views)

    def rounded(graph: Graph) -> Graph:
        return convert(*round_weights(graph, plan, recipe, views, scales), target, scales)

    quantized = rounded(graph)
    if recipe.bias_correction and recipe.weights not in LAYERWISE:
        quantized = rounded(correct_biases(graph, quantized, data.head(recipe.bias_correction).stacked()))
    return quantized


def ranges_of(graph: Graph, recipe: Recipe, data: Dataset, widths: Mapping[str, int]) -> dict[str, Range]:
    """The range of every activation of a float graph, by the recipe's method on its first samples of ``data``."""
    samples, how = Batches(data.head(recipe.calibration.samples)), recipe.calibration
    return calibrate(graph, samples, how.method, widths, how.percentile)


def lower(
    graphs: Mapping[str, Graph],
    target: Target,
    names: Sequence[str],
    folder: Path,
    say: Progress,
    shared: bool = False,
    step: Step = at_once,
) -> dict[str, BackendRecord]:
    """Compile graphs, by part ("" is the only one), for each backend into ``folder/artifacts/<name>``, each a step;
    what cannot be built is recorded and why. shared: see `backends.Together`.

    Raises Unsupported when a backend that was asked for by name refuses a graph (empty ``names``: the target's)."""
    records = {}
    for name in names or target.backends:
        chosen = backends.backend(name)
        reason = chosen.missing() if name in target.backends else f"{target.name} does not offer it"
        refusals = [] if reason else backends.refusals(chosen, graphs.values(), target)
        if names and (reason or refusals):
            if refusals:
                raise Unsupported(f"{name} cannot take {next(iter(graphs.values())).name} as asked", refusals)
            raise InvalidInput(f"backend {name}: {reason}")
        if reason or refusals:
            text = reason or in_short(refusals)
            records[name] = BackendRecord(status="skipped", reason=text)
            say(f"{name}: skipped ({text})")
            continue

        def compiled(chosen: Backend = chosen) -> dict[str, Any]:
            say(f"{chosen.name}: compiling {' and '.join(graphs)}".rstrip())
            place = folder / "artifacts" / chosen.name
            place.mkdir(parents=True)
            record = _record(chosen.name, backends.compile_parts(chosen, graphs, target, place, shared))
            if not any(place.iterdir()):
                place.rmdir()
            return record.model_dump(mode="json")

        records[name] = BackendRecord.model_validate(step(name, compiled, f"artifacts/{name}"))
    return records


def in_short(refusals: Sequence[Reason]) -> str:
    """Refusals in one line: each distinct cause with its first node and how many share it."""
    causes: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        causes.setdefault((refusal.why, refusal.remedy), []).append(refusal.where)
    shown = [
        f"{nodes[0]}{f' and {len(nodes) - 1} more' if len(nodes) > 1 else ''}: {why} -> {remedy}"
        for (why, remedy), nodes in causes.items()
    ]
    return "; ".join(shown[:3] + ([f"{len(shown) - 3} more causes"] if len(shown) > 3 else []))


def _record(name: str, artifact: Artifact) -> BackendRecord:
    return BackendRecord(
        status="built",
        files=tuple(f"artifacts/{name}/{file}" for file in artifact.files),
        options=dict(artifact.options),
        edits=tuple(EditRecord(where=e.where, what=e.what, why=e.why) for e in artifact.edits),
        islands=artifact.islands,
        notes=artifact.notes,
        deterministic=artifact.deterministic,
    )


def export(
    name: str,
    target_name: str,
    out: Path,
    calibration: str | Mapping[str, np.ndarray],
    precision: str | None = None,
    backend_names: Sequence[str] = (),
    recipe_file: Path | None = None,
    assignments: Sequence[str] = (),
    requantize: bool = False,
    say: Progress = lambda line: None,
) -> Bundle:
    """Model in, bundle out. Everything is written to a temporary folder that is renamed at the end."""
    target = load_target(target_name)
    for backend_name in backend_names:
        backends.backend(backend_name)
    say(f"importing {name}")
    model = load(name, traced=False)
    recipe = read_recipe(model, recipe_file, precision, assignments)
    base = model.base if recipe_file is None else recipe_file.parent
    if model.language is not None:
        return _export_language(model, target, recipe, calibration, out, backend_names, say)
    data = find_data(calibration, "calibration", model, model.imported.graph, recipe, base)
    with writing(out) as folder:
        used = min(len(data), recipe.calibration.samples)
        say(f"calibrating on {used} samples of {data.name}")
        graph, notes = measure(quantize(model, recipe, target, data, requantize), target)
        for note in notes:
            say(note)
        golden = golden_vectors(model.imported.graph, graph, data)
        write_core(folder, graph, recipe, target, golden)
        _keep_tokenizer(recipe, base, folder)
        records = lower({"": graph}, target, backend_names, folder, say)
        how = f"{used} samples of {data.name}, {recipe.calibration.method}"
        described = {"notes": notes, "backends": records, "figures": figures(graph, golden, target)}
        _finish(folder, model, graph, recipe, target, calibration, calibrated_on=how, **described)
    return load_bundle(out)


def _export_language(
    model: Model,
    target: Target,
    recipe: Recipe,
    calibration: str | Mapping[str, np.ndarray],
    out: Path,
    backend_names: Sequence[str],
    say: Progress,
) -> Bundle:
    """A bundle with two graphs of a language model, prefill and decode, on the same constants."""
    language = model.language
    assert language is not None
    if recipe.language.shared_context and not target.weight_sharing:
        raise InvalidInput(f"{target.name} shares no weights between graphs -> --set language.shared_context=false")
    sequences, source = calibration_tokens(model, recipe, calibration)
    key = [__version__, language.hash(), *(m.model_dump_json() for m in (recipe, target)), sequences, [*backend_names]]
    with resumable(out, hashlib.sha256(repr(key).encode()).hexdigest(), say) as step:
        folder, used = step.folder, min(len(sequences), recipe.calibration.samples)
        how = f"{used} sequences of {source}, {recipe.calibration.method}"
        if Precision(recipe.precision).dynamic:
            how = "none, activations are rounded as they come"

        def core() -> tuple[str, ...]:
            say(f"calibration: {how}")
            made = quantize_language(language, going_on(recipe, step.done), target, sequences, step)
            golden, parts = golden_steps(made, recipe, sequences[0]), made.parts
            write_core(folder, parts["decode"].graph, recipe, target, golden, parts["prefill"].graph)
            if made.prefix is not None:
                save_arrays(folder / PREFIX, made.prefix.arrays)
            return made.notes

        notes = step("graphs", core, *CORE, PREFIX)
        for note in notes:
            say(note)
        decode, prefill, golden = read_core(folder)
        graphs = {"prefill": prefill, "decode": decode}

        def record() -> dict[str, Any]:
            say("golden generation on the simulator")
            return describe(language, recipe, graphs, sequences[0], folder).model_dump(mode="json")

        described = {"notes": notes, "language": step("language", record, TOKENIZER, TEMPLATE)}
        records = lower(graphs, target, backend_names, folder, say, recipe.language.shared_context, step)
        own = {key: array for key, array in golden.items() if not key.startswith("prefill/")}
        described |= {"backends": records, "figures": figures(decode, own, target)}
        _finish(folder, model, decode, recipe, target, calibration, calibrated_on=how, **described)
    return load_bundle(out)


def going_on(recipe: Recipe, folder: Path) -> Recipe:
    """``recipe`` with training that keeps its state in ``folder``, unless it names a file itself."""
    if recipe.train is None or recipe.train.checkpoint is not None:
        return recipe
    train = recipe.train.model_copy(update={"checkpoint": str(folder / "train.pt")})
    return recipe.model_copy(update={"train": train})


def _finish(
    folder: Path,
    model: Model,
    graph: Graph,
    recipe: Recipe,
    target: Target,
    calibration: str | Mapping[str, np.ndarray],
    calibrated_on: str,
    **described: Any,
) -> None:
    """What is written last into a bundle's folder: the report, README.txt, and the manifest over all files."""
    fields: dict[str, Any] = {
        "edgeforge": __version__,
        "model": model.name,
        "target": target.name,
        "precision": recipe.precision,
        "calibrated": calibration != "random",
        "calibration": calibrated_on,
        "graph_hash": graph.hash(),
        "inputs": tuple(port(n, graph.type(n)) for n in graph.inputs),
        "outputs": tuple(port(n, graph.type(n)) for n in graph.outputs),
        "exceptions": exceptions(graph, recipe),
        **described,
    }
    (folder / "report.md").write_text(quantization_report(graph, fields))
    (folder / "README.txt").write_text(bundle_readme(target, fields))
    write_manifest(folder, **fields)


def find_data(
    source: str | Mapping[str, np.ndarray], part: str, model: Model | None, graph: Graph, recipe: Recipe, base: Path
) -> Dataset:
    """Resolve ``embedded`` and module:callable, then read the data. part: "calibration" | "heldout"."""
    found: Any = source
    if source == "embedded":
        if model is None:
            raise InvalidInput("data 'embedded' needs the model -> add --model NAME")
        found = model.data(part)
    elif isinstance(source, str) and ":" in source and not Path(source).exists():
        found = call(source)
    if isinstance(found, Dataset):
        return found
    return load_data(found, graph, recipe, base)


def golden_vectors(float_graph: Graph, graph: Graph, data: Dataset) -> dict[str, np.ndarray]:
    """Inputs (real and codes), float outputs and the simulator's integers for the first GOLDEN samples."""
    real = data.head(GOLDEN).stacked()
    codes = quantize_feeds(graph, real)
    parts = {
        "real": real,
        "input": codes,
        "float": run_float(float_graph, real),
        "output": simulate(graph, codes),
    }
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def figures(graph: Graph, golden: Mapping[str, np.ndarray], target: Target) -> tuple[FigureRecord, ...]:
    """Size of the constants, and per output the simulator's signal-to-noise ratio against the float model."""
    size = sum(value.type.nbytes for value in graph.constants())
    found = [FigureRecord(name="constants", value=size, unit="bytes", kind="counted", source="the graph")]
    source = f"golden samples, rounding rules of {target.numerics if graph.level == 'integer' else 'float arithmetic'}"
    for name, real in dequantize_outputs(graph, {n: golden[f"output/{n}"] for n in graph.outputs}).items():
        sqnr = sqnr_db(golden[f"float/{name}"], real)
        if sqnr is not None:
            found.append(FigureRecord(name=f"sqnr of {name}", value=sqnr, unit="dB", kind="simulated", source=source))
    return tuple(found)


def _keep_tokenizer(recipe: Recipe, base: Path, folder: Path) -> None:
    if recipe.data is not None and recipe.data.kind == "text":
        (folder / recipe.data.tokenizer).write_bytes((base / recipe.data.tokenizer).read_bytes())


def exceptions(graph: Graph, recipe: Recipe) -> dict[str, str]:
    """Activations and weights whose width is not the precision's."""
    precision = Precision(recipe.precision)
    found = {}
    for node in graph.nodes:
        if graph.type(node.output).dtype != precision.activations:
            found[node.output] = graph.type(node.output).dtype
        if node.op in LAYERS and graph.type(node.inputs[1]).dtype != precision.weights:
            found[node.inputs[1]] = graph.type(node.inputs[1]).dtype
    return found
