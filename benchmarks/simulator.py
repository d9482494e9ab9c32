"""How fast the simulator is, against what else computes the same network on this machine.

    python benchmarks/simulator.py [--case NAME ...] [--rounds 5] [--no-emulator] [--json]

MobileNetV2 at batch 1 and 32, and four layers of a Llama of 1B shape (width 2048, 32 heads on 8 key/value heads, MLP
8192): 128 tokens at once, and one token after 127. Weights are random. Each contender's time is the median over
interleaved rounds, after one round that counts for nothing; the memory is the peak above what the process held before.
The HTP emulator runs in a child process; start and compilation are not counted."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeforge import backends
from edgeforge.backends._child import load_arrays, save_arrays
from edgeforge.backends.ort_qnn import write_model
from edgeforge.frontend.torch import from_module
from edgeforge.ir.graph import Graph
from edgeforge.ir.op import OPS
from edgeforge.ir.types import RANGE
from edgeforge.passes import optimize
from edgeforge.quantize.assign import assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert
from edgeforge.recipe import Override, Recipe
from edgeforge.resources import folder
from edgeforge.sim.evaluate import quantize_feeds, simulate
from edgeforge.sim.fast import Fast
from edgeforge.target import load_target

TARGET = "snapdragon-8-gen-3"
TOKENS = 128
#: Before each run: idle threads of the contender before spin for a while, and would slow the next one down.
PAUSE_S = 0.3
#: The emulator repeats an inference until it has run this long.
LONG_MS = 3000
SHAPE_1B = {
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0},
}
#: Residual stream and what enters softmax and normalization at 16 bits, the rest at 8.
LLAMA_W8A8 = Recipe(
    precision="w8a8",
    overrides=tuple(
        Override(match=match, output="a16")
        for match in ("*embed_tokens*", "*layers.?.add*", "*attn.scores*", "*attn.matmul", "*attn.mul_4", "*attn.add_2")
    ),
)


@dataclass(frozen=True)
class Case:
    """A network on one input. ``module`` makes (float model, its inputs)."""

    name: str
    module: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    recipe: Recipe


@dataclass(frozen=True)
class Row:
    """A contender's figures. source: "measured on this CPU", "emulated", or why there is no figure."""

    contender: str
    ms: float | None
    times_float32: float | None
    peak_mb: float | None
    source: str


def embedded(name: str) -> Any:
    """The code of an embedded model, without its weights."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder("models") / name / "model.py")
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code


def mobilenet(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = embedded("mobilenetv2").MobileNetV2().eval()
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    channels_last = torch.channels_last
    return model.to(memory_format=channels_last), (torch.randn(batch, 3, 224, 224).to(memory_format=channels_last),)


def prefill() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = embedded("tinylm").TinyLM(SHAPE_1B, TOKENS).eval()
    return model, (torch.randint(0, SHAPE_1B["vocab_size"], (1, TOKENS)),)


class Decode(nn.Module):
    """One token after TOKENS - 1 others: ids [1, 1] and per layer keys and values [1, kv_heads, TOKENS - 1, head_dim]
    to logits [1, 1, V]."""

    def __init__(self) -> None:
        super().__init__()
        code = embedded("tinylm")
        self.rope, self.lm = code.rope, code.TinyLM(SHAPE_1B, TOKENS)

    def forward(self, ids: Tensor, *cache: Tensor) -> Tensor:
        body = self.lm.model
        cos, sin = body.cos[:, :, -1:], body.sin[:, :, -1:]
        x = body.embed_tokens(ids)
        for layer, keys, values in zip(body.layers, cache[::2], cache[1::2], strict=True):
            x = x + self.attend(layer.self_attn, layer.input_layernorm(x), cos, sin, keys, values)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm.lm_head(body.norm(x))

    def attend(self, part: Any, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.rope(part.q_proj(x).view(1, 1, part.heads, part.size).transpose(1, 2), cos, sin)
        k = self.rope(part.k_proj(x).view(1, 1, part.kv_heads, part.size).transpose(1, 2), cos, sin)
        v = part.v_proj(x).view(1, 1, part.kv_heads, part.size).transpose(1, 2)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        scores = q.reshape(1, part.kv_heads, -1, part.size) @ k.transpose(2, 3) * part.size**-0.5
        return part.o_proj((torch.softmax(scores, -1) @ v).reshape(1, 1, -1))


def decode() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Decode().eval()
    shape = (1, SHAPE_1B["num_key_value_heads"], TOKENS - 1, SHAPE_1B["head_dim"])
    cache = [torch.randn(shape) for _ in range(2 * SHAPE_1B["num_hidden_layers"])]
    return model, (torch.randint(0, SHAPE_1B["vocab_size"], (1, 1)), *cache)


CASES = (
    Case("mobilenetv2 w8a8 batch 1", lambda: mobilenet(1), Recipe()),
    Case("mobilenetv2 w8a8 batch 32", lambda: mobilenet(32), Recipe()),
    Case("llama-1b-4-layers w8a8 prefill 128", prefill, LLAMA_W8A8),
    Case("llama-1b-4-layers w8a16 prefill 128", prefill, Recipe(precision="w8a16")),
    Case("llama-1b-4-layers w8a8 decode 1", decode, LLAMA_W8A8),
    Case("llama-1b-4-layers w8a16 decode 1", decode, Recipe(precision="w8a16")),
)


class FakeQuant:
    """The usual float simulation: every node in torch float32 on dequantized weights, its result rounded to the
    encoding of the integer graph."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.constants = {
            value.name: torch.from_numpy(value.data if value.type.q is None else value.type.q.dequantize(value.data))
            for value in graph.constants()
        }

    def __call__(self, inputs: dict[str, Tensor]) -> None:
        known = {**self.constants, **{name: self.rounded(name, tensor) for name, tensor in inputs.items()}}
        last = {name: i for i, node in enumerate(self.graph.nodes) for name in node.inputs}
        for i, node in enumerate(self.graph.nodes):
            result = OPS[node.op].torch(torch, self.graph.view(node), *(known[name] for name in node.inputs))
            known[node.output] = self.rounded(node.output, result)
            for name in node.inputs:
                if last[name] <= i and name not in self.constants:
                    known.pop(name, None)

    def rounded(self, name: str, x: Tensor) -> Tensor:
        kind = self.graph.type(name)
        if kind.q is None:
            return x
        return torch.fake_quantize_per_tensor_affine(x, float(kind.q.scale), kind.q.zero, *RANGE[kind.dtype])


def quantized(case: Case) -> tuple[Graph, nn.Module, tuple[Tensor, ...]]:
    module, inputs = case.module()
    graph = optimize(from_module(module, inputs, "network").graph)
    target = load_target(TARGET)
    feeds = dict(zip(graph.inputs, (x.contiguous().numpy() for x in inputs), strict=True))
    plan = assign(graph, calibrate(graph, [feeds]), case.recipe, target)
    return convert(graph, plan, target), module, inputs


def measure(case: Case, rounds: int, emulator: bool, say: Callable[[str], None]) -> list[Row]:
    say(f"{case.name}: building")
    graph, module, inputs = quantized(case)
    arrays = dict(zip(graph.inputs, (x.contiguous().numpy() for x in inputs), strict=True))
    codes = quantize_feeds(graph, arrays)
    fake, kernels = FakeQuant(graph), Fast()
    tensors = dict(zip(graph.inputs, inputs, strict=True))
    start = time.perf_counter()
    simulate(graph, codes, kernels)
    say(f"{case.name}: first simulation (compiled loops loaded, weights prepared) {time.perf_counter() - start:.2f} s")
    contenders: dict[str, Callable[[], Any]] = {
        "simulator": lambda: simulate(graph, codes, kernels),
        "torch float32": lambda: module(*inputs),
        "torch fake-quant": lambda: fake(tensors),
    }
    missing = {}
    with tempfile.TemporaryDirectory(prefix="edgeforge-") as place, torch.inference_mode():
        qdq = backends.backend("onnx_qdq")
        if reason := qdq.cannot_run():
            missing["ORT CPU QDQ"] = reason
        else:
            say(f"{case.name}: writing the QDQ model")
            qdq.compile(graph, load_target(TARGET), Path(place))
            session = qdq.session(Path(place) / "model.onnx")  # type: ignore[attr-defined]
            contenders["ORT CPU QDQ"] = lambda: session.run(None, codes)
        say(f"{case.name}: {rounds} rounds of {', '.join(contenders)}")
        peaks = {name: peak_mb(run) for name, run in contenders.items()}
        times = interleaved(contenders, rounds)
    base = times["torch float32"]
    rows = [Row(name, ms, ms / base, peaks[name], "measured on this CPU") for name, ms in times.items()]
    rows += [Row(name, None, None, None, reason) for name, reason in missing.items()]
    if emulator:
        say(f"{case.name}: HTP emulator")
        rows.append(emulated(graph, codes, base))
    return rows


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds per contender."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_mb(run: Callable[[], Any]) -> float | None:
    """Peak resident memory above what is held now, in MB; None where Linux's counters are missing."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def emulated(graph: Graph, codes: dict[str, np.ndarray], base: float) -> Row:
    """The HTP emulator in a child process: this script once more."""
    name, qnn, target = "HTP emulator", backends.backend("ort_qnn"), load_target(TARGET)
    if reason := qnn.cannot_run():
        return Row(name, None, None, None, reason)
    assert target.soc is not None
    with tempfile.TemporaryDirectory(prefix="edgeforge-") as place:
        folder = Path(place)
        write_model(qnn.prepare(graph, target)[0], folder)
        save_arrays(str(folder / "feeds.npz"), codes)
        command = [sys.executable, __file__, "--emulate", place, str(target.soc.model)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            return Row(name, None, None, None, (done.stderr.strip() or "no reason given").splitlines()[-1][:200])
        ms, peak = json.loads((folder / "found.json").read_text())
    return Row(name, ms, ms / base, peak, "emulated (HTP on x86-64)")


def emulate(folder: Path, soc: int) -> None:
    """Write found.json: median milliseconds of an inference of the model in ``folder``, and the peak memory above what
    the compiled session held. A graph that takes long runs once."""
    import onnxruntime

    from edgeforge.backends._qnn_worker import session_options
    from edgeforge.backends.ort_qnn import OPTIONS

    session = onnxruntime.InferenceSession(folder / "model.onnx", session_options(soc, OPTIONS))
    feeds, times = load_arrays(str(folder / "feeds.npz")), []

    def timed() -> None:
        start = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - start) * 1e3)

    peak = peak_mb(timed)
    while sum(times) < LONG_MS:
        timed()
    (folder / "found.json").write_text(json.dumps([statistics.median(times), peak]))


def main() -> None:
    if sys.argv[1:2] == ["--emulate"]:
        emulate(Path(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", help="only cases whose name contains this (repeatable)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-emulator", action="store_true", help="the HTP emulator takes minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [case for case in CASES if not options.case or any(part in case.name for part in options.case)]
    if not chosen:
        parser.error(f"no such case; there are {', '.join(case.name for case in CASES)}")
    found = []
    for case in chosen:
        load = os.getloadavg()[0]
        rows = measure(case, options.rounds, not options.no_emulator, lambda line: print(line, file=sys.stderr))
        found.append({"case": case.name, "load": load, "rows": [asdict(row) for row in rows]})
        if not options.json:
            print(f"\n{case.name}, {options.threads} threads, load average before it {load:.1f}")
            for row in rows:
                if row.ms is None:
                    print(f"  {row.contender:18} {row.source}")
                else:
                    memory = "-" if row.peak_mb is None else f"{row.peak_mb:.0f} MB"
                    figures = f"{row.ms:10.1f} ms {row.times_float32:8.2f} x float32 {memory:>9}"
                    print(f"  {row.contender:18} {figures}  {row.source}")
    if options.json:
        print(json.dumps({"cpu": platform.processor(), "threads": options.threads, "cases": found}, indent=1))


if __name__ == "__main__":
    main()
