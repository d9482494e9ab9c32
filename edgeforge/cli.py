"""The command line: one short function per verb. JSON on stdout with --json, progress on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeforge.errors import EdgeForgeError

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
    precision: Annotated[str | None, typer.Option(help="w8a8, w8a16, w4a8, w4a16, with -b16|32|64 block-wise")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="build only this backend (repeatable)")] = None,
    recipe: Annotated[Path | None, typer.Option(help="recipe YAML")] = None,
    requantize: Annotated[bool, typer.Option(help="drop the encodings that a QDQ model brings along")] = False,
    set: Annotated[list[str] | None, typer.Option("--set", help="recipe entry, a.b=value (repeatable)")] = None,
) -> None:
    """Lower MODEL (embedded name, .onnx, .pt2, package.module:callable) into a bundle."""
    from edgeforge.errors import InvalidInput
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
    as_json: Json = False,
) -> None:
    """Compare every artifact of BUNDLE with the simulator and the float model. Exit code 1: a bound was missed."""
    from edgeforge.bundle import load_bundle
    from edgeforge.pipeline import find_data, load
    from edgeforge.validate import validate as run

    opened = load_bundle(bundle)
    source = load(model) if model else None
    found = find_data(data, "heldout", source, opened.graph, opened.recipe, bundle) if data else None
    found = found.head(samples) if found is not None and samples else found
    results = run(opened, found, source.imported.graph if source else None, tuple(backend or ()), _say)
    if as_json:
        _print({"artifacts": [{k: v for k, v in dataclasses.asdict(r).items() if k != "misses"} for r in results]})
    else:
        columns = ["backend", "ran", "identical", "max LSB", "SQNR dB", "cosine", "metric", "float", "source"]
        rows = []
        for r in results:
            metric = r.metric or {"name": None, "value": None, "float": None}
            how = r.source if r.ran else r.reason
            rows.append(
                [r.backend, r.ran, r.identical, r.max_lsb, r.sqnr_db, r.cosine, metric["value"], metric["float"], how]
            )
        _table(f"{opened.manifest.model} {opened.manifest.precision}", columns, rows)
    for result in results:
        for miss in result.misses:
            print(f"{result.backend}: {miss}", file=sys.stderr)
    if any(result.misses for result in results):
        raise typer.Exit(1)


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
def show(bundle: Path, node: str | None = None) -> None:
    """Print the integer graph of BUNDLE, or the lines that name NODE."""
    from edgeforge.bundle import load_bundle
    from edgeforge.ir.text import print_graph

    for line in print_graph(load_bundle(bundle).graph).splitlines():
        if node is None or node in line:
            print(line)


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
def ops(as_json: Json = False) -> None:
    """The op support matrix: rounding rule and its status per numerics profile."""
    import edgeforge.ops  # noqa: F401
    from edgeforge.ir.op import OPS
    from edgeforge.ir.rules import PROFILES, RULES

    rows = []
    for op in sorted(OPS.values(), key=lambda op: op.name):
        rules = {p: PROFILES[p]["u8"][op.numerics] if op.numerics != "move" else "move" for p in PROFILES}
        status = {
            p: f"{rule} ({RULES[rule].status})" if rule in RULES else "exact (moves codes)" for p, rule in rules.items()
        }
        rows.append({"op": op.name, "doc": (op.doc or "").strip(), "numerics": status})
    if as_json:
        _print({"ops": rows})
    else:
        _table("ops at 8 bits", ["op", *PROFILES], [[r["op"], *r["numerics"].values()] for r in rows])


@app.command()
def doctor(as_json: Json = False) -> None:
    """What works in this environment, and what to do about what does not."""
    from edgeforge.backends import backend, names
    from edgeforge.bundle import tool_versions

    found = [{"backend": name, "works": not (why := backend(name).missing()), "reason": why} for name in names()]
    if as_json:
        _print({"tools": tool_versions(), "backends": found})
    else:
        _table(
            "backends here", ["backend", "works", "remedy"], [[f["backend"], f["works"], f["reason"]] for f in found]
        )


def main() -> None:
    """Entry point: errors a user can act on print without a traceback and exit with code 2."""
    try:
        app()
    except EdgeForgeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(
            f"{error.filename or 'file system'}: {error.strerror} -> free space or choose another folder",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
