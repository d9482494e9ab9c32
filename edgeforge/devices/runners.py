"""Programs that run an artifact on a phone: their options, the inputs they take, and what their logs and files say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeforge.backends.executorch_xnnpack import entering, leaving
from edgeforge.bundle import Bundle
from edgeforge.errors import BackendFailed, InvalidInput
from edgeforge.ir.graph import Graph
from edgeforge.ir.types import NUMPY, TensorType

#: Longest silence of the phone, in seconds: while a runner works, and otherwise.
RUN_S, ANSWER_S = 600, 30
PERF_TEST = "onnxruntime_perf_test"


@dataclass(frozen=True)
class Measured:
    """latency_us: every timed inference; outputs: codes of every golden sample, None where the runner keeps none (then
    ``unchecked`` says why)."""

    latency_us: tuple[float, ...]
    load_ms: float | None = None
    peak_memory_mb: float | None = None
    outputs: Mapping[str, np.ndarray] | None = None
    unchecked: str = ""


@dataclass(frozen=True)
class Run:
    """One run in a folder of its own on the phone, which holds the artifact's files. program: the runner, with the
    variables it is started with."""

    device: Any
    folder: str
    program: str
    bundle: Bundle
    threads: int
    warmup: int
    repeats: int

    def shell(self, command: str) -> str:
        return shell(self.device, f"cd {self.folder} && {command}", RUN_S)

    def put(self, name: str, data: bytes) -> None:
        self.device.sync.push(data, f"{self.folder}/{name}")

    def get(self, name: str, kind: TensorType, dtype: np.dtype) -> np.ndarray:
        """An output file as an array. Raises BackendFailed when it has another size."""
        return read_codes(self.device, f"{self.folder}/{name}", kind, dtype)

    def samples(self) -> list[list[np.ndarray]]:
        """The inputs' golden codes, sample by sample."""
        return samples(self.bundle.graph, self.bundle.golden_part("input"), self.bundle.graph.inputs)

    def types(self, names: Sequence[str]) -> list[TensorType]:
        return [self.bundle.graph.type(name) for name in names]

    def joined(self, found: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        return joined(self.bundle.graph, found)


def samples(graph: Graph, codes: Mapping[str, np.ndarray], names: Sequence[str]) -> list[list[np.ndarray]]:
    """Golden codes of inputs or outputs, sample by sample; a shorter one repeats its last."""
    sizes = {name: graph.type(name).shape[0] for name in names}
    counts = {name: len(codes[name]) // sizes[name] for name in names}
    starts = [{name: min(i, counts[name] - 1) * sizes[name] for name in names} for i in range(max(counts.values()))]
    return [[codes[name][at : at + sizes[name]] for name, at in start.items()] for start in starts]


def joined(graph: Graph, found: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Outputs of every sample, as golden vectors are."""
    pieces = zip(graph.outputs, zip(*found, strict=True), strict=True)
    return {name: np.concatenate(arrays) for name, arrays in pieces}


def read_codes(device: Any, path: str, kind: TensorType, dtype: np.dtype) -> np.ndarray:
    """A file on the phone as an array of ``kind``. Raises BackendFailed when it has another size."""
    data, want = device.sync.read_bytes(path), kind.size * dtype.itemsize
    if len(data) != want:
        raise BackendFailed(f"{path} has {len(data)} bytes, not {want} -> is it this bundle's?")
    return np.frombuffer(data, dtype).reshape(kind.shape)


class Executor:
    """ExecuTorch's executor_runner: --model_path, --inputs, --output_file, --num_executions, --cpu_threads."""

    artifact, summary, on_npu = "executorch_xnnpack", "ExecuTorch runner, XNNPACK", False
    tools = ("executorch",)

    def run(self, run: Run) -> Measured:
        graph, found = run.bundle.graph, []
        command = f"{run.program} --model_path model.pte --cpu_threads {run.threads} --output_file out --inputs "
        samples = run.samples()
        for s, sample in enumerate(samples):
            for i, (kind, codes) in enumerate(zip(run.types(graph.inputs), sample, strict=True)):
                run.put(f"in{s}-{i}.bin", entering(kind, codes).numpy().tobytes())
            run.shell(f"{command}{self._names(s, sample)} --num_executions 1")
            found.append([self._output(run, i, kind) for i, kind in enumerate(run.types(graph.outputs))])
        log = run.shell(f"{command}{self._names(0, samples[0])} --num_executions {run.warmup + run.repeats}")
        latencies, load_ms = executor_times(log, run.warmup)
        return Measured(latencies, load_ms, outputs=run.joined(found))

    def _names(self, s: int, sample: Sequence[np.ndarray]) -> str:
        return ",".join(f"in{s}-{i}.bin" for i in range(len(sample)))

    def _output(self, run: Run, i: int, kind: TensorType) -> np.ndarray:
        dtype = {"u8": np.dtype(np.int8), "u16": np.dtype(np.float32)}.get(kind.dtype, np.dtype(NUMPY[kind.dtype]))
        return leaving(kind, run.get(f"out-{i}.bin", kind, dtype))


class QnnExecutor:
    """ExecuTorch's qnn_executor_runner: --model_path, --input_list_path (a line of files per inference),
    --output_folder_path. Each line is timed by itself: golden samples first, then warm-up and timed inferences."""

    artifact, summary, on_npu = "executorch_qnn", "ExecuTorch runner, QNN", True
    tools = ("executorch", "onnxruntime-qnn")

    def run(self, run: Run) -> Measured:
        graph, lines = run.bundle.graph, []
        for s, sample in enumerate(run.samples()):
            for i, codes in enumerate(sample):
                run.put(f"in{s}-{i}.bin", narrow(codes).tobytes())
            lines.append(" ".join(f"in{s}-{i}.bin" for i in range(len(sample))))
        timed = lines[:1] * (run.warmup + run.repeats)
        run.put("inputs.txt", "".join(f"{line}\n" for line in lines + timed).encode())
        run.shell("mkdir -p outputs")
        log = run.shell(
            f"{run.program} --model_path model.pte --input_list_path inputs.txt --output_folder_path outputs"
        )
        found = [
            [self._output(run, f"outputs/output_{s}_{i}.raw", kind) for i, kind in enumerate(run.types(graph.outputs))]
            for s in range(len(lines))
        ]
        return Measured(qnn_times(log, len(lines), run.warmup, run.repeats), outputs=run.joined(found))

    def _output(self, run: Run, name: str, kind: TensorType) -> np.ndarray:
        codes = np.dtype(NUMPY[kind.dtype])
        return run.get(name, kind, narrow(np.empty(0, codes)).dtype).astype(codes)


class OnnxPerfTest:
    """onnxruntime_perf_test: the model and its test_data_set_0 in one folder; one line per inference in its result
    file. It keeps no outputs."""

    artifact, summary, on_npu = "onnx_qdq", f"{PERF_TEST}, CPU", False
    tools = ("onnx",)

    def run(self, run: Run) -> Measured:
        from onnx import numpy_helper

        graph, options = run.bundle.graph, run.bundle.manifest.backends[self.artifact].options
        run.shell("mkdir -p test_data_set_0")
        for i, (name, codes) in enumerate(zip(graph.inputs, run.samples()[0], strict=True)):
            run.put(f"test_data_set_0/input_{i}.pb", numpy_helper.from_array(codes, name).SerializeToString())
        entries = " ".join(f"{key}|{value}" for key, value in options.items())
        count = run.warmup + run.repeats
        # -o 99: all optimizations, as in every other run of this artifact (older programs take fewer by default)
        command = f'{run.program} -e cpu -m times -r {count} -x {run.threads} -o 99 -C "{entries}" model.onnx times.csv'
        log = run.shell(command)
        latencies, peak_mb = perf_times(run.shell("cat times.csv"), run.warmup, run.repeats)
        loaded = re.search(r"Session creation time cost: ?([\d.e+-]+) s", log)
        load_ms = float(loaded[1]) * 1e3 if loaded else None
        return Measured(latencies, load_ms, peak_mb, unchecked=f"{PERF_TEST} keeps no outputs to compare")


#: Runners by what their file's name contains; any other is an executor_runner.
RUNNERS = {"qnn": QnnExecutor(), "perf_test": OnnxPerfTest(), "": Executor()}
Runner = Executor | QnnExecutor | OnnxPerfTest


def runner_for(file: Path, artifact: str | None = None) -> Runner:
    """The kind of runner that takes ``artifact``, or that ``file`` is by its name. Raises InvalidInput."""
    if artifact is None:
        return next(kind for word, kind in RUNNERS.items() if word in file.name)
    taken = {kind.artifact: kind for kind in RUNNERS.values()}
    if artifact not in taken:
        raise InvalidInput(f"no runner for {artifact} on a phone -> --backend {', '.join(taken)}")
    return taken[artifact]


def executor_times(log: str, warmup: int) -> tuple[tuple[float, ...], float | None]:
    """Microseconds of every timed inference, and milliseconds of loading, from a runner's log. An older runner logs
    the sum alone: then there is one sample, the mean. Raises BackendFailed when there is no time in it."""
    each = [float(ms) * 1e3 for ms in re.findall(r"Iteration \d+ of \d+: ([\d.]+) ms", log)]
    loaded = re.search(r"Model loaded in ([\d.]+) ms", log)
    load_ms = float(loaded[1]) if loaded else None
    if len(each) > warmup:
        return tuple(each[warmup:]), load_ms
    whole = re.search(r"executed successfully (\d+) time\(s\) in ([\d.]+) ms", log)
    if whole is None or int(whole[1]) == 0:
        raise _timeless("an executor_runner", log)
    return (float(whole[2]) * 1e3 / int(whole[1]),), load_ms


def qnn_times(log: str, golden: int, warmup: int, repeats: int) -> tuple[float, ...]:
    """Microseconds of the timed inferences, which stand behind ``golden`` and ``warmup`` others. The log's last line of
    that form is their sum."""
    each = [float(ms) * 1e3 for ms in re.findall(r"\b1 inference took ([\d.]+) ms", log)]
    first = golden + warmup
    if len(each) < first + repeats:
        raise _timeless("a qnn_executor_runner", log)
    return tuple(each[first : first + repeats])


def perf_times(table: str, warmup: int, repeats: int) -> tuple[tuple[float, ...], float | None]:
    """Microseconds of the timed inferences and the peak memory in MB, from lines
    "model,seconds,bytes,CPU use,number"."""
    rows = re.findall(r"^[^,\n]*,([\d.e+-]+),(\d+),", table, re.MULTILINE)
    if len(rows) != warmup + repeats:
        raise _timeless("an onnxruntime_perf_test", table)
    return tuple(float(seconds) * 1e6 for seconds, _ in rows[warmup:]), int(rows[-1][1]) / 1e6 or None


def _timeless(kind: str, text: str) -> BackendFailed:
    return BackendFailed(f"the runner said too little about time -> is it {kind}?\n{tail(text)}")


def narrow(codes: np.ndarray) -> np.ndarray:
    """Codes as the NPU takes them: ids as int32."""
    return codes.astype(np.int32) if codes.dtype == np.int64 else codes


def shell(device: Any, command: str, timeout_s: float = ANSWER_S) -> str:
    """Output of a command on the phone. Raises BackendFailed when it fails there."""
    done = device.shell2(command, timeout=timeout_s)
    if done.returncode:
        # A shell's way of saying that a signal ended the program.
        how = f" (killed by signal {done.returncode - 128})" if done.returncode > 128 else ""
        raise BackendFailed(
            f"{device.serial}: exit code {done.returncode}{how} of: {command[:300]}\n{tail(done.output)}"
        )
    return done.output


def tail(text: str) -> str:
    return "\n".join(f"    {line[:300]}" for line in text.splitlines()[-6:])
