"""The demo app's benchmark activity as android_demo/README.md describes it, on the real ONNX Runtime: a folder and the
name of a request."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

base, name = Path(sys.argv[1]), sys.argv[2]
asked, results = base / "requests" / name, base / "results" / name
results.mkdir(parents=True)
lines = [line.split("=", 1) for line in (asked / "request.properties").read_text().splitlines()]
read = {key.encode().decode("unicode_escape"): value.encode().decode("unicode_escape") for key, value in lines}


def write(file: str, text: str) -> None:
    part = results / f".{file}"
    part.write_text(text)
    part.replace(results / file)


def codes(kind: str, port: str, sample: int, i: int) -> np.ndarray:
    dtype = {"u8": np.uint8, "u16": np.uint16, "i32": np.int32, "i64": np.int64}[read[f"{port}.{i}.dtype"]]
    shape = [int(extent) for extent in read[f"{port}.{i}.shape"].split(",")]
    return np.fromfile(asked / f"{kind}-{sample}-{i}.bin", dtype).reshape(shape)


options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(read["threads"])
for key, value in read.items():
    if key.startswith("session."):
        options.add_session_config_entry(key.removeprefix("session."), value)
write("progress.txt", "loading")
start = time.perf_counter()
session = onnxruntime.InferenceSession(asked / read["model"], options, providers=["CPUExecutionProvider"])
load_ms = (time.perf_counter() - start) * 1e3
equal = count = worst = 0
where = ""
inputs = range(int(read["inputs"]))
for s in range(int(read["samples"])):
    write("progress.txt", f"golden sample {s + 1} of {read['samples']}")
    feeds = {read[f"input.{i}.name"]: codes("in", "input", s, i) for i in inputs}
    for i in range(int(read["outputs"])):
        label, want = read[f"output.{i}.name"], codes("want", "output", s, i)
        (got,) = session.run([label], feeds)
        got.tofile(results / f"out-{s}-{i}.bin")
        far = np.abs(got.astype(np.int64) - want)
        equal, count, worst = equal + int((far == 0).sum()), count + far.size, max(worst, int(far.max()))
        where = where or (label if far.any() else "")
times = []
for _ in range(int(read["warmup"]) + int(read["repeats"])):
    start = time.perf_counter()
    session.run(None, feeds)
    times.append((time.perf_counter() - start) * 1e6)
differs = "float islands" if read["islands"] == "true" else "differs"
document = {
    "schema": "edgeforge.device_result/1", "source": "host", "run_id": read["run_id"],
    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "bundle_sha256": read["bundle_sha256"],
    "artifact": read["artifact"], "device": {"name": "Acme Phone 1", "os": "Android 15", "soc": "SM8650"},
    "runtime": {"name": "ONNX Runtime, CPU", "versions": {"onnxruntime": onnxruntime.__version__}},
    "conditions": {"threads": int(read["threads"]), "power_mode": "normal", "thermal_before": 0, "thermal_after": 0},
    "latency_us": times[int(read["warmup"]) :], "load_ms": load_ms,
    "golden": {"status": "identical" if equal == count else differs, "identical": equal / count, "max_lsb": worst,
               "where": where},
}  # fmt: skip
write("result.json", json.dumps(document))
