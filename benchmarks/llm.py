"""docs/llm.md: language models with a cache on every backend: perplexity, text, agreement. Run from the repository:

    python -m benchmarks.llm FOLDER [--write docs/llm.md]

FOLDER receives bundles (kept: a second run goes on from them) and figures.json. The llama2.c model and its stories come
from EDGEFORGE_DATA; without them only tinylm is run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeforge.bundle import MANIFEST, Bundle, load_bundle
from edgeforge.llm.evaluate import artifact_scorer, float_scorer, perplexity, simulator_scorer, text_of, windows
from edgeforge.llm.generate import continued, prompt_tokens
from edgeforge.llm.quantize import read_texts
from edgeforge.llm.session import opened
from edgeforge.models import load_model
from edgeforge.pipeline import export

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("EDGEFORGE_DATA", ROOT.parent / "shared" / "data"))
TARGET = "snapdragon-8-gen-3"
PRECISIONS = ("w8a8", "w4a16-b32")
PROMPTS = ("Once upon a time", "Lily and Tom went to the park.", "One day, a little cat")
TOKENS = 64
#: Context of the one window that artifacts are scored on; the emulator takes about 0.2 s per token.
FEW = 64
STORIES = slice(600, 608)


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
    arguments = parser.parse_args()
    kept = arguments.folder / "figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name, model, calibration, texts, what in models():
        for precision in PRECISIONS:
            key = f"{name}-{precision}"
            if key not in figures:
                _say(key)
                out = arguments.folder / key
                if not (out / MANIFEST).is_file():
                    export(model, TARGET, out, calibration, precision, say=_say)
                figures[key] = {"text": what, **measured(load_bundle(out), model, texts)}
                kept.write_text(json.dumps(figures, indent=1))
    if arguments.write:
        arguments.write.write_text(page(figures))


INTRODUCTION = f"""\
# Language models with a cache

Written by `python -m benchmarks.llm FOLDER --write docs/llm.md` for {TARGET}. Hexagon figures come from Qualcomm's HTP
emulator on x86-64, never from a phone; XNNPACK and ONNX Runtime ran on x86-64.

Perplexity is per token, over disjoint windows led by `<s>`, which is not scored. *all*: every window of 512 tokens;
*first*: the first {FEW} tokens, one by one through the decode graph. *fake-quant* is float arithmetic rounded to the
same encodings. *equal*: greedy tokens that agree with the simulator before the first that does not, for {len(PROMPTS)}
prompts of up to {TOKENS} tokens (a text may end earlier); the simulator follows Hexagon's rules."""


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def measured(bundle: Bundle, model: str, texts: list[str]) -> dict[str, Any]:
    """Perplexity on all windows and on the first, and the greedy text of each prompt with its departure, by engine."""
    language = load_model(model).language
    assert language is not None
    text = text_of(bundle, 0)
    every, first = windows(texts, text, None, None), windows(texts, replace(text, context=FEW), None, 1)
    found: dict[str, Any] = {"tokens": every.tokens, "first_tokens": first.tokens, "engines": {}, "skipped": {}}
    own = {
        "float": float_scorer(language, text.context),
        "fake-quant": simulator_scorer(bundle, fake=True),
        "simulator": simulator_scorer(bundle),
    }
    for engine, score in own.items():
        _say(engine)
        found["engines"][engine] = {"all": perplexity(score, every), "first": perplexity(score, first)}
    reference: list[list[int]] = []
    for name, record in bundle.manifest.backends.items():
        if record.status != "built":
            found["skipped"][name] = record.reason
            continue
        _say(name)
        row = found["engines"].setdefault(name, {})
        with opened(bundle, name) as session:
            if name != "simulator":
                row["first"] = perplexity(artifact_scorer(session), first)
            made, texts_made = [], []
            for prompt in PROMPTS:
                session.restart()
                pieces = list(continued(bundle, session, prompt_tokens(bundle, prompt), TOKENS))
                made.append([token for token, _ in pieces])
                texts_made.append(prompt + "".join(piece for _, piece in pieces))
        reference = reference or made
        row["text"] = texts_made
        row["equal"] = [_equal(a, b) for a, b in zip(reference, made, strict=True)]
        row["of"] = [len(tokens) for tokens in reference]
    return found


def _equal(a: list[int], b: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def page(figures: dict[str, Any]) -> str:
    lines = [
        INTRODUCTION,
    ]
    for key, row in figures.items():
        lines += [
            "",
            f"## {key}",
            "",
            f"{row['text']}: {row['tokens']} tokens in all windows, {row['first_tokens']} in the first.",
            "",
        ]
        lines += ["| engine | all | first | equal |", "|---|---|---|---|"]
        for engine, figure in row["engines"].items():
            numbers = [f"{figure[part]:.4f}" if part in figure else "" for part in ("all", "first")]
            equal = ", ".join(
                f"{n} of {of}" for n, of in zip(figure.get("equal", ()), figure.get("of", ()), strict=True)
            )
            lines.append(f"| {engine} | {numbers[0]} | {numbers[1]} | {equal} |")
        lines += [f"\n{name} is not built: {reason}" for name, reason in row["skipped"].items()]
        shown = {e: f["text"][0] for e, f in row["engines"].items() if "text" in f}
        for text in dict.fromkeys(shown.values()):
            names = ", ".join(engine for engine, other in shown.items() if other == text)
            lines += ["", f"{names}:", "", *(f"> {line}" for line in text.splitlines())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
