"""docs/scale.md: exporting and running a language model of Llama-3.2-1B's shape. Run from the repository:

    python -m benchmarks.export FOLDER [--layers 16] [--only JOB ...] [--write docs/scale.md]

FOLDER receives models with random weights, bundles, and figures.json (a second run goes on from it). Every job runs in
a child process that is watched: wall-clock and processor seconds, and the peak of memory of the process tree, once
without pages that are mapped from files (the system can take those back) and once with them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.random_llama import write_model

if TYPE_CHECKING:
    from edgeforge.bundle import Bundle

TARGET = "snapdragon-8-gen-3"
CONTEXT, CHUNK, SEQUENCES = 128, 32, 2
#: Fast but complete: the same two sequences for every job.
RECIPE = (
    f"calibration.samples={SEQUENCES}", "calibration.method=minmax",
    f"language.context={CONTEXT}", f"language.chunk={CHUNK}",
)  # fmt: skip
#: Block-wise methods: a few steps show what memory they take.
LEARNED = ("train={blocks: true, steps: 4, batch: 2, check: 4}", "weights=gptq")
#: Decode steps that are timed, behind those that prepare.
STEPS, WARM = 16, 2
#: A child that needs more, or leaves less to others, is stopped.
MOST_BYTES, LEFT_BYTES = 20e9, 1e9


def model_folder(folder: Path, layers: int) -> Path:
    place = folder / f"model-{layers}"
    if not (place / "tokenizer.json").is_file():
        write_model(place, layers)
    return place


def parameters(model: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


# ---------------------------------------------------------------------------------------------------------------- jobs


def export_job(precision: str, *backends: str, lines: tuple[str, ...] = ()) -> Callable[[Path, int], dict[str, Any]]:
    """Export with the given backends and recipe lines; ``stages``: seconds at which each stage began."""

    def run(folder: Path, layers: int) -> dict[str, Any]:
        from edgeforge.pipeline import export

        began, stages = time.perf_counter(), []

        def say(line: str) -> None:
            stages.append((time.perf_counter() - began, line))
            _say(f"{stages[-1][0]:6.0f} s  {line}")

        names = (precision, *backends, *(["learned"] if lines else []))
        model, out = model_folder(folder, layers), bundle_folder(folder, layers, *names)
        made = export(str(model), TARGET, out, "random", precision, backends, assignments=(*RECIPE, *lines), say=say)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        skipped = {name: r.reason for name, r in made.manifest.backends.items() if r.status != "built"}
        return {"stages": stages, "bytes": size, "skipped": skipped}

    return run


def resumed_job(folder: Path, layers: int) -> dict[str, Any]:
    """The w8a8 export again, interrupted where it begins to compile; what the command then takes."""
    out = folder / f"resumed-{layers}"
    shutil.rmtree(out, ignore_errors=True)
    edgeforge = str(Path(sys.executable).with_name("edgeforge"))
    command = [
        *(edgeforge, "export", str(model_folder(folder, layers)), "--target", TARGET),
        *("--precision", "w8a8", "--calibration", "random", "--out", str(out)),
        *("--backend", "simulator", "--backend", "onnx_qdq"), *(f"--set={line}" for line in RECIPE),
    ]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if "onnx_qdq: compiling" in line:
            first.send_signal(signal.SIGINT)
    assert first.wait() != 0
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"bytes": size, "seconds": time.perf_counter() - began, "processor": processor}


def bundle_folder(folder: Path, layers: int, *names: str) -> Path:
    return folder / "-".join((f"bundle-{layers}", *names))


def float_onnx(folder: Path, layers: int) -> tuple[Path, Path]:
    """The prefill graph in float32 (torch's ONNX exporter, weights beside it) and its calibration samples: the steps
    that our export calibrates on."""
    import torch

    from edgeforge.llm.export import calibration_tokens
    from edgeforge.llm.quantize import Steps
    from edgeforge.models import load_model
    from edgeforge.recipe import Recipe

    place = folder / f"float-{layers}"
    file, samples = place / "model.onnx", place / "samples.npz"
    if samples.is_file():
        return file, samples
    place.mkdir(exist_ok=True)
    model = load_model(str(model_folder(folder, layers)))
    language = model.language
    assert language is not None
    sequences, _ = calibration_tokens(model, Recipe().with_set(list(RECIPE)), "random")
    batches = list(Steps(language, sequences[:SEQUENCES], CHUNK, CONTEXT))
    feeds = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    outputs = ["logits", *(f"{part}.{i}" for i in range(layers) for part in ("keys", "values"))]
    arguments = tuple(torch.from_numpy(array[:1].copy()) for array in feeds.values())
    program = torch.onnx.export(
        language.decoder(CONTEXT), arguments, dynamo=True, opset_version=21,
        input_names=list(feeds), output_names=outputs,
    )  # fmt: skip
    assert program is not None
    program.save(file, external_data=True)
    np.savez(samples, **feeds)  # type: ignore[arg-type]
    return file, samples


def static_job(weights: str, activations: str) -> Callable[[Path, int], dict[str, Any]]:
    """ONNX Runtime's quantize_static (QDQ, per channel, minimum and maximum) on `float_onnx`."""

    def run(folder: Path, layers: int) -> dict[str, Any]:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        file, samples = folder / f"float-{layers}" / "model.onnx", folder / f"float-{layers}" / "samples.npz"

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                feeds = dict(np.load(samples))
                count = len(feeds["ids"])
                self.rest = iter([{name: array[i : i + 1] for name, array in feeds.items()} for i in range(count)])

            def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
                return next(self.rest, None)

        out = folder / f"static-{layers}"
        out.mkdir(exist_ok=True)
        quantize_static(
            file, out / "model.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType[activations], weight_type=QuantType[weights], use_external_data_format=True,
        )  # fmt: skip
        return {"bytes": sum(f.stat().st_size for f in out.iterdir())}

    return run


def htp_job(context_bytes: int | None = None) -> Callable[[Path, int], dict[str, Any]]:
    """The decode graph as context binaries (`ort_qnn`), and golden decode steps on the emulator. context_bytes: a
    context's limit instead of the target's."""

    def run(folder: Path, layers: int) -> dict[str, Any]:
        from edgeforge import backends

        bundle, place = exported(folder, layers), folder / f"htp-{layers}"
        decode, chosen = bundle.parts[1], backends.backend("ort_qnn")
        limit = context_bytes or decode.target.context_bytes
        target = decode.target.model_copy(update={"context_bytes": limit})
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        began = time.perf_counter()
        chosen.compile(decode.graph, target, place)
        compiled = time.perf_counter() - began
        _say(f"compiled in {compiled:.0f} s")
        codes, wanted = decode.golden_part("input"), decode.golden_part("output")
        equal = total = farthest = 0
        seconds = []
        with chosen.opened(place, decode.graph, target) as step:
            for i in range(len(codes["ids"])):
                began = time.perf_counter()
                found = step({name: array[i : i + 1] for name, array in codes.items()})
                seconds.append(time.perf_counter() - began)
                _say(f"step in {seconds[-1]:.0f} s")
                for name, array in found.items():
                    gap = np.abs(array.astype(np.int64) - wanted[name][i : i + 1])
                    equal, total = equal + int((gap == 0).sum()), total + gap.size
                    farthest = max(farthest, int(gap.max()))
        binaries = [file.stat().st_size for file in place.rglob("*.bin")]
        return {
            "equal": equal, "integers": total, "farthest": farthest, "compile_seconds": compiled,
            "step_seconds": seconds, "binary": sum(binaries), "contexts": len(binaries),
        }  # fmt: skip

    return run


def exported(folder: Path, layers: int) -> Bundle:
    """The w8a8 bundle of the export job, made if need be."""
    from edgeforge.bundle import load_bundle

    place = bundle_folder(folder, layers, "w8a8", "simulator", "onnx_qdq")
    if not place.is_dir():
        export_job("w8a8", "simulator", "onnx_qdq")(folder, layers)
    return load_bundle(place)


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def simulator_job(folder: Path, layers: int) -> dict[str, Any]:
    """Decode steps of the simulator, one sequence."""
    from edgeforge.llm.session import opened

    with opened(exported(folder, layers), "simulator") as session:
        return _timed(lambda token: int(session.feed([token]).argmax()))


def torch_job(folder: Path, layers: int) -> dict[str, Any]:
    """The same decode steps in torch float32: the module with a static cache."""
    import torch

    from edgeforge.llm.steps import positions_and_masks
    from edgeforge.models import load_model

    torch.set_num_threads(2)
    language = load_model(str(model_folder(folder, layers))).language
    assert language is not None
    c, decoder, past = language.config, language.decoder(CONTEXT), CONTEXT - 1
    shapes = [(c.head_dim, past), (past, c.head_dim)] * layers
    cache = [torch.zeros(1, c.kv_heads, *shape) for shape in shapes]
    at = 0

    def step(token: int) -> int:
        nonlocal at
        made = positions_and_masks([at], 1, 1, past, c.masks)
        with torch.no_grad():
            logits, *rest = decoder(torch.tensor([[token]]), *map(torch.from_numpy, made), *cache)
        for keys, values, new_keys, new_values in zip(cache[::2], cache[1::2], rest[::2], rest[1::2], strict=True):
            keys[..., at : at + 1] = new_keys
            values[:, :, at : at + 1] = new_values
        at += 1
        return int(logits[0, -1].argmax())

    return _timed(step)


def _timed(step: Callable[[int], int]) -> dict[str, Any]:
    token, seconds, processor = 1, [], 0.0
    for i in range(WARM + STEPS):
        if i == WARM:
            processor = time.process_time()
        began = time.perf_counter()
        token = step(token)
        seconds.append(time.perf_counter() - began)
    return {
        "tokens_per_second": STEPS / sum(seconds[WARM:]),
        "best_ms": min(seconds[WARM:]) * 1e3,
        "processor_ms": (time.process_time() - processor) / STEPS * 1e3,
    }


@dataclass(frozen=True)
class Job:
    """``run(folder, layers)`` in the child; ``kind``: the section of the page; ``layers``: where not as asked."""

    kind: str
    run: Callable[[Path, int], dict[str, Any]]
    layers: int | None = None

    def shown(self, made: dict[str, Any]) -> dict[str, str]:
        """The job's own figures."""
        if made["exit"] != 0:
            return {}
        if self.kind == "export":
            return {"written GB": f"{made['bytes'] / 1e9:.2f}"}
        if self.kind == "decode":
            names = {"tokens_per_second": "tokens/s", "best_ms": "best ms", "processor_ms": "processor ms"}
            return {text: f"{made[key]:.4g}" for key, text in names.items()}
        equal = f"{made['equal']:,} of {made['integers']:,}"
        return {
            "compile s": f"{made['compile_seconds']:.0f}",
            "step s": f"{min(made['step_seconds']):.1f}",
            "equal integers": equal,
            "contexts": str(made["contexts"]),
            "binary GB": f"{made['binary'] / 1e9:.2f}",
        }


JOBS = {
    "w8a8 simulator onnx_qdq": Job("export", export_job("w8a8", "simulator", "onnx_qdq")),
    "w8a8 simulator onnx_qdq resumed": Job("export", resumed_job),
    "w8a8 quantize_static": Job("export", static_job("QInt8", "QUInt8")),
    "w4a16-b32 simulator onnx_qdq": Job("export", export_job("w4a16-b32", "simulator", "onnx_qdq")),
    "w4a8 simulator, trained block by block and GPTQ": Job("export", export_job("w4a8", "simulator", lines=LEARNED)),
    "w8a8 executorch_xnnpack": Job("export", export_job("w8a8", "executorch_xnnpack")),
    "decode simulator": Job("decode", simulator_job),
    "decode torch": Job("decode", torch_job),
    "htp one layer": Job("htp", htp_job(), 1),
    "htp": Job("htp", htp_job()),
    "htp contexts of 0.6 GB": Job("htp", htp_job(600_000_000)),
}

#: Title, kind of job, and what is to be known about it.
SECTIONS = (
    (
        "Export",
        "export",
        f"""\
Ours makes two graphs (prefill and decode), golden steps and a golden generation, and checks the bundle that it wrote.
*quantize_static* is ONNX Runtime's (QDQ, per channel, minimum and maximum), on the float prefill graph as torch exports
it, calibrated on the same steps. A process that needs more than {MOST_BYTES / 1e9:.0f} GB, or leaves others less than
{LEFT_BYTES / 1e9:.0f} GB, is stopped; its seconds are those until then. *resumed*: the export was stopped (SIGINT) when
its last stage began, and the command repeated; the seconds are the second run's.""",
    ),
    (
        "Decode",
        "decode",
        f"""\
One sequence, {STEPS} tokens behind {WARM} that prepare, w8a8, 2 threads. *simulator* computes Hexagon's integers;
*torch* is the float32 module with a static cache. *best*: the fastest step; *processor*: both threads', per token.""",
    ),
    (
        "Hexagon",
        "htp",
        """\
The decode graph (with embedding and head) of the exported bundle, compiled into context binaries (`ort_qnn`), then
golden decode steps on Qualcomm's HTP emulator, compared with the simulator's integers. The peak includes Qualcomm's
compiler. One context holds the model; with a limit of 0.6 GB instead of the target's it is cut between layers.""",
    ),
)


# ------------------------------------------------------------------------------------------------------------ watching


def memory(process: Path) -> tuple[int, int]:
    """(bytes that no file backs, all resident bytes) of a process and its children (Linux)."""
    own, every, waiting = 0, 0, [process]
    while waiting:
        process = waiting.pop()
        try:
            status = (process / "status").read_text()
            children = (process / "task" / process.name / "children").read_text().split()
        except OSError:
            continue
        kinds = {line.split(":")[0]: int(line.split()[1]) << 10 for line in status.splitlines() if line[:3] == "Rss"}
        own += kinds.get("RssAnon", 0) + kinds.get("RssShmem", 0)
        every += sum(kinds.values())
        waiting += [process.parent / child for child in children]
    return own, every


def _available() -> int:
    """Bytes that the system can still give (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def watched(name: str, folder: Path, layers: int) -> dict[str, Any]:
    """Figures of one job in a child process."""
    result = figures_file(folder, name, layers).with_suffix(".result")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.export", str(folder), "--layers", str(layers), "--child", name]
    before, began, load = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), [os.getloadavg()[0]]
    child = subprocess.Popen([*command, "--result", str(result)])
    peaks, stopped = (0, 0), False
    while child.poll() is None:
        now = memory(Path(f"/proc/{child.pid}"))
        peaks = (max(peaks[0], now[0]), max(peaks[1], now[1]))
        if now[0] > MOST_BYTES or _available() < LEFT_BYTES:
            stopped = True
            child.kill()
        time.sleep(0.1)
        load.append(os.getloadavg()[0])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "job": name,
        "layers": layers,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        "seconds": time.perf_counter() - began,
        "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "own": peaks[0],
        "resident": peaks[1],
        "load": float(np.mean(load)),
        "parameters": parameters(model_folder(folder, layers)),
        "exit": "stopped" if stopped else child.returncode,
        **(json.loads(result.read_text()) if result.is_file() else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", action="append", choices=list(JOBS))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, layers = arguments.folder, arguments.layers
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        arguments.result.write_text(json.dumps(JOBS[arguments.child].run(folder, layers)))
        return
    for name in arguments.only or JOBS:
        count = JOBS[name].layers or layers
        kept = figures_file(folder, name, count)
        if kept.is_file():
            continue
        model_folder(folder, count)
        if "quantize_static" in name:
            float_onnx(folder, count)
        made = watched(name, folder, count)
        kept.write_text(json.dumps(made, indent=1))
        print(name, json.dumps({key: value for key, value in made.items() if key != "stages"}), flush=True)
    if arguments.write:
        arguments.write.write_text(page(folder))


def figures_file(folder: Path, name: str, layers: int) -> Path:
    place = folder / "figures"
    place.mkdir(exist_ok=True)
    return place / f"{name.replace(' ', '-')}-{layers}.json"


# ---------------------------------------------------------------------------------------------------------------- page


INTRODUCTION = f"""\
# A language model of Llama-3.2-1B's shape

Written by `python -m benchmarks.export FOLDER --write docs/scale.md`: width 2048, MLP 8192, 32 heads on 8, vocabulary
128,256, random weights (bfloat16 files of one layer each), target {TARGET}, context {CONTEXT}, prefill steps of {CHUNK}
tokens, calibration on {SEQUENCES} sequences (minimum and maximum). Each row is a child process. *processor* sums the
seconds of all threads and descendants, which other work on the machine changes less than *wall*, the time that passed;
*load* is the mean number of processes that wanted a core meanwhile. *peak* is the largest memory of the process tree
without pages mapped from files, in GB and as a multiple of the float32 weights; *with mapped* counts those too.
"""


def page(folder: Path) -> str:
    found = {file: json.loads(file.read_text()) for file in sorted((folder / "figures").glob("*.json"))}
    rows = [(name, job, made) for name, job in JOBS.items() for made in found.values() if made["job"] == name]
    rows.sort(key=lambda row: (list(JOBS).index(row[0]), row[2]["layers"]))
    lines = [INTRODUCTION, _machine(), ""]
    for title, kind, note in SECTIONS:
        chosen = [row for row in rows if row[1].kind == kind]
        if not chosen:
            continue
        extra = list(dict.fromkeys(key for _, job, made in chosen for key in job.shown(made)))
        head = ["", "layers", "processor s", "wall s", "load", "peak GB", "x float32", "with mapped GB", *extra, "date"]
        lines += [f"## {title}", "", note, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, job, made in chosen:
            shown = job.shown(made)
            cells = [name, *_resources(made), *(shown.get(key, "") for key in extra), made["date"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def _machine() -> str:
    with open("/proc/cpuinfo") as stream:
        text = stream.read()
    model = next(line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    vnni = "with" if "avx512_vnni" in text else "without"
    packages = ("torch", "onnxruntime", "onnxruntime-qnn", "executorch", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{os.cpu_count()} cores ({model}, {vnni} AVX-512 VNNI), {memory:.0f} GB; {versions}."


def _resources(made: dict[str, Any]) -> list[str]:
    peak = made["own"] / 1e9
    share = made["own"] / (4 * made["parameters"])
    more = "" if made["exit"] == 0 else "stopped at "
    return [
        str(made["layers"]), f"{made['processor']:.0f}", f"{made['seconds']:.0f}", f"{made['load']:.0f}",
        f"{more}{peak:.2f}", f"{more}{share:.2f}", f"{made['resident'] / 1e9:.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
