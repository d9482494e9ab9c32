"""Time and memory of exporting a language model of Llama-3.2-1B's shape (random weights). Run from the repository:

    python -m benchmarks.export FOLDER [--layers 16] [--precision w8a8] [--backend onnx_qdq]

Memory is the peak of anonymous (not file-mapped) resident pages of the process tree."""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHAPE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def write_model(folder: Path, layers: int) -> int:
    """A Hugging Face folder with random bfloat16 weights, one shard per layer; the number of parameters."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    width, hidden, kv = 2048, 8192, 512
    places, count = {}, 0

    def shard(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal count
        made = {
            name: (torch.ones(s) if len(s) == 1 else torch.randn(s) * s[1] ** -0.5).bfloat16()
            for name, s in shapes.items()
        }
        save_file(made, folder / file)
        places.update(dict.fromkeys(shapes, file))
        count += sum(t.numel() for t in made.values())

    torch.manual_seed(0)
    shard("embed.safetensors", {"model.embed_tokens.weight": (128256, width), "model.norm.weight": (width,)})
    for i in range(layers):
        p = f"model.layers.{i}"
        attention = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
        shapes: dict[str, tuple[int, ...]] = {f"{p}.self_attn.{n}_proj.weight": s for n, s in attention.items()}
        shapes |= {f"{p}.mlp.{n}_proj.weight": (hidden, width) for n in ("gate", "up")}
        shapes |= {f"{p}.mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{p}.{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
        shard(f"layer{i}.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    vocab = {"<unk>": 0, **{f"w{i}": i for i in range(1, 1000)}}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return count


def anonymous_bytes() -> int:
    """Anonymous resident bytes of this process and its children (Linux)."""
    total, waiting = 0, [Path("/proc/self").resolve()]
    while waiting:
        process = waiting.pop()
        try:
            status = (process / "status").read_text()
            children = (process / "task" / process.name / "children").read_text().split()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
        waiting += [process.parent / child for child in children]
    return total


@contextmanager
def watched(what: str, parameters: int) -> Iterator[None]:
    """Print seconds, and the peak of memory as bytes and as a multiple of the float32 weights."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    try:
        yield
    finally:
        over.set()
        thread.join()
        seconds = time.perf_counter() - began
        share = peak[0] / (4 * parameters)
        print(f"{what}: {seconds:.0f} s, peak {peak[0] / 2**30:.2f} GiB = {share:.2f} x float32 weights", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--precision", default="w8a8")
    parser.add_argument("--backend", action="append")
    arguments = parser.parse_args()
    model = arguments.folder / f"model-{arguments.layers}"
    if not (model / "tokenizer.json").is_file():
        write_model(model, arguments.layers)
    from safetensors import safe_open

    parameters = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                parameters += math.prod(opened.get_slice(name).get_shape())
    print(f"{parameters / 1e9:.3f} billion parameters, {4 * parameters / 2**30:.2f} GiB in float32", flush=True)

    def say(line: str) -> None:
        print(f"  {time.perf_counter() - began:6.0f} s  {anonymous_bytes() / 2**30:6.2f} GiB  {line}", flush=True)

    from edgeforge.pipeline import export

    began = time.perf_counter()
    out = arguments.folder / f"bundle-{arguments.layers}-{arguments.precision}"
    fast = ("calibration.samples=2", "calibration.method=minmax", "language.context=128")
    with watched(f"export {arguments.precision}", parameters):
        export(
            str(model), "snapdragon-8-gen-3", out, "random", arguments.precision,
            tuple(arguments.backend or ("simulator",)), assignments=fast, say=say,
        )  # fmt: skip


if __name__ == "__main__":
    main()
