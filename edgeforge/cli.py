"""The command line: one short function per verb. JSON on stdout with --json, progress on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgeforge.errors import EdgeForgeError, InvalidInput

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _print(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(
            *("-" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row)
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@app.command()
def export(
    model: str,
    target: Annotated[str, typer.Option(help="a name of `edgeforge targets`, or a YAML file")],
    out: Annotated[Path, typer.Option(help="folder of the bundle")],
    calibration: Annotated[
        str | None, typer.Option(help=".npz, image folder, .txt, module:callable, embedded or random")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="w8a8, w8a16, w4a8, w4a16, with -b16|32|64 block-wise; 8da4w-b32|64")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="build only this backend (repeatable)")] = None,
    recipe: Annotated[Path | None, typer.Option(help="recipe YAML")] = None,
    requantize: Annotated[bool, typer.Option(help="drop the encodings that a QDQ model brings along")] = False,
    set: Annotated[list[str] | None, typer.Option("--set", help="recipe entry, a.b=value (repeatable)")] = None,
) -> None:
    """Lower MODEL (embedded name, .onnx, .pt2, package.module:callable) into a bundle."""
    from edgeforge.pipeline import export as run

    if calibration is None:
        raise InvalidInput(
            "export needs data to find ranges -> --calibration DATA (or --calibration random, stamped uncalibrated)"
        )
    bundle = run(model, target, out, calibration, precision, backend or (), recipe, set or (), requantize, _say)
    rows = [
        [name, r.status, r.reason or f"{len(r.files)} files, {len(r.islands)} float islands"]
        for name, r in bundle.manifest.backends.items()
    ]
    stamp = "" if bundle.manifest.calibrated else " (UNCALIBRATED)"
    _table(f"{out}: {bundle.manifest.precision} for {bundle.target.name}{stamp}", ["backend", "status", "detail"], rows)


@app.command()
def validate(
    bundle: Path,
    data: Annotated[str | None, typer.Option(help="evaluation data; default: the golden vectors")] = None,
    model: Annotated[str | None, typer.Option(help="the float model, for float figures on other data")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="only this backend (repeatable)")] = None,
    samples: Annotated[int | None, typer.Option(help="use only the first samples")] = None,
    per_node: Annotated[
        bool, typer.Option("--per-node", help="each node on the simulator's codes, worst first")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every artifact of BUNDLE with the simulator and the float model. Exit code 1: a bound was missed."""
    from edgeforge.bundle import load_bundle
    from edgeforge.pipeline import find_data, load
    from edgeforge.validate import validate as run

    opened = load_bundle(bundle)
    if per_node:
        _validate_nodes(opened, backend or (), samples or 1, as_json)
        return
    if data and opened.prefill is not None:
        raise InvalidInput(f"{bundle} is a language model: data are for eval -> edgeforge eval --text FILE")
    source = load(model) if model else None
    found = find_data(data, "heldout", source, opened.graph, opened.recipe, bundle) if data else None
    found = found.head(samples) if found is not None and samples else found
    results = run(opened, found, source.imported.graph if source else None, tuple(backend or ()), _say)
    if as_json:
        unsaid = {"misses"} if opened.prefill is not None else {"misses", "part"}
        _print({"artifacts": [{k: v for k, v in dataclasses.asdict(r).items() if k not in unsaid} for r in results]})
    else:
        columns = ["backend", "ran", "identical", "max LSB", "SQNR dB", "cosine", "metric", "float", "flips", "source"]
        rows = []
        for r in results:
            metric = r.metric or {"value": None, "float": None}
            flips = f"-{metric['lost']} +{metric['gained']}" if "lost" in metric else None
            how = r.source if r.ran else r.reason
            figures = [r.identical, r.max_lsb, r.sqnr_db, r.cosine, metric["value"], metric["float"], flips]
            rows.append([f"{r.backend} {r.part}".rstrip(), "yes" if r.ran else "no", *figures, how])
        _table(f"{opened.manifest.model} {opened.manifest.precision}", columns, rows)
    for result in results:
        for miss in result.misses:
            print(f"{result.backend}: {miss}", file=sys.stderr)
    if any(result.misses for result in results):
        raise typer.Exit(1)


def _validate_nodes(bundle: Any, names: Any, samples: int, as_json: bool) -> None:
    from edgeforge.validate import validate_nodes

    built = [name for name, r in bundle.manifest.backends.items() if r.status == "built" and name != "simulator"]
    found = {
        f"{name} {part.part}".rstrip(): validate_nodes(part, name, samples, _say)
        for part in bundle.parts
        for name in names or built
    }
    if as_json:
        _print({"nodes": {name: [dataclasses.asdict(node) for node in nodes] for name, nodes in found.items()}})
        return
    for name, nodes in found.items():
        rows = [[n.node, n.op, n.rule, n.status, n.identical, n.max_lsb, n.bias_lsb, n.source] for n in nodes]
        title = f"{name}: {sum(n.max_lsb == 0 for n in nodes)} of {len(nodes)} nodes identical"
        _table(title, ["node", "op", "rule", "status", "identical", "max LSB", "bias LSB", "source"], rows)


@app.command()
def tune(
    model: str,
    target: Annotated[str, typer.Option(help="a name of `edgeforge targets`, or a YAML file")],
    calibration: Annotated[str, typer.Option(help="as for export")],
    out: Annotated[Path, typer.Option(help="the recipe to write")],
    data: Annotated[str | None, typer.Option(help="samples to judge by; default: the calibration's")] = None,
    samples: Annotated[int, typer.Option(help="how many of them")] = 16,
    max_drop: Annotated[str, typer.Option(help="allowed loss of the metric, such as 1%")] = "1%",
    budget_ms: Annotated[float | None, typer.Option(help="most milliseconds, as estimated")] = None,
    budget_mb: Annotated[float | None, typer.Option(help="most megabytes of constants")] = None,
    precision: Annotated[str | None, typer.Option(help="where to start")] = None,
    recipe: Annotated[Path | None, typer.Option(help="recipe to start from")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="recipe entry, a.b=value (repeatable)")] = None,
    as_json: Json = False,
) -> None:
    """Find the few nodes of MODEL that need more bits, and write the recipe. Exit code 1: no recipe within the budget
    keeps to --max-drop."""
    from edgeforge.pipeline import find_data, load, read_recipe
    from edgeforge.target import load_target
    from edgeforge.tune import document, trail
    from edgeforge.tune import tune as run

    share = max_drop.strip()
    try:
        allowed = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        raise InvalidInput(f"--max-drop {max_drop!r} is no share -> 1% or 0.01") from None
    chip, opened = load_target(target), load(model)
    if opened.language is not None or opened.imported.encodings:
        raise InvalidInput(f"{model}: tune takes models of one float graph -> a torch, ONNX or embedded model")
    graph, start = opened.imported.graph, read_recipe(opened, recipe, precision, set or ())
    base = opened.base if recipe is None else recipe.parent
    learned = find_data(calibration, "calibration", opened, graph, start, base)
    judged = find_data(data, "heldout", opened, graph, start, base) if data else learned
    found = run(graph, start, chip, learned, judged.head(samples), allowed, budget_ms, budget_mb, _say)
    out.write_text(trail(found))
    if as_json:
        _print(document(found))
    else:
        rows = [
            [f.move.node, f.move.op, f.move.what, f"{f.benefit:.3g}", f"{f.cost:.3g}", f.weight_peak, f.input_peak,
             "yes" if f.move in found.promoted else ""]
            for f in found.findings[:30]
        ]  # fmt: skip
        columns = ["node", "op", "promotion", "benefit", f"cost {found.unit}", "weight peak", "input peak", "taken"]
        _table(f"{out}: drop {found.before.drop:.2%} -> {found.after.drop:.2%}", columns, rows)
    if found.missed is not None:
        print(found.missed, file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def generate(
    bundle: Path,
    prompt: Annotated[str, typer.Option(help="text to go on from")],
    backend: Annotated[str, typer.Option(help="whose artifact runs")] = "simulator",
    max_tokens: Annotated[int, typer.Option(min=1)] = 40,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens with this probability together")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is the user's turn in the chat template")] = False,
    as_json: Json = False,
) -> None:
    """Continue a text with the language model of BUNDLE; greedy unless a temperature is given."""
    from edgeforge.bundle import load_bundle
    from edgeforge.llm import generate as llm
    from edgeforge.llm.session import opened

    found = load_bundle(bundle)
    sampling = llm.Sampling(temperature, top_p, seed)
    if found.manifest.language is None:
        if backend != "simulator" or temperature or chat:
            raise InvalidInput(f"{bundle} has no cache: simulator only, greedy -> export a Hugging Face folder")
        tokens, text, seconds = _stream(llm.generate(found, prompt, max_tokens), prompt, as_json)
        speeds = {"tokens_per_second": len(tokens) / seconds}
    else:
        ids = llm.prompt_tokens(found, prompt, chat)
        with opened(found, backend) as session:
            pieces = llm.continued(found, session, ids, max_tokens, sampling)
            tokens, text, _ = _stream(pieces, "" if chat else prompt, as_json)
            speeds = session.speeds(len(ids))
    if as_json:
        _print({"tokens": tokens, "text": text, **speeds, "source": _source(backend)})


def _source(engine: str) -> str:
    """What a backend's artifact (or the float model) runs on here."""
    from edgeforge import backends

    return backends.backend(engine).source if engine in backends.names() else backends.HOST


def _stream(pieces: Any, prompt: str, quiet: bool) -> tuple[list[int], str, float]:
    """Print text as it comes (unless ``quiet``); tokens, text and seconds."""
    import time

    started, tokens, text = time.perf_counter(), [], ""
    if not quiet:
        print(prompt, end="", flush=True)
    for token, piece in pieces:
        tokens.append(token)
        text += piece
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
    return tokens, text, time.perf_counter() - started


@app.command("eval")
def evaluate(
    what: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL")],
    task: Annotated[str, typer.Option(help="perplexity or multiple-choice")] = "perplexity",
    text: Annotated[Path | None, typer.Option(help="perplexity: a .txt, or a .json list of texts")] = None,
    data: Annotated[Path | None, typer.Option(help="multiple-choice: a .jsonl of questions")] = None,
    model: Annotated[str | None, typer.Option(help="the float model, beside a bundle's figures")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="also this artifact (repeatable)")] = None,
    stride: Annotated[int | None, typer.Option(help="perplexity: tokens between windows; default: disjoint")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first windows or questions only")] = None,
    as_json: Json = False,
) -> None:
    """Quality of a language model: float (MODEL, or --model), fake-quantized, integer (BUNDLE), with the protocol."""
    from edgeforge.bundle import MANIFEST, load_bundle
    from edgeforge.llm import evaluate as llm
    from edgeforge.models import load_model
    from edgeforge.recipe import Shape

    bundle = load_bundle(Path(what)) if (Path(what) / MANIFEST).is_file() else None
    name = model if bundle else what
    language = load_model(name).language if name else None
    if bundle is None and language is None:
        raise InvalidInput(f"{what} is no language model with a cache -> a bundle or a Hugging Face folder")
    source = bundle or language
    assert source is not None
    spoken = llm.text_of(source, min(Shape().context, language.config.context) if language else 0)
    if task == "perplexity" and text is not None:
        chosen = llm.perplexity_task(text, spoken, stride, limit)
    elif task == "multiple-choice" and data is not None:
        chosen = llm.choice_task(data, spoken, limit)
    else:
        raise InvalidInput(f"task {task} -> --task perplexity --text FILE, or --task multiple-choice --data FILE.jsonl")
    rows = []
    for engine, score in llm.scorers(bundle, language, spoken.context, backend or ()):
        _say(engine)
        rows.append({"engine": engine, **chosen.measure(score), "source": _source(engine)})
    protocol = chosen.protocol + (llm.ARTIFACTS if backend else "")
    if as_json:
        _print({"task": task, "protocol": protocol, "results": rows})
    else:
        _table(protocol, list(rows[0]), [list(row.values()) for row in rows])


@app.command()
def simulate(
    bundle: Path,
    input: Annotated[Path, typer.Option("--input", help=".npz of real inputs (or codes, by dtype), or other data")],
    output: Annotated[Path, typer.Option("--output", help=".npz of output codes")],
    trace: Annotated[Path | None, typer.Option(help="folder for every node's integers and float shadow")] = None,
    backend: Annotated[str | None, typer.Option(help="round as this backend's runtime does")] = None,
) -> None:
    """Run the integer graph of BUNDLE."""
    import numpy as np

    from edgeforge import backends
    from edgeforge.bundle import load_bundle
    from edgeforge.data import load_data, read_npz
    from edgeforge.quantize.convert import with_profile
    from edgeforge.sim.evaluate import quantize_feeds, read_feeds
    from edgeforge.sim.evaluate import simulate as run
    from edgeforge.sim.trace import record, shadow, write_trace

    opened = load_bundle(bundle)
    profile = (backends.backend(backend).numerics if backend else "") or opened.target.numerics
    graph = with_profile(opened.graph, profile)
    if input.suffix == ".npz" and input.is_file():
        feeds = read_feeds(graph, read_npz(input))
    else:
        feeds = quantize_feeds(graph, load_data(input, graph, opened.recipe, bundle).stacked())
    if trace is None:
        np.savez(output, **run(graph, feeds))
        return
    made = record(graph, feeds, opened.manifest.graph_hash, profile)
    write_trace(trace, made, shadow(graph, feeds))
    np.savez(output, **{name: made.codes[name] for name in graph.outputs})


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="a trace")],
    b: Annotated[Path, typer.Argument(help="another trace, or a bundle whose --backend is to run")],
    backend: Annotated[str | None, typer.Option(help="with a bundle: whose nodes to compare")] = None,
    as_json: Json = False,
) -> None:
    """Name the first node at which two runs part. Exit code 1: they do."""
    from edgeforge.bundle import MANIFEST
    from edgeforge.sim.trace import compare, read_trace

    first = read_trace(a)
    found = compare(first, _artifact_trace(b, first, backend) if (b / MANIFEST).is_file() else read_trace(b))
    departures = [dataclasses.asdict(d) for d in found.departures]
    if as_json:
        head = {"equal": not departures, "compared": found.compared, "first": departures[0] if departures else None}
        _print({**head, "departures": departures, "only_in_one": list(found.only)})
    elif not departures:
        print(f"equal: {found.compared} values, every integer")
    else:
        d = found.departures[0]
        where = f"{d.name} ({d.op}{', from ' + d.source if d.source else ''})"
        what = "other encodings" if d.index is None else f"at {list(d.index)}: {d.a} against {d.b}"
        print(f"first departure: {where}, {what}; {len(departures)} of {found.compared} values differ")
        rows = [[d.name, d.op, d.why, d.identical, d.max_lsb] for d in found.departures[:20]]
        _table("in the order of the run", ["value", "op", "differs in", "identical", "max LSB"], rows)
    if departures:
        raise typer.Exit(1)


def _artifact_trace(folder: Path, wanted: Any, name: str | None) -> Any:
    """What backend ``name`` computes for every node of a bundle, on the inputs of trace ``wanted``."""
    from edgeforge import backends
    from edgeforge.bundle import load_bundle
    from edgeforge.errors import InvalidInput
    from edgeforge.sim.trace import record_artifact

    bundle = load_bundle(folder)
    if name is None:
        raise InvalidInput(f"{folder} is a bundle -> name what shall run with --backend, or compare with a trace")
    chosen = backends.backend(name)
    if wanted.graph != bundle.manifest.graph_hash:
        raise InvalidInput(f"the trace is not of the graph in {folder} -> simulate {folder} --trace")
    if reason := chosen.cannot_run():
        raise InvalidInput(f"backend {name}: {reason}")
    graph, target = bundle.graph, bundle.target
    feeds = {input: wanted.codes[input] for input in graph.inputs}
    _say(f"{name}: building and running the graph with every value exposed")
    return record_artifact(chosen, graph, target, feeds, wanted.graph, chosen.numerics or target.numerics)


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL")], node: Annotated[str | None, typer.Argument()] = None
) -> None:
    """Print a bundle's integer graph (or a model's float graph) with encodings, or the lines that name NODE; then what
    deviates: widths per dtype, exceptions to the precision, float islands."""
    from edgeforge.bundle import MANIFEST, load_bundle
    from edgeforge.ir.text import print_graph
    from edgeforge.pipeline import load
    from edgeforge.report.text import deviations

    bundle = load_bundle(Path(what)) if (Path(what) / MANIFEST).is_file() else None
    graph = bundle.graph if bundle else load(what).imported.graph
    lines = [line for line in print_graph(graph).splitlines() if node is None or node in line]
    if not lines:
        raise InvalidInput(f"{what}: no node or value is named like {node!r} -> edgeforge show {what} lists all")
    print("\n".join([*lines, *(f"; {line}" for line in (deviations(graph, bundle.manifest) if bundle else ()))]))


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help="also a language model's config.json")],
    target: Annotated[str | None, typer.Option(help="a name of `edgeforge targets`, a device, or a YAML file")] = None,
    precision: Annotated[str | None, typer.Option(help="float, w8a8, w8a16, w4a8 or w4a16")] = None,
    context: Annotated[int | None, typer.Option(help="tokens of context, for language models")] = None,
    batch: Annotated[int, typer.Option(help="inputs per inference")] = 1,
    compare: Annotated[str | None, typer.Option(help="more targets: T1,T2")] = None,
    sweep: Annotated[str | None, typer.Option(help="`precision`: every precision of the target")] = None,
    measured: Annotated[str | None, typer.Option(help="TARGET=MS of this model on another chip")] = None,
    top: Annotated[int, typer.Option(min=0, help="how many of the slowest nodes to print")] = 15,
    as_json: Json = False,
) -> None:
    """Latency, energy and memory of MODEL on a target: estimated, not measured, with 80 % intervals."""
    from edgeforge import estimator
    from edgeforge.target import load_target

    names = [*([target] if target else []), *(compare or "").split(",")]
    every = [load_target(name.strip()) for name in names if name.strip()]
    chosen = [one for i, one in enumerate(every) if one not in every[:i]]
    if not chosen:
        raise InvalidInput("estimate needs a target -> --target T, or --compare T1,T2")
    if sweep not in (None, "precision") or (sweep and precision):
        raise InvalidInput(f"--sweep {sweep} -> --sweep precision, without --precision")
    source, elsewhere = estimator.read(model, _say), estimator.measured(measured) if measured else None
    asked = [(t, p) for t in chosen for p in (estimator.sweep(t) if sweep else [precision])]
    found = [estimator.estimate(source, t, p, context, batch, elsewhere) for t, p in asked]
    if as_json:
        documents = [one.document() for one in found]
        _print(documents[0] if compare is None and sweep is None else {"estimates": documents})
        return
    columns = ["target", "precision", "ms", "mJ", "peak MB", "tokens/s", "calibrated"]
    _table(f"{source.name}: estimated, not measured (80 % intervals)", columns, estimator.rows(found))
    if len(found) == 1 and found[0].nodes and top:
        slow = sorted(found[0].nodes, key=lambda node: -node.us)[:top]
        columns = ["node", "op", "us", "bound by", "MACs"]
        _table("slowest nodes", columns, [[n.source or n.name, n.op, n.us, n.bound, n.macs] for n in slow])
    for note in dict.fromkeys(note for one in found for note in one.notes):
        _say(note)


@app.command()
def calibrate(
    target: str,
    measurements: Annotated[Path, typer.Option(help="CSV: model, precision, latency_ms")],
    out: Annotated[Path | None, typer.Option(help="a new target file; default: the target's own")] = None,
    as_json: Json = False,
) -> None:
    """Fit TARGET's speed to measured models and write it, with the fit's residuals, into its YAML."""
    from edgeforge import estimator

    place, found = estimator.calibrate(target, measurements, out, _say)
    if as_json:
        _print({"file": str(place), **dataclasses.asdict(found)})
        return
    print(f"{place}: {found.workloads} measurements, median error {found.before:.1%} before, {found.after:.1%} after")
    _table("farthest from the fit", ["workload", "estimated / measured"], [list(worst) for worst in found.worst])


@app.command()
def bench(
    bundle: Path,
    on: Annotated[str, typer.Option(help="host, hub (Qualcomm AI Hub's devices) or adb (a phone on a cable)")] = "host",
    backend: Annotated[list[str] | None, typer.Option(help="only this artifact (repeatable)")] = None,
    threads: Annotated[int, typer.Option(min=1, help="host, adb: of the runtime; on the host pinned to cores")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="host, adb: timed inferences")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="host, adb: inferences before those")] = 5,
    device: Annotated[
        list[str] | None, typer.Option(help="hub: a device, a target or chipset:NAME (repeatable); default: the target")
    ] = None,
    compile_only: Annotated[bool, typer.Option("--compile-only", help="hub: stop before the device")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="hub: minutes to wait; the run can be gone on with")] = 60,
    runner: Annotated[
        str | None,
        typer.Option(help="adb: executor_runner, qnn_executor_runner or onnxruntime_perf_test; or app: the demo app"),
    ] = None,
    libraries: Annotated[Path | None, typer.Option(help="adb: folder of the runner's shared libraries")] = None,
    serial: Annotated[str | None, typer.Option(help="adb: which phone")] = None,
    any_chip: Annotated[
        bool, typer.Option("--any-chip", help="adb: even if the phone's chip is not the bundle's, or not known")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="hub: say what would be uploaded")] = False,
    as_json: Json = False,
) -> None:
    """Run the artifacts of BUNDLE, check their integers, and keep the figures beside it and in the results database."""
    from edgeforge.bundle import load_bundle
    from edgeforge.devices.store import Store

    opened, names, store = load_bundle(bundle), tuple(backend or ()), Store()
    if on == "host":
        from edgeforge.devices import host

        found = host.bench(opened, names, threads, repeats, warmup, _say)
        for result in found:
            store.add(result, opened)
    elif on == "hub":
        from edgeforge.devices import hub

        if dry_run:
            _print_plan(hub.plan(opened, names, compile_only), device or [opened.target.name], as_json)
            return
        patience = hub.Patience(timeout_s=timeout * 60)
        found = hub.bench(opened, store, tuple(device or ()), names, compile_only, patience, _say)
    elif on == "adb":
        from edgeforge.devices import adb, app

        if runner is None:
            raise InvalidInput("--on adb -> --runner FILE, a program built for the phone, or --runner app")
        if len(names) > 1:
            raise InvalidInput("a runner takes one artifact -> one --backend")
        how = (serial, threads, repeats, warmup, _say)
        if runner == "app":
            if names not in ((), (app.ARTIFACT,)):
                raise InvalidInput(f"the app runs {app.ARTIFACT} -> leave --backend out, or another --runner")
            found = [app.bench(opened, *how, any_chip)]
        else:
            artifact = names[0] if names else None
            found = [adb.bench(opened, Path(runner), *how, artifact, libraries, any_chip)]
        store.add(found[0], opened)
    else:
        raise InvalidInput(f"--on {on} -> host, hub or adb")
    _print_results(found, f"{opened.manifest.model} {opened.manifest.precision} on {on}", as_json)


def _print_plan(uploads: Any, devices: list[str], as_json: bool) -> None:
    rows = [{"artifact": u.artifact, "file": str(u.file), "bytes": u.size, "jobs": list(u.steps)} for u in uploads]
    if as_json:
        _print({"devices": devices, "uploads": rows})
        return
    cells = [[r["artifact"], r["file"], f"{r['bytes'] / 1e6:.2f}", " ".join(r["jobs"])] for r in rows]
    _table(f"would be uploaded for {', '.join(devices)}", ["artifact", "file", "MB", "jobs"], cells)


def _print_results(results: list[Any], title: str, as_json: bool) -> None:
    if as_json:
        _print({"results": [result.document() for result in results]})
        return
    columns = ["artifact", "device", "source", "p50 ms", "p90 ms", "load ms", "peak MB", "golden", "flags"]
    rows = []
    for r in results:
        ms = [r.percentiles_us[p] / 1e3 if r.latency_us else None for p in ("p50", "p90")]
        golden = r.golden.status if r.golden.identical in (None, 1) else f"{r.golden.identical:.2%} identical"
        about = [r.label, r.device.name, r.source, *ms, r.load_ms, r.peak_memory_mb, golden, "; ".join(r.flags)]
        rows.append(about)
    _table(title, columns, rows)


@app.command()
def ingest(
    file: Path,
    bundle: Annotated[Path | None, typer.Option(help="what was run; default: the known bundle of that hash")] = None,
    as_json: Json = False,
) -> None:
    """Check a device's result FILE against its bundle, flag what is wrong with it, and keep it."""
    from edgeforge.devices.store import Store
    from edgeforge.devices.store import ingest as run

    result, fresh = run(file, bundle, Store())
    _print_results([result], f"{file}: {'kept' if fresh else 'known already'}", as_json)


@app.command()
def results(
    model: str | None = None,
    artifact: str | None = None,
    device: str | None = None,
    devices: Annotated[bool, typer.Option("--devices", help="real devices only: the table to compare them by")] = False,
    export: Annotated[Path | None, typer.Option(help="write the rows to .csv, or whole results to .json")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of a result")] = False,
    as_json: Json = False,
) -> None:
    """Query the results database (EDGEFORGE_RESULTS)."""
    from edgeforge.devices.result import DeviceResult
    from edgeforge.devices.store import COLUMNS, Store, to_csv

    if schema:
        _print(DeviceResult.model_json_schema(by_alias=True))
        return
    if export is not None and export.suffix not in (".csv", ".json"):
        raise InvalidInput(f"--export {export} -> a file that ends in .csv or .json")
    store = Store()
    rows = store.rows(devices, model=model, artifact=artifact, device=device)
    if export is not None:
        chosen = {(row["run_id"], row["artifact"]) for row in rows}
        whole = [r.document() for r in store.documents() if (r.run_id, r.label) in chosen]
        export.write_text(to_csv(rows) if export.suffix == ".csv" else json.dumps({"results": whole}, indent=1) + "\n")
    if as_json:
        _print({"results": rows})
        return
    shown = [c for c in COLUMNS if c not in ("soc", "target", "run_id")]
    _table("real devices" if devices else "results", shown, [[row[c] for c in shown] for row in rows])


@app.command()
def report(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...")],
    out: Annotated[Path | None, typer.Option(help="the page; default: BUNDLE.html, or report.html for several")] = None,
    compare: Annotated[bool, typer.Option(help="put the bundles side by side")] = False,
    run: Annotated[bool, typer.Option(help="run every artifact that runs here, not the simulator alone")] = True,
    per_node: Annotated[
        list[str] | None, typer.Option("--per-node", help="compare each node on this backend (repeatable; slow)")
    ] = None,
) -> None:
    """Write one HTML page over BUNDLEs and their results, that opens offline, and print its summary."""
    from edgeforge.report.gather import gather
    from edgeforge.report.page import render, summary

    facts = [one for bundle in bundles for one in gather(bundle, run, per_node or (), _say)]
    place = out or (
        bundles[0].resolve().with_name(f"{bundles[0].resolve().name}.html")
        if len(bundles) == 1
        else Path("report.html")
    )
    place.write_text(render(facts, compare))
    for one in facts:
        columns, rows = summary(one)
        _table(one.name, columns, rows)
    print(f"report: {place}")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="models, targets, precisions, methods")],
    out: Annotated[Path, typer.Option(help="folder of the trials; the same folder again resumes")],
    executor: Annotated[str, typer.Option(help="processes, dask or ray")] = "processes",
    address: Annotated[str | None, typer.Option(help="dask, ray: of the cluster")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="also run what failed before")] = False,
    as_json: Json = False,
) -> None:
    """Export and validate every combination; failures don't stop the rest."""
    from edgeforge import sweep as sweeping

    found = sweeping.run(file, out, executor, address, retry, _say)
    if as_json:
        _print({"trials": found})
        return
    columns = ["model", "target", "precision", "method", "backend", "identical", "SQNR dB", "metric", "how"]
    _table(f"{file}: {len(found)} trials", columns, sweeping.rows(found))


@app.command()
def targets(as_json: Json = False) -> None:
    """List the catalogue of targets."""
    from edgeforge.target import load_target, names

    found = [load_target(name) for name in names()]
    if as_json:
        _print({"targets": [target.model_dump(mode="json") for target in found]})
    else:
        rows = [[t.name, t.description, " ".join(t.precisions), " ".join(t.backends)] for t in found]
        _table("targets", ["name", "description", "precisions", "backends"], rows)


@app.command()
def ops(
    as_json: Json = False, markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False
) -> None:
    """The op support matrix: rounding rule and its status per numerics profile."""
    from edgeforge.support import markdown as table
    from edgeforge.support import support

    rows = support()
    if as_json:
        _print({"ops": rows})
    elif markdown:
        print(table(), end="")
    else:
        for width, title in (("u8", "ops at 8 bits"), ("u16", "ops at 16 bits")):
            cells = [[f"{p[width]['status']} ({p[width]['rule']})" for p in row["numerics"].values()] for row in rows]
            columns = ["op", *rows[0]["numerics"]]
            _table(title, columns, [[row["op"], *cell] for row, cell in zip(rows, cells, strict=True)])


@app.command()
def conformance(
    target: Annotated[str, typer.Option(help="a name of `edgeforge targets`, or a YAML file")],
    backend: Annotated[str, typer.Option(help="the real runtime to compare with")] = "ort_qnn",
    op: Annotated[list[str] | None, typer.Option(help="only this op (repeatable)")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="only this precision (repeatable)")] = None,
    samples: Annotated[int, typer.Option(min=1, help="cases per op and precision")] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    keep: Annotated[Path | None, typer.Option(help="folder for the worst case of every row that differs")] = None,
    write: Annotated[Path | None, typer.Option(help="page whose section of this target and backend is renewed")] = None,
    as_json: Json = False,
) -> None:
    """Random one-op graphs on a real runtime and on the simulator: share of equal integers per op and precision."""
    from edgeforge.conformance import page
    from edgeforge.conformance.run import conformance as run
    from edgeforge.conformance.run import select
    from edgeforge.target import load_target

    chosen = load_target(target)
    rows = run(chosen, backend, select(op or (), precision or ()), samples, seed, keep, _say)
    found = page.document(chosen, backend, seed, samples, rows)
    if write is not None:
        page.write(write, found)
    if as_json:
        _print(found)
    else:
        columns = ["op", "precision", "cases", "integers", "identical", "max_lsb", "rule", "refused"]
        _table(
            f"{chosen.name}: {backend}, {found['source']}", columns, [[r[c] for c in columns] for r in found["rows"]]
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """What works in this environment, and what to do about what does not."""
    from edgeforge.backends import backend, names
    from edgeforge.bundle import tool_versions

    found = []
    for name in names():
        chosen = backend(name)
        build, run = chosen.missing(), chosen.cannot_run()
        reason = "; ".join(dict.fromkeys(why for why in (build, run) if why))
        found.append(
            {"backend": name, "summary": chosen.summary, "exports": not build, "runs": not run, "remedy": reason}
        )
    if as_json:
        _print({"tools": tool_versions(), "backends": found})
    else:
        words = {True: "yes", False: "no"}
        rows = [[f["backend"], f["summary"], words[f["exports"]], words[f["runs"]], f["remedy"]] for f in found]
        _table("backends here", ["backend", "what", "exports", "runs here", "remedy"], rows)


#: The exit code by which typer ends after Ctrl-C.
INTERRUPTED = 130


def main() -> None:
    """Entry point: errors a user can act on print without a traceback and exit with code 2."""
    # Deprecations inside the libraries are for us, not for the user.
    warnings.filterwarnings("ignore")
    try:
        app()
    except EdgeForgeError as error:
        _fail(f"{type(error).__name__}: {error}")
    except OSError as error:
        place = error.filename or "file system"
        _fail(f"{place}: {error.strerror or error} -> free space or choose another folder")
    except SystemExit as done:
        if done.code == INTERRUPTED:
            _fail("interrupted: no output was written")
        raise


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
