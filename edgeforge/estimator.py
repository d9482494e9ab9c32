"""The estimator behind the command line: from the names a user gives to estimates and calibrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeforge.bundle import MANIFEST, load_bundle
from edgeforge.errors import InvalidInput, Unsupported
from edgeforge.estimate import calibrate as fitting
from edgeforge.estimate.decoder import Decoder, read_config
from edgeforge.estimate.estimate import Elsewhere, Estimate, estimate_decoder, estimate_program
from edgeforge.estimate.program import Program, from_graph
from edgeforge.estimate.work import PRECISIONS
from edgeforge.pipeline import Progress, load
from edgeforge.target import Target, load_target, target_file

CONTEXT = 4096


@dataclass(frozen=True)
class Source:
    """What is estimated: a program or a decoder; ``precision``: of a bundle, fixed."""

    name: str
    work: Program | Decoder
    precision: str | None = None


def read(name: str, say: Progress = lambda line: None) -> Source:
    """A bundle's folder, a decoder's config.json, or a model as for `pipeline.load`. An ONNX model that EdgeForge
    cannot lower is read by shapes alone.

    Raises InvalidInput or Unsupported."""
    path = Path(name)
    if (path / MANIFEST).is_file():
        bundle = load_bundle(path)
        return Source(bundle.manifest.model, from_graph(bundle.graph), bundle.manifest.precision)
    if path.suffix == ".json":
        return Source(path.resolve().parent.name, read_config(path))
    try:
        return Source(name, from_graph(load(name).imported.graph))
    except Unsupported as error:
        if path.suffix != ".onnx":
            raise
        from edgeforge.estimate.sketch import from_onnx

        say(f"EdgeForge cannot lower {path.name} ({len(error.reasons)} reasons): estimated from its shapes")
        return Source(name, from_onnx(path))


def estimate(
    model: Source, target: Target, precision: str | None = None, context: int | None = None, batch: int = 1,
    elsewhere: Elsewhere | None = None,
) -> Estimate:  # fmt: skip
    """Estimate ``model`` on ``target``. precision: default w8a8 (w4a16 for decoders, and of a bundle its own).

    Raises InvalidInput for options that the model has no use for."""
    if isinstance(model.work, Decoder):
        if precision not in (None, "w4a16") or batch != 1 or elsewhere is not None:
            raise InvalidInput("a decoder's config.json is estimated at w4a16, batch 1, without other measurements")
        return estimate_decoder(model.name, model.work, target, CONTEXT if context is None else context)
    if context is not None:
        raise InvalidInput("--context is for decoders -> name the config.json of a language model")
    if model.precision is not None and precision not in (None, model.precision):
        raise InvalidInput(f"the bundle is {model.precision} -> estimate the model it was made from at {precision}")
    if batch < 1:
        raise InvalidInput(f"batch {batch} -> at least 1")
    return estimate_program(batched(model.work, batch), target, precision or model.precision or "w8a8", elsewhere)


def batched(program: Program, batch: int) -> Program:
    """``program`` with its leading dimensions, and so its work, ``batch`` times as large."""
    if batch == 1:
        return program
    shapes = {name: (shape[0] * batch, *shape[1:]) if shape else shape for name, shape in program.shapes.items()}
    layers = tuple(replace(layer, macs=layer.macs * batch) for layer in program.layers)
    return replace(program, shapes=shapes, layers=layers)


def sweep(target: Target) -> list[str]:
    """The precisions that `estimate` tells apart and ``target`` offers."""
    return [name for name in PRECISIONS if name in target.precisions or (name == "float" and target.fp16)]


def measured(text: str) -> Elsewhere:
    """``TARGET=MILLISECONDS`` of the command line."""
    name, equals, value = text.rpartition("=")
    try:
        latency_ms = float(value)
    except ValueError:
        latency_ms = 0.0
    if not equals or not 0 < latency_ms < float("inf"):
        raise InvalidInput(f"--measured {text!r} -> TARGET=MILLISECONDS")
    return Elsewhere(load_target(name), latency_ms)


def calibrate(
    name: str, measurements: Path, out: Path | None, say: Progress = lambda line: None
) -> tuple[Path, fitting.Calibration]:
    """Fit target ``name`` to a CSV (see `fitting.read_points`; models as for `read`, paths relative to the CSV or to
    here) and write its factors to its YAML, or to ``out``: a new target file.

    Raises InvalidInput before anything is written."""
    target, file = load_target(name), target_file(name)
    points = fitting.read_points(measurements)
    programs = {model: _program(model, measurements.parent, say) for model in dict.fromkeys(p.model for p in points)}
    found = fitting.calibrate(target, points, programs)
    place = out or file
    if out is not None:
        if out.suffix not in (".yaml", ".yml"):
            raise InvalidInput(f"--out {out} -> a file that ends in .yaml")
        out.write_text(file.read_text())
    fitting.write_latency(
        place, {"factors": found.factors, "calibration": fitting.provenance(measurements.name, found)}
    )
    return place, found


def _program(model: str, beside: Path, say: Progress) -> Program:
    near = beside / model
    say(f"reading {model}")
    work = read(str(near) if near.exists() else model, say).work
    if isinstance(work, Decoder):
        raise InvalidInput(f"{model}: factors are not fitted to language models -> measure other models")
    return work


def rows(estimates: Sequence[Estimate]) -> list[list[str]]:
    """One line per estimate, for a table of targets or precisions."""
    return [
        [
            e.target,
            e.precision,
            f"{e.latency_ms.p50:.3g} ({e.latency_ms.low:.3g} to {e.latency_ms.high:.3g})",
            f"{e.energy_mj.p50:.3g} ({e.energy_mj.low:.3g} to {e.energy_mj.high:.3g})",
            f"{e.peak_memory_mb.p50:.0f}",
            f"{e.tokens_per_second.p50:.1f}" if e.tokens_per_second else "-",
            "yes" if e.calibrated else "no: wide interval",
        ]
        for e in estimates
    ]
