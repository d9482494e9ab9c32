"""Trains the embedded language model. Stages: sample, tokenizer, train, evaluate, prompts.

The model starts as stories260K's function in a larger body (Net2Net, arXiv:1511.05641) and is trained from there on
real stories and on text that stories260K wrote.

for seed in $(seq 0 15); do python models/tinylm/train.py sample --seed $seed; done
python models/tinylm/train.py tokenizer
python models/tinylm/train.py train
python models/tinylm/train.py evaluate
python models/tinylm/train.py prompts
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("EDGEFORGE_DATA", HERE.parents[1].parent / "shared" / "data"))
TRAIN_STORIES, PICK_STORIES, DEV_STORIES = slice(0, 550), slice(550, 600), slice(600, 800)
BOS, VOCAB, CONTEXT = "<s>", 416, 512
LONGEST = 200  # tokens of a sampled story in calibration.txt and heldout.txt
#: A byte that no text holds; ids that fill up the vocabulary start with its embedding.
UNUSED = b"\x01"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": CONTEXT,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.02,
    "dtype": "float16",
}


def stories(part: slice) -> list[str]:
    """Real stories, normalised: blank lines become one newline, runs of spaces one space."""
    texts: list[str] = json.loads((DATA / "text_tinystories" / "tinystories_800.json").read_text("utf-8"))[part]
    return [re.sub(r" +", " ", re.sub(r"\s*\n\s*", "\n", t)).strip() for t in texts]


class Teacher:
    """stories260K in the llama2.c format, with its own tokenizer; decoding with a KV cache."""

    def __init__(self) -> None:
        raw = (DATA / "lm_stories260k" / "stories260K.bin").read_bytes()
        self.dim, hidden, self.layers, self.heads, self.kv, vocab, self.ctx = struct.unpack("<7i", raw[:28])
        flat, at = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0
        self.hd = self.dim // self.heads

        def take(*shape: int) -> torch.Tensor:
            nonlocal at
            at += math.prod(shape)
            return flat[at - math.prod(shape) : at].view(shape)

        n, d, kvd = self.layers, self.dim, self.kv * self.hd
        self.emb, self.g1 = take(vocab, d), take(n, d)
        wq, wk, wv, self.wo = take(n, d, d), take(n, kvd, d), take(n, kvd, d), take(n, d, d)
        self.g2 = take(n, d)
        w1, self.w2, w3 = take(n, hidden, d), take(n, d, hidden), take(n, hidden, d)
        self.gf = take(d)
        self.qkv, self.w13 = torch.cat([wq, wk, wv], 1), torch.cat([w1, w3], 1)
        angle = torch.arange(4096)[:, None] * 10000.0 ** (-torch.arange(0, self.hd, 2) / self.hd)
        self.cos, self.sin = angle.cos(), angle.sin()
        raw, at = (DATA / "lm_stories260k" / "tok512.bin").read_bytes(), 4
        self.pieces: list[bytes] = []
        self.score: dict[bytes, tuple[float, int]] = {}
        for i in range(vocab):
            value, size = struct.unpack_from("<fi", raw, at)
            self.pieces.append(raw[at + 8 : at + 8 + size])
            if i >= 259:
                self.score[self.pieces[-1]] = (value, i)
            at += 8 + size

    def encode(self, text: str) -> list[int]:
        parts = [c.encode() for c in " " + text]
        while True:
            pairs = [(self.score[a + b][0], -i) for i, (a, b) in enumerate(pairwise(parts))
                     if a + b in self.score]  # fmt: skip
            if not pairs:
                break
            i = -max(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids = [1]
        for p in parts:
            ids += [self.score[p][1]] if p in self.score else [b + 3 for b in p]
        return ids

    def decode(self, ids: list[int]) -> str:
        out = b"".join(bytes([i - 3]) if 3 <= i < 259 else self.pieces[i] for i in ids if i > 2)
        return out.decode("utf-8", "replace").strip()

    def _rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def __call__(self, ids: torch.Tensor, cache: list[torch.Tensor] | None = None, at: int = 0) -> torch.Tensor:
        """Logits [B, T, V]. With a cache, T is 1; K is kept [B, kv, hd, ctx], V [B, kv, ctx, hd]."""
        b, t = ids.shape
        kvd, rep = self.kv * self.hd, self.heads // self.kv
        cos, sin = self.cos[at : at + t, None], self.sin[at : at + t, None]
        x = self.emb[ids]
        for n in range(self.layers):
            q, k, v = (F.rms_norm(x, (self.dim,), self.g1[n], 1e-5) @ self.qkv[n].T).split([self.dim, kvd, kvd], -1)
            q = self._rope(q.view(b, t, self.heads, self.hd), cos, sin)
            k = self._rope(k.view(b, t, self.kv, self.hd), cos, sin)
            v = v.view(b, t, self.kv, self.hd)
            if cache is None:
                o = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True,
                                                   enable_gqa=True).transpose(1, 2)  # fmt: skip
            else:
                ks, vs = cache[2 * n], cache[2 * n + 1]
                ks[:b, :, :, at], vs[:b, :, at] = k[:, 0], v[:, 0]
                w = q.view(b, self.kv, rep, self.hd) @ ks[:b, :, :, : at + 1] * self.hd**-0.5
                o = w.softmax(-1) @ vs[:b, :, : at + 1]
            x = x + o.reshape(b, t, self.dim) @ self.wo[n].T
            gate, up = (F.rms_norm(x, (self.dim,), self.g2[n], 1e-5) @ self.w13[n].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ self.w2[n].T
        return F.rms_norm(x, (self.dim,), self.gf, 1e-5) @ self.emb.T

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], rng: torch.Generator) -> list[list[int]]:
        """Continues every prompt at temperature 1 until BOS, EOS or the end of the context."""
        b, ctx = len(prompts), self.ctx
        forced = torch.full((b, ctx), -1)
        for i, p in enumerate(prompts):
            forced[i, : len(p)] = torch.tensor(p)
        cache = [torch.zeros(b, self.kv, *(s if i % 2 == 0 else s[::-1]))
                 for i in range(2 * self.layers) for s in [(self.hd, ctx)]]  # fmt: skip
        out, alive = torch.full((b, ctx), 2), torch.arange(b)
        done, ids = torch.zeros(b, dtype=torch.bool), forced[:, 0]
        out[:, 0] = ids
        for at in range(ctx - 1):
            logits = self(ids[:, None], cache, at)[:, 0]
            noise = torch.empty_like(logits).exponential_(generator=rng)
            ids = (logits - noise.log()).argmax(-1)
            f = forced[alive, at + 1]
            ids = torch.where(f >= 0, f, ids)
            ids = torch.where(done, 2, ids)
            out[alive, at + 1] = ids
            done |= (ids == 1) | (ids == 2)
            if int(done.sum()) * 8 > len(done):
                keep = ~done
                if not bool(keep.any()):
                    break
                cache = [c[: len(done)][keep] for c in cache]
                alive, ids, done = alive[keep], ids[keep], done[keep]
        rows = out.tolist()
        return [[r[0], *r[1:][: next((i for i, t in enumerate(r[1:]) if t in (1, 2)), ctx)]] for r in rows]


def stage_sample(args: argparse.Namespace) -> None:
    """Writes one shard of text: half the rows from BOS alone, half from the start of a training story."""
    teacher, rng = Teacher(), torch.Generator().manual_seed(args.seed)
    starts = [teacher.encode(s[:160])[:40] for s in stories(TRAIN_STORIES)]
    args.work.mkdir(parents=True, exist_ok=True)
    began, size = time.time(), 0
    with open(args.work / f"sampled_{args.seed:03d}.jsonl", "w", encoding="utf-8") as f:
        for base in range(0, args.rows, args.batch):
            pick = torch.randint(len(starts), (args.batch,), generator=rng).tolist()
            cut = torch.randint(2, 40, (args.batch,), generator=rng).tolist()
            prompts = [[1] if i % 2 else starts[p][:c] for i, (p, c) in enumerate(zip(pick, cut, strict=True))]
            for r in teacher.sample(prompts, rng):
                text = teacher.decode(r)
                size += len(text.encode())
                f.write(json.dumps({"text": text, "full": len(r) < teacher.ctx}) + "\n")
            f.flush()
            took = time.time() - began
            print(f"seed {args.seed}: {base + args.batch} rows, {size / 1e6:.2f} MB, {took:.0f} s", flush=True)


def stage_tokenizer(args: argparse.Namespace) -> None:
    """Byte-level BPE on the training stories (weighted) and sampled text, limited to merges that stories260K knows as
    pieces, so that `grow` can start from its embeddings; writes tokenizer.json and config.json. The model's vocabulary
    is padded to a multiple of 32 with ids that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    words: Counter[str] = Counter()
    for weight, texts in ((6, stories(TRAIN_STORIES)), (1, [t for t, _ in sampled(args.work, 4)])):
        for text in texts:
            for word, _ in split.pre_tokenize_str(text):
                words[word] += weight
    pieces = set(Teacher().pieces[259:])
    known = pieces | {
        piece[:2] for piece in pieces if len(piece) == 3 and piece[0] >= 0xE0
    }  # on the way to a character
    merges = known_merges(words, known, VOCAB - 257)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([BOS, *alphabet, *(a + b for a, b in merges)])}
    tok = Tokenizer(models.BPE(vocabulary, merges))
    tok.add_special_tokens([BOS])
    tok.pre_tokenizer, tok.decoder = split, decoders.ByteLevel()
    for text in [*stories(DEV_STORIES), bytes(range(128)).decode(), "naïve — “quote”\r\n\t\U0001f600 \x00"]:
        ids = tok.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids, skip_special_tokens=False).removeprefix(" ") == text
    tok.save(str(HERE / "tokenizer.json"))
    (HERE / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")


def known_merges(words: Mapping[str, int], known: Collection[bytes], most: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., arXiv:1508.07909): again and again the most frequent pair, among those whose
    bytes are in ``known``; at most ``most`` merges."""
    parts = {word: list(word) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in parts.items():
            if len(pieces) > 1:
                for pair in pairwise(pieces):
                    pairs[pair] += words[word]
        allowed = [pair for pair in pairs if token_bytes("".join(pair)) in known]
        if not allowed:
            break
        best = max(allowed, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for pieces in parts.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def sampled(work: Path, shards: int | None = None) -> list[tuple[str, bool]]:
    """Sampled stories of the finished shards, and whether each reached its end."""
    out = []
    for file in sorted(work.glob("sampled_*.jsonl"))[:shards]:
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            out.append((re.sub(r" +", " ", re.sub(r"\s*\n\s*", "\n", row["text"])), row["full"]))
    return out


def encode(texts: list[str]) -> list[np.ndarray]:
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    return [np.array([0, *e.ids], np.int64) for e in tok.encode_batch(texts, add_special_tokens=False)]


class Batches:
    """Windows of CONTEXT + 1 tokens: mostly from the start of a story, some from anywhere, a few of those with a BOS in
    front as a deployed window has. ``real`` is the share of windows that start in the real stories."""

    def __init__(self, work: Path, rng: np.random.Generator) -> None:
        self.rng = rng
        self.real = self._stream([(t, True) for t in stories(TRAIN_STORIES)])
        self.made = self._stream(sampled(work))

    @staticmethod
    def _stream(rows: list[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens, what each must predict (-100 at the end of a story cut by the sampler), and story starts."""
        docs = encode([t for t, _ in rows])
        ids = np.concatenate([*docs, np.zeros(CONTEXT + 2, np.int64)])
        ends = np.cumsum([len(d) for d in docs])
        targets = np.roll(ids, -1)
        targets[ends[[i for i, (_, full) in enumerate(rows) if not full]] - 1] = -100
        return ids, targets, np.concatenate([[0], ends[:-1]])

    def __call__(self, count: int, real: float) -> tuple[torch.Tensor, torch.Tensor]:
        xs, ys = [], []
        for kind, source in self.rng.random((count, 2)):
            ids, targets, starts = self.real if source < real else self.made
            i = self.rng.choice(starts) if kind < 0.65 else self.rng.integers(len(ids) - CONTEXT - 1)
            x = ids[i : i + CONTEXT]
            xs.append(np.concatenate([[0], x[1:]]) if kind > 0.93 else x)
            ys.append(targets[i : i + CONTEXT])
        return torch.from_numpy(np.stack(xs)), torch.from_numpy(np.stack(ys))


def fast_attend(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def new_model(window: int, fast: bool = True) -> torch.nn.Module:
    import model as definition

    if fast:
        definition.Attention.attend = fast_attend
    return definition.TinyLM(CONFIG, window)


@torch.no_grad()
def grow(teacher: Teacher, model: torch.nn.Module) -> None:
    """Gives ``model`` the teacher's function. Everything the teacher has not is read by random weights and written by
    zeros, so that it takes no part yet and learns at once. The teacher's rotary pair j (frequency 10000**(-j/4)) is
    pair 4j of a head of 32."""
    from tokenizers import Tokenizer

    tok, state, old = Tokenizer.from_file(str(HERE / "tokenizer.json")), model.state_dict(), teacher.dim
    width, size = CONFIG["hidden_size"], CONFIG["head_dim"]
    shrink, pairs = (old / width) ** 0.5, teacher.hd // 2  # the root mean square is taken over more, zero, entries
    step = size // 2 // pairs
    place = torch.tensor([h * size + step * (i // 2) + (size // 2) * (i % 2)
                          for h in range(teacher.heads) for i in range(teacher.hd)])  # fmt: skip
    packed = torch.tensor([h * size + i for h in range(teacher.heads) for i in range(teacher.hd)])
    kv = teacher.kv * teacher.hd
    known = {p: i for i, p in enumerate(teacher.pieces) if i >= 259}
    emb = state["model.embed_tokens.weight"].zero_()
    for i in range(VOCAB):
        token = tok.id_to_token(i)
        text = token_bytes(token) if i and token else UNUSED
        ids = [1] if i == 0 else [known[text]] if text in known else [text[0] + 3] if len(text) == 1 else None
        if ids is None:
            ids = [known.get(bytes([b]), b + 3) for b in text]
        emb[i, :old] = teacher.emb[ids].mean(0)
    for name, p in state.items():
        if p.ndim == 1:
            p.fill_(shrink)
        elif "embed" not in name and "lm_head" not in name:
            torch.nn.init.normal_(p, std=0.5 * p.shape[1] ** -0.5)
            if name.endswith(("q_proj.weight", "o_proj.weight", "down_proj.weight")):
                p.zero_()
    for n in range(teacher.layers):
        at = f"model.layers.{n}."
        q, k, v = teacher.qkv[n].split([old, kv, kv])
        gate, up = teacher.w13[n].chunk(2)
        state[at + "input_layernorm.weight"][:old] = teacher.g1[n] * shrink
        state[at + "post_attention_layernorm.weight"][:old] = teacher.g2[n] * shrink
        queries, keys, values = (state[at + f"self_attn.{x}_proj.weight"] for x in "qkv")
        queries[place, :old] = q * (size / teacher.hd) ** 0.5
        keys[place[:kv]], values[packed[:kv]] = 0.0, 0.0
        keys[place[:kv], :old], values[packed[:kv], :old] = k, v
        state[at + "self_attn.o_proj.weight"][:old, packed] = teacher.wo[n]
        for name, w in (("gate", gate), ("up", up)):
            state[at + f"mlp.{name}_proj.weight"][: len(w), :old] = w
        state[at + "mlp.down_proj.weight"][:old, : gate.shape[0]] = teacher.w2[n]
    state["model.norm.weight"][:old] = teacher.gf * shrink


def token_bytes(token: str) -> bytes:
    """The bytes behind a token of a byte-level vocabulary (GPT-2's table: printable bytes stand for themselves)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain} | {
        chr(256 + i): b for i, b in enumerate(x for x in range(256) if x not in plain)
    }
    return bytes(table[c] for c in token)


def stage_train(args: argparse.Namespace) -> None:
    """Linear warm-up, cosine decay to zero; an exponential average of the weights is what is written. The checkpoint
    kept is the best on training stories that are left out of training, not the best on development stories."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = new_model(CONTEXT)
    if args.resume:
        model.load_state_dict(trained(CONTEXT).state_dict())
    else:
        grow(Teacher(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.05)
    average = {n: v.clone() for n, v in model.state_dict().items()}
    batches, run = Batches(args.work, rng), torch.compile(model) if args.compile else model
    held, began, seen, best = stories(PICK_STORIES), time.time(), 0.0, math.inf
    for step in range(args.steps + 1):
        if step % args.every == 0:
            probe = new_model(CONTEXT)
            probe.load_state_dict(average)
            bits = []
            for texts in (held, stories(DEV_STORIES)[::4]):
                nats, _, size = measure(probe, CONTEXT, encode(texts), texts)
                bits.append(nats / size / math.log(2))
            print(f"{step}: bits/byte {bits[0]:.4f} left out, {bits[1]:.4f} development", flush=True)
            if bits[0] < best:
                best = bits[0]
                save(average, HERE / "model.safetensors")
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        x, y = batches(args.windows, args.real)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = run(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate
        optimizer.step()
        optimizer.zero_grad()
        seen = loss.item() if step == 0 else 0.98 * seen + 0.02 * loss.item()
        keep = min(0.99, step / (step + 10))
        with torch.no_grad():
            for n, v in model.state_dict().items():
                average[n].lerp_(v, 1 - keep)
        if (step + 1) % 50 == 0:
            took = time.time() - began
            print(f"{step + 1}/{args.steps} loss {seen:.4f} {took:.0f} s, {took / (step + 1):.3f} s/step", flush=True)


def save(state: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    kept = {n: v.half().contiguous() for n, v in state.items() if n != "lm_head.weight"}
    save_file(kept, file, metadata={"format": "pt"})


@torch.no_grad()
def measure(run: Any, window: int, docs: list[Any], texts: list[str]) -> tuple[float, int, int]:
    """Nats, tokens and bytes over stories, each alone behind BOS. Text beyond the window is scored in windows that
    step by half, so that every token has at least half a window before it."""
    nats, tokens = 0.0, 0
    for doc in docs:
        ids = torch.as_tensor(doc)
        at = 1
        while at < len(ids):
            begin = max(0, at - window // 2) if at > 1 else 0
            x = ids[begin : begin + window]
            y = ids[begin + 1 : begin + window + 1]
            losses = F.cross_entropy(run(x[None])[0, : len(y)].float(), y, reduction="none")
            nats += float(losses[at - begin - 1 :].sum())
            tokens += len(y) - (at - begin - 1)
            at = begin + len(y) + 1
    return nats, tokens, sum(len(t.encode()) for t in texts)


def trained(window: int) -> torch.nn.Module:
    from safetensors.torch import load_file

    model = new_model(window)
    state = {n: v.float() for n, v in load_file(HERE / "model.safetensors").items()}
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model.eval()


def stage_evaluate(args: argparse.Namespace) -> None:
    """Both models on the development stories: the text of the first 511 tokens that stories260K has for each (all
    that its window holds behind BOS), and the whole stories in windows that step by half."""
    teacher, texts = Teacher(), stories(DEV_STORIES)
    heads = [teacher.decode(teacher.encode(t)[: teacher.ctx]) for t in texts]
    runs: list[tuple[str, Any, int, Callable[[list[str]], list[Any]]]] = [
        ("tinylm", trained(CONTEXT), CONTEXT, encode),
        ("stories260K", teacher, teacher.ctx, lambda part: [teacher.encode(t) for t in part]),
    ]
    for what, part in (("first window of stories 600-799", heads), ("whole stories 600-799", texts)):
        for name, run, window, tokens in runs:
            nats, count, size = measure(run, window, tokens(part), part)
            print(f"{what}, {name}: {nats / size / math.log(2):.4f} bits/byte, {nats / count:.4f} nats/token, "
                  f"perplexity {math.exp(nats / count):.3f} per token; {size} bytes, {count} tokens")  # fmt: skip


@torch.no_grad()
def stage_prompts(args: argparse.Namespace) -> None:
    """Text sampled from tinylm at temperature 1: a changed model's extra loss on it estimates its divergence."""
    from tokenizers import Tokenizer

    model, tok = trained(CONTEXT), Tokenizer.from_file(str(HERE / "tokenizer.json"))
    for file, seed, size in (("calibration.txt", 1, 25_000), ("heldout.txt", 2, 6_000)):
        rng, text = torch.Generator().manual_seed(args.seed + seed), ""
        while len(text.encode()) < size:
            ids = torch.zeros(16, 1, dtype=torch.int64)
            while ids.shape[1] < LONGEST and not bool((ids[:, 1:] == 0).any(1).all()):
                logits = model(ids)[:, -1]
                noise = torch.empty_like(logits).exponential_(generator=rng)
                ids = torch.cat([ids, (logits - noise.log()).argmax(-1, keepdim=True)], 1)
            for row in ids[:, 1:].tolist():
                story = tok.decode(row[: row.index(0)] if 0 in row else row).strip()
                ends = [m.end() for m in re.finditer(r"[.!?]\"?(?=\s|$)", story)]
                if ends and len(text.encode()) < size and "\ufffd" not in story:
                    text += story[: ends[-1]] + "\n\n"
        (HERE / file).write_text(text.rstrip() + "\n", "utf-8")
        print(f"{file}: {len(text.encode())} bytes")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=["sample", "tokenizer", "train", "evaluate", "prompts"])
    p.add_argument("--work", type=Path, default=HERE / "build", help="folder for sampled text and checkpoints")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rows", type=int, default=4096, help="sample: stories per shard")
    p.add_argument("--batch", type=int, default=256, help="sample: rows decoded together")
    p.add_argument("--windows", type=int, default=8, help="train: windows per step")
    p.add_argument("--steps", type=int, default=2400, help="train: optimizer steps")
    p.add_argument("--every", type=int, default=200, help="train: steps between checkpoints")
    p.add_argument("--resume", action="store_true", help="train: go on from model.safetensors, with a new schedule")
    p.add_argument("--rate", type=float, default=1e-3, help="train: largest learning rate")
    p.add_argument("--real", type=float, default=0.3, help="train: share of windows from real stories")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    globals()[f"stage_{args.stage}"](args)


if __name__ == "__main__":
    main()
