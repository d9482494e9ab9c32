"""Quality of a language model: perplexity of texts, multiple choice by likelihood; float, fake-quantized, integer."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeforge import backends
from edgeforge.bundle import Bundle
from edgeforge.data import load_tokenizer
from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph
from edgeforge.ir.op import OPS
from edgeforge.llm.prefix import prefix_of
from edgeforge.llm.quantize import read_texts
from edgeforge.llm.session import Session, opened
from edgeforge.llm.steps import positions_and_masks
from edgeforge.progress import track
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import simulate

if TYPE_CHECKING:
    from edgeforge.frontend.language import Language

#: Sequences of equal length that run together where the engine takes batches.
BATCH = 8

#: Added to the protocol where artifacts are scored.
ARTIFACTS = "; artifacts run with a prefill graph that keeps the logits of every token"

#: Token ids [B, N] -> log-probabilities [B, N - 1] of each token behind the first.
Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Text:
    """How texts become tokens: tokenizer, the id that begins a text, and the context."""

    tokenizer: Any
    bos: int | None
    context: int


def text_of(source: Bundle | Language, context: int) -> Text:
    if not isinstance(source, Bundle):
        return Text(source.encoder(), source.bos, context)
    record = source.manifest.language
    if record is None:
        raise InvalidInput(f"{source.path} holds no prefill and decode graphs -> export a Hugging Face folder")
    return Text(load_tokenizer(source.path / record.tokenizer), record.bos, record.context)


# ------------------------------------------------------------------------------------------------------------- engines


def float_scorer(language: Language, context: int) -> Scorer:
    """The float model, a whole sequence at once."""
    import torch

    decoder, c = language.decoder(context), language.config

    def score(ids: np.ndarray) -> np.ndarray:
        batch, count = ids.shape
        made = positions_and_masks([0] * batch, count, count, 0, c.masks)
        empty = [
            torch.zeros(batch, c.kv_heads, c.head_dim, 0),
            torch.zeros(batch, c.kv_heads, 0, c.head_dim),
        ] * c.layers
        with torch.no_grad():
            logits = decoder(torch.from_numpy(ids), *map(torch.from_numpy, made), *empty)[0].numpy()
        return chosen(logits[:, :-1], ids[:, 1:])

    return score


def simulator_scorer(bundle: Bundle, fake: bool = False) -> Scorer:
    """The simulator's integers (or, ``fake``, float arithmetic rounded to the same encodings): prefill steps that keep
    the logits of every token."""
    run = rounded if fake else simulate
    graphs = {part.part: with_profile(part.graph, bundle.target.numerics) for part in bundle.parts}
    graphs["prefill"] = all_logits(graphs["prefill"])
    steps = {name: lambda feeds, graph=graph: run(graph, feeds) for name, graph in graphs.items()}
    record, prefix = bundle.manifest.language, prefix_of(bundle)
    assert record is not None

    def score(ids: np.ndarray) -> np.ndarray:
        return _scores(Session(graphs, steps, record.windows, prefix, len(ids)), ids, chunked=True)

    return score


def artifact_scorer(session: Session) -> Scorer:
    """An artifact, one sequence after another: prefill steps where its graph keeps the logits of every token, else
    decode steps."""
    chunked = session.graphs["prefill"].type("logits").shape[1] == session.chunk

    def score(ids: np.ndarray) -> np.ndarray:
        rows = []
        for row in ids:
            session.restart()
            rows.append(_scores(session, row[None], chunked))
        return np.concatenate(rows)

    return score


@contextmanager
def scoring(bundle: Bundle, backend: str) -> Iterator[Session]:
    """A session on a backend's artifact, and on its prefill graph compiled once more so that it keeps the logits of
    every token. Raises as `opened`."""
    chosen, graph = backends.backend(backend), all_logits(bundle.parts[0].graph)
    with opened(bundle, backend) as session, TemporaryDirectory(prefix="edgeforge-") as folder:
        chosen.compile(graph, bundle.target, Path(folder))
        with chosen.opened(Path(folder), graph, bundle.target) as prefill:
            graphs, steps = ({**session.graphs, "prefill": graph}, {**session.steps, "prefill": prefill})
            yield Session(graphs, steps, session.windows, session.prefix)


def _scores(session: Session, ids: np.ndarray, chunked: bool) -> np.ndarray:
    q, at, found = session.graphs["decode"].type("logits").q, 0, []
    for count, codes in session.walk(ids[:, :-1], chunked):
        codes = codes[:, codes.shape[1] - count :]
        found.append(chosen(codes if q is None else q.dequantize(codes), ids[:, at + 1 : at + 1 + count]))
        at += count
    return np.concatenate(found, 1)


def chosen(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities (nats) of ``ids`` [B, N] under logits [B, N, vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.take_along_axis(x, ids[..., None], -1)[..., 0] - np.log(np.exp(x).sum(-1))


def all_logits(graph: Graph) -> Graph:
    """x = slice(y) (the last token); ...; logits   =>   ...; logits     of every token of the step"""
    last = next(n for n in graph.nodes if n.op == "slice" and "layers" not in n.source and n.attrs["axis"] == 1)
    values, nodes = dict(graph.values), []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(last.inputs[0] if n == last.output else n for n in node.inputs))
        if node.output == last.output:
            continue
        nodes.append(node)
        view = replace(graph, values=values).view(node)
        shape = tuple(OPS[node.op].infer(view))
        values[node.output] = replace(values[node.output], type=replace(values[node.output].type, shape=shape))
    return graph.rebuild(nodes, values)


def rounded(graph: Graph, feeds: Mapping[str, np.ndarray], exact: Collection[str] = ()) -> dict[str, np.ndarray]:
    """An integer graph in float arithmetic, every result rounded to its encoding (what QDQ simulations compute): codes
    in, codes out. Results named in ``exact`` stay as they are, floats."""
    import torch

    def real(name: str, codes: np.ndarray) -> torch.Tensor:
        q = graph.type(name).q
        return torch.from_numpy(np.array(codes if q is None else q.dequantize(codes)))

    known = {value.name: real(value.name, value.data) for value in graph.constants() if value.data is not None}
    known |= {name: real(name, codes) for name, codes in feeds.items()}
    found: dict[str, np.ndarray] = {}
    last = {name: node.output for node in graph.nodes for name in node.inputs}
    with torch.no_grad():
        for node in graph.nodes:
            made = OPS[node.op].torch(torch, graph.view(node), *(known[name] for name in node.inputs))
            kind = graph.type(node.output)
            free = kind.q is None or node.output in exact
            codes = made.numpy() if kind.q is None or free else kind.q.quantize(made.numpy(), kind.dtype)
            known[node.output] = made if free else real(node.output, codes)
            if node.output in graph.outputs:
                found[node.output] = codes
            for name in set(node.inputs):
                if last[name] == node.output:
                    del known[name]
    return found


def scorers(
    bundle: Bundle | None, language: Language | None, context: int, artifacts: Sequence[str]
) -> Iterator[tuple[str, Scorer]]:
    """(engine, scorer) one after another: float (with a model), fake-quant and simulator (with a bundle), artifacts."""
    if language is not None:
        yield "float", float_scorer(language, context)
    if bundle is not None:
        if bundle.graph.level == "integer":
            yield "fake-quant", simulator_scorer(bundle, fake=True)
        yield "simulator", simulator_scorer(bundle)
        for name in artifacts:
            with scoring(bundle, name) as session:
                yield name, artifact_scorer(session)


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Windows:
    """Windows of token ids by length: (ids [B, N], how many at the end of each are scored)."""

    batches: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def tokens(self) -> int:
        return int(sum(counts.sum() for _, counts in self.batches))


def windows(texts: Sequence[str], text: Text, stride: int | None, limit: int | None) -> Windows:
    """Per text windows of up to ``context`` tokens, led by BOS if there is one, that begin every ``stride`` tokens;
    each token is scored once, with the longest past it has. limit: use the first windows only."""
    head = [] if text.bos is None else [text.bos]
    step = text.context - len(head)
    stride = step if stride is None else stride
    if not 0 < stride <= step:
        raise InvalidInput(f"stride {stride} is not in 1..{step} (context {text.context}) -> --stride N")
    made: list[tuple[list[int], int]] = []
    for one in texts:
        ids, done = text.tokenizer.encode(one, add_special_tokens=False).ids, 0
        for at in range(0, len(ids), stride):
            piece = [*head, *ids[at : at + step]]
            scored = min(at + step, len(ids)) - max(done, at + 1 - len(head))
            done = min(at + step, len(ids))
            if len(piece) > 1 and scored > 0:
                made.append((piece, scored))
            if done == len(ids):
                break
    by_length: dict[int, list[tuple[list[int], int]]] = {}
    for piece, scored in made[:limit]:
        by_length.setdefault(len(piece), []).append((piece, scored))
    batches = []
    for same in by_length.values():
        for at in range(0, len(same), BATCH):
            pieces, counts = zip(*same[at : at + BATCH], strict=True)
            batches.append((np.array(pieces, np.int64), np.array(counts)))
    if not batches:
        raise InvalidInput("the text holds no two tokens -> a longer text")
    return Windows(tuple(batches))


def perplexity(score: Scorer, data: Windows) -> float:
    """exp of the mean negative log-likelihood per scored token."""
    total = 0.0
    for ids, counts in track(data.batches, len(data.batches), "scoring"):
        for row, count in zip(score(ids), counts, strict=True):
            total -= float(row[len(row) - count :].sum())
    return float(np.exp(total / data.tokens))


@dataclass(frozen=True)
class Question:
    """A prompt, its continuations, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    right: int


def read_questions(path: Path, limit: int | None) -> list[Question]:
    """A .jsonl of ``goal, sol1, sol2, label`` (PIQA) or ``question, choices, answer``. Raises InvalidInput."""
    found = []
    try:
        for line in path.read_text("utf-8").splitlines()[:limit]:
            raw = json.loads(line)
            if "goal" in raw:
                found.append(Question(raw["goal"], (raw["sol1"], raw["sol2"]), int(raw["label"])))
            else:
                found.append(Question(raw["question"], tuple(raw["choices"]), int(raw["answer"])))
            if not 0 <= found[-1].right < len(found[-1].choices):
                raise ValueError(f"answer {found[-1].right} of {len(found[-1].choices)} choices")
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"{path}, item {len(found) + 1}: {error} -> one JSON object per line") from None
    except KeyError as error:
        raise InvalidInput(f"{path}, item {len(found) + 1}: {error} is missing -> goal, sol1, sol2, label") from None
    if not found:
        raise InvalidInput(f"{path} holds no question")
    return found


def multiple_choice(score: Scorer, questions: Sequence[Question], text: Text) -> dict[str, float]:
    """Shares of questions whose right choice is likeliest: ``accuracy`` by the sum of log-probabilities, and
    ``accuracy_norm`` by that sum per byte of the choice. Prompts that leave no room lose their beginning."""
    head = [] if text.bos is None else [text.bos]
    right = [0, 0]
    for question in track(questions, len(questions), "scoring"):
        sums = []
        for choice in question.choices:
            first = text.tokenizer.encode(question.prompt, add_special_tokens=False).ids
            whole = text.tokenizer.encode(f"{question.prompt} {choice}", add_special_tokens=False).ids
            ids = [*head, *whole[max(0, len(whole) - text.context + len(head)) :]]
            scored = min(max(len(whole) - len(first), 1), len(ids) - 1)
            row = score(np.array([ids], np.int64))[0]
            total = float(row[len(row) - scored :].sum())
            sums.append((total, total / max(len(choice.encode()), 1)))
        for kind in range(2):
            right[kind] += int(max(range(len(sums)), key=lambda i: sums[i][kind]) == question.right)
    return {"accuracy": right[0] / len(questions), "accuracy_norm": right[1] / len(questions)}


@dataclass(frozen=True)
class Task:
    """What is measured, in words that belong beside every number of it, and how."""

    protocol: str
    measure: Callable[[Scorer], dict[str, float]]


def perplexity_task(path: Path, text: Text, stride: int | None, limit: int | None) -> Task:
    data = windows(read_texts(path), text, stride, limit)
    protocol = (
        f"token perplexity of {path.name}: {data.tokens} tokens scored once each, context {text.context}, "
        f"stride {stride or 'disjoint'}, BOS {_bos(text)} before each window, not scored"
    )
    return Task(protocol, lambda score: {"perplexity": perplexity(score, data)})


def choice_task(path: Path, text: Text, limit: int | None) -> Task:
    questions = read_questions(path, limit)
    protocol = (
        f"{path.name}: {len(questions)} questions, 'prompt choice' joined by a space, BOS {_bos(text)}, context "
        f"{text.context}; log-probability of the choice, accuracy by its sum, accuracy_norm by its sum per byte"
    )
    return Task(protocol, lambda score: multiple_choice(score, questions, text))


def _bos(text: Text) -> str:
    return "none" if text.bos is None else repr(text.tokenizer.id_to_token(text.bos))
