"""A language model at work: the two graphs on one backend, and the cache between them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from edgeforge import backends
from edgeforge.backends import Step
from edgeforge.bundle import Bundle
from edgeforge.errors import InvalidInput, MissingDependency
from edgeforge.ir.graph import Graph
from edgeforge.ir.types import NUMPY
from edgeforge.llm.prefix import Prefix, prefix_of
from edgeforge.llm.steps import pieces, positions_and_masks


class Session:
    """``batch`` sequences of equal length (artifacts take one). graphs, steps: by "prefill" and "decode"; windows: of
    the mask inputs; prefix: what lies in the cache at the beginning.

    The cache holds codes by the names of the graphs' inputs, position p in row p; a graph reads its first rows."""

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        steps: Mapping[str, Step],
        windows: Sequence[int | None],
        prefix: Prefix | None = None,
        batch: int = 1,
    ):
        self.graphs, self.steps, self.windows, self.prefix, self.batch = graphs, steps, windows, prefix, batch
        decode = graphs["decode"]
        self.chunk = graphs["prefill"].type("ids").shape[1]
        self.context = decode.type("mask.0").shape[-1]
        self.layers = sum(name.startswith("past_keys.") for name in decode.inputs)
        self.seconds: list[tuple[int, float]] = []
        self.restart()

    def restart(self) -> None:
        """A cache of rows that hold 0, behind the prefix if there is one."""
        self.start, self.untouched = 0, self.prefix is not None
        self.cache: dict[str, np.ndarray] = {}
        for name in self.graphs["decode"].inputs:
            kind = self.graphs["decode"].type(name)
            if name.startswith("past_"):
                shape = [self.batch, *kind.shape[1:]]
                shape[3 if name.startswith("past_keys") else 2] = self.context
                self.cache[name] = np.full(shape, 0 if kind.q is None else kind.q.zero, NUMPY[kind.dtype])
                if self.prefix is not None:
                    keys = name.startswith("past_keys")
                    first = (..., slice(1)) if keys else (slice(None), slice(None), slice(1))
                    self.cache[name][first] = self.prefix.arrays[name]
                    self.start = 1

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Process ``tokens`` of the one sequence; the codes [vocab] of the logits behind the last.

        Raises InvalidInput when the context has no room for them."""
        for _, logits in self.walk(np.array([tokens], np.int64)):
            last = logits[0, -1]
        return last

    def walk(self, tokens: np.ndarray, chunked: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """Process tokens [B, N] step by step: how many were taken, and the codes [B, 1 or more, vocab] of what the
        step's graph says of them (the last row behind the last token). ``chunked``: with prefill steps. A text that
        begins with the prefix's token takes what is known of it."""
        if self.untouched and self.prefix is not None and (tokens[:, :1] == self.prefix.token).all() and tokens.size:
            self.seconds.append((1, 0.0))
            self.untouched = False
            yield 1, np.repeat(self.prefix.arrays["logits"], self.batch, 0)
            if not (tokens := tokens[:, 1:]).size:
                return
        self.untouched = False
        total = tokens.shape[1]
        if not total or self.start + total > self.context:
            raise InvalidInput(
                f"{total} tokens behind {self.start} do not fit the context of {self.context}"
                " -> a shorter prompt, or export with --set language.context=N"
            )
        at = 0
        for size in pieces(total, self.start, self.chunk, self.context) if chunked else [1] * total:
            yield size, self._step(tokens[:, at : at + size])
            at += size

    def speeds(self, prompt: int) -> dict[str, float | None]:
        """Milliseconds of the steps that took the first ``prompt`` tokens, and tokens per second of those behind."""
        ends = np.cumsum([count for count, _ in self.seconds])
        first = [s for (_, s), end in zip(self.seconds, ends, strict=True) if end <= prompt]
        rest = [s for (_, s), end in zip(self.seconds, ends, strict=True) if end > prompt]
        speed = len(rest) / sum(rest) if rest else None
        return {"prefill_ms": sum(first) * 1e3, "decode_tokens_per_second": speed}

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        count = tokens.shape[1]
        part = "decode" if count == 1 else "prefill"
        graph, chunk = self.graphs[part], 1 if part == "decode" else self.chunk
        past = self.context - chunk
        positions, *masks = positions_and_masks([self.start] * self.batch, chunk, count, past, self.windows)
        feeds = {"ids": np.pad(tokens, ((0, 0), (chunk - count, 0))), "positions": positions}
        for i, mask in enumerate(masks):
            kind = graph.type(f"mask.{i}")
            feeds[f"mask.{i}"] = mask if kind.q is None else kind.q.quantize(mask, kind.dtype)
        for layer in range(self.layers):
            keys, values = (self.cache[f"past_{p}.{layer}"] for p in ("keys", "values"))
            feeds[f"past_keys.{layer}"] = np.ascontiguousarray(keys[..., :past])
            feeds[f"past_values.{layer}"] = np.ascontiguousarray(values[:, :, :past])
        began = time.perf_counter()
        found = self.steps[part](feeds)
        self.seconds.append((count, time.perf_counter() - began))
        rows = slice(self.start, self.start + count)
        for layer in range(self.layers):
            self.cache[f"past_keys.{layer}"][..., rows] = found[f"keys.{layer}"][..., chunk - count :]
            self.cache[f"past_values.{layer}"][:, :, rows] = found[f"values.{layer}"][:, :, chunk - count :]
        self.start += count
        return found["logits"]


@contextmanager
def opened(bundle: Bundle, backend: str) -> Iterator[Session]:
    """A session on an artifact of the bundle (the simulator needs none).

    Raises InvalidInput when the bundle is no language model with a cache or lacks the artifact, MissingDependency when
    the backend does not run here."""
    if bundle.manifest.language is None:
        raise InvalidInput(f"{bundle.path} holds no prefill and decode graphs -> export a Hugging Face folder")
    chosen = backends.backend(backend)
    record = bundle.manifest.backends.get(backend)
    if backend != "simulator" and (record is None or record.status != "built"):
        why = f" ({record.reason})" if record is not None else ""
        raise InvalidInput(f"{bundle.path}: no artifact of {backend}{why} -> export with --backend {backend}")
    if why := chosen.cannot_run():
        raise MissingDependency(f"{backend}: {why}")
    parts = {part.part: part for part in bundle.parts}
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(chosen.opened(part.artifact(backend), part.graph, bundle.target))
            for name, part in parts.items()
        }
        graphs = {name: part.graph for name, part in parts.items()}
        yield Session(graphs, steps, bundle.manifest.language.windows, prefix_of(bundle))
