"""docs/llm.md: language models with a cache on every backend: perplexity, text, agreement, size. From the repository:

    python -m benchmarks.llm FOLDER [--write docs/llm.md] [--only MODEL-PRECISION ...]

FOLDER receives bundles and figures.json, both kept: a second run goes on from them, engine by engine, as long as the
graphs are the same. The llama2.c model and its stories come from EDGEFORGE_DATA; without them only tinylm is run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge import backends
from edgeforge.bundle import MANIFEST, Bundle, load_bundle
from edgeforge.llm.evaluate import (
    Text,
    Windows,
    artifact_scorer,
    float_scorer,
    perplexity,
    scoring,
    simulator_scorer,
    text_of,
    windows,
)
from edgeforge.llm.generate import continued, prompt_tokens
from edgeforge.llm.quantize import read_texts
from edgeforge.llm.session import opened
from edgeforge.models import load_model
from edgeforge.pipeline import export

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("EDGEFORGE_DATA", ROOT.parent / "shared" / "data"))
TARGET = "snapdragon-8-gen-3"
PRECISIONS = ("w8a8", "w4a16-b32", "8da4w-b32")
PROMPTS = ("Once upon a time", "Lily and Tom went to the park.", "One day, a little cat")
TOKENS = 64
#: Windows that artifacts are scored on: the emulator takes seconds per prefill step.
FEW = 2
STORIES = slice(600, 608)
#: The bundle whose artifacts are built with the weights of both graphs once and twice.
SIZED = "stories260K-w8a8"


def models() -> Iterator[tuple[str, str, str, list[str], str]]:
    """(name, model, calibration, held-out texts, what these are)."""
    base = ROOT / "models" / "tinylm"
    yield "tinylm", str(base), "embedded", read_texts(base / "heldout.txt"), "models/tinylm/heldout.txt"
    file, stories = DATA / "lm_stories260k" / "stories260K.bin", DATA / "text_tinystories" / "tinystories_800.json"
    if file.is_file():
        yield (
            "stories260K",
            str(file),
            str(stories),
            read_texts(stories)[STORIES],
            f"TinyStories {STORIES.start}-{STORIES.stop - 1}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", nargs="+")
    arguments = parser.parse_args()
    kept = arguments.folder / "figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}

    def keep() -> None:
        kept.write_text(json.dumps(figures, indent=1))

    for name, model, calibration, texts, what in models():
        for precision in PRECISIONS:
            key, out = f"{name}-{precision}", arguments.folder / f"{name}-{precision}"
            if arguments.only and key not in arguments.only:
                continue
            _say(key)
            if not (out / MANIFEST).is_file():
                export(model, TARGET, out, calibration, precision, say=_say)
            bundle = load_bundle(out)
            if figures.get(key, {}).get("graph") != bundle.manifest.graph_hash:
                figures[key] = {"graph": bundle.manifest.graph_hash, "text": what, "engines": {}}
            measure(bundle, model, texts, figures[key], keep)
            if key == SIZED and "sizes" not in figures:
                figures["sizes"] = sizes(bundle)
                keep()
    if arguments.write:
        arguments.write.write_text(page(figures))


def measure(bundle: Bundle, model: str, texts: list[str], found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fill ``found`` with what it lacks: per engine perplexities, of artifacts also the greedy text of each prompt,
    where it departs from the simulator's, equal integers on golden steps, and of runtimes the speed."""
    text = text_of(bundle, 0)
    every, few = windows(texts, text, None, None), windows(texts, text, None, FEW)
    found |= {"tokens": every.tokens, "few_tokens": few.tokens, "skipped": {}}
    for name, score in _own_engines(bundle, model, text):
        row = found["engines"].setdefault(name, {})
        if "all" not in row:
            _say(name)
            row |= {"all": perplexity(score, every), "few": perplexity(score, few)}
            keep()
    for name, record in bundle.manifest.backends.items():
        if record.status != "built":
            found["skipped"][name] = record.reason
            continue
        row = found["engines"].setdefault(name, {})
        if "few" not in row:
            _say(f"{name}: perplexity")
            row["few"] = scored(bundle, name, few)
            keep()
        if name != "simulator" and "prefill" not in row:
            _say(f"{name}: golden steps")
            row |= equal_integers(bundle, name)
            keep()
        if "tokens" not in row:
            _say(f"{name}: text")
            row |= greedy(bundle, name)
            keep()


def _own_engines(bundle: Bundle, model: str, text: Text) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    language = load_model(model).language
    assert language is not None
    yield "float", float_scorer(language, text.context)
    if bundle.graph.level == "integer":
        yield "fake-quant", simulator_scorer(bundle, fake=True)
    yield "simulator", simulator_scorer(bundle)


def scored(bundle: Bundle, name: str, data: Windows) -> float:
    with scoring(bundle, name) as session:
        return perplexity(artifact_scorer(session), data)


def equal_integers(bundle: Bundle, name: str) -> dict[str, float]:
    """Per graph the share of output integers on the bundle's golden steps that are the simulator's; of graphs with
    float outputs the largest difference in units of the outputs' standard deviation."""
    found = {}
    for part in bundle.parts:
        got = backends.backend(name).run(part.artifact(name), part.graph, part.target, part.golden_part("input"))
        golden = part.golden_part("output")
        a, b = (np.concatenate([x[output].ravel() for output in part.graph.outputs]) for x in (got, golden))
        integer = part.graph.level == "integer"
        found[part.part] = float((a == b).mean()) if integer else float(np.abs(a - b).max() / b.std())
    return found


def greedy(bundle: Bundle, name: str) -> dict[str, Any]:
    """Tokens and text behind each prompt; of timed runtimes the median decode step's speed."""
    tokens, texts, steps = [], [], []
    with opened(bundle, name) as session:
        for prompt in PROMPTS:
            session.restart()
            pieces = list(continued(bundle, session, prompt_tokens(bundle, prompt), TOKENS))
            tokens.append([token for token, _ in pieces])
            texts.append(prompt + "".join(piece for _, piece in pieces))
        steps = [seconds for count, seconds in session.seconds if count == 1]
    found: dict[str, Any] = {"tokens": tokens, "text": texts}
    if backends.backend(name).timed:
        found["per_second"] = 1 / statistics.median(steps)
    return found


def sizes(bundle: Bundle) -> dict[str, list[int]]:
    """Bytes of what a phone loads, per backend: prefill's, decode's, and both with their weights once."""
    graphs, found = {part.part: part.graph for part in bundle.parts}, {}
    for name in ("ort_qnn", "executorch_qnn", "executorch_xnnpack"):
        _say(f"{name}: sizes")
        chosen = backends.backend(name)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            backends.apart(chosen, graphs, bundle.target, folder)
            apart = [_loaded(folder / part) for part in graphs]
            together = folder / "together"
            together.mkdir()
            files = backends.compile_parts(chosen, graphs, bundle.target, together, shared=True).files
            shared = [together / file for file in files if "shared" in file] or [together / file for file in files]
            found[name] = [*apart, sum(file.stat().st_size for file in shared if file.suffix in (".bin", ".pte"))]
    return found


def _loaded(folder: Path) -> int:
    """Bytes of context binaries and programs."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".bin", ".pte"))


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


INTRODUCTION = f"""\
# Language models with a cache

Written by `python -m benchmarks.llm FOLDER --write docs/llm.md` for {TARGET}. Hexagon figures come from Qualcomm's HTP
emulator on x86-64, never from a phone; XNNPACK and ONNX Runtime ran on x86-64.

Perplexity is per token, over disjoint windows of up to 512 tokens led by `<s>`, which is not scored: *all* windows, and
the *first {FEW}*, which artifacts are scored on too (their prefill graph, compiled once more with the logits of every
token). *fake-quant* is float arithmetic rounded to the same encodings. *prefill*, *decode*: share of all output
integers of each graph (logits, new keys and values) that are the simulator's, on the bundle's golden steps; of 8da4w,
whose outputs are floats, the largest difference in standard deviations. *greedy*: tokens that agree with the simulator
before the first that does not, for {len(PROMPTS)} prompts of up to {TOKENS} tokens (a text may end earlier). The
simulator follows Hexagon's rules, so that other runtimes' integers are others. *tokens/s*: median decode step on this
host, whose two CPUs other work shared."""


def page(figures: dict[str, Any]) -> str:
    lines = [INTRODUCTION]
    for key, row in figures.items():
        if key != "sizes":
            lines += section(key, row)
    if "sizes" in figures:
        lines += ["", *weights_once(figures["sizes"])]
    return "\n".join(lines) + "\n"


def section(key: str, row: dict[str, Any]) -> list[str]:
    few = f"first {FEW}"
    what = f"{row['text']}: {row['tokens']} tokens in all windows, {row['few_tokens']} in the {few}."
    lines = ["", f"## {key}", "", what, ""]
    lines += [f"| engine | all | {few} | prefill | decode | greedy | tokens/s |", "|---|---|---|---|---|---|---|"]
    reference = row["engines"]["simulator"].get("tokens", ())
    for engine, found in row["engines"].items():
        numbers = [f"{found[part]:.4f}" if part in found else "" for part in ("all", "few")]
        style = ".2g" if "8da4w" in key else ".2%"
        numbers += [format(found[part], style) if part in found else "" for part in ("prefill", "decode")]
        pairs = zip(reference, found.get("tokens", ()), strict=False)
        greedy = ", ".join(f"{_equal(a, b)} of {len(a)}" for a, b in pairs)
        speed = f"{found['per_second']:.0f}" if "per_second" in found else ""
        lines.append(f"| {' | '.join([engine, *numbers, greedy, speed])} |")
    lines += [f"\n{name} is not built: {reason}" for name, reason in row["skipped"].items()]
    shown = {engine: found["text"][0] for engine, found in row["engines"].items() if "text" in found}
    for text in dict.fromkeys(shown.values()):
        names = ", ".join(engine for engine, other in shown.items() if other == text)
        lines += ["", f"{names}:", "", *(f"> {line}" for line in text.splitlines())]
    return lines


def _equal(a: list[int], b: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def weights_once(found: dict[str, list[int]]) -> list[str]:
    """The table of sizes."""
    lines = [
        "## Weights once",
        "",
        f"Bytes that a phone loads for {SIZED}. XNNPACK's program has a method for each graph and keeps equal",
        "constants once. Hexagon's contexts share weights on request (`--set language.shared_context=true`): the",
        "emulator refuses to load such a context (QNN error 1000, not supported), while one with both graphs and their",
        "weights twice runs, so that the artifacts that run here are built beside it.",
        "",
        "| backend | prefill | decode | both, weights once | saved |",
        "|---|---|---|---|---|",
    ]
    for name, (prefill, decode, once) in found.items():
        lines.append(f"| {name} | {prefill:,} | {decode:,} | {once:,} | {1 - once / (prefill + decode):.0%} |")
    return lines


if __name__ == "__main__":
    main()
