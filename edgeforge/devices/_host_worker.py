"""The child process of a benchmark on this host: one artifact loaded, warmed up and timed. ``argv[1]``: a request,

{"bundle": folder, "part": "", "backend": name, "threads": n, "repeats": n, "warmup": n, "outputs": .npz,
     "figures": .json}"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

#: Between two looks at the resident memory, in seconds.
SAMPLE_S = 0.005
STATM = Path("/proc/self/statm")


def pin(threads: int) -> None:
    """This process on its first ``threads`` permitted cores; before any library counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)


class Memory:
    """Resident memory over time, in MB, while the block lasts: [(ms, MB)]; empty where /proc is missing."""

    def __enter__(self) -> Memory:
        self.samples: list[tuple[float, float]] = []
        self._start, self._done = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if STATM.exists():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        page, pause = os.sysconf("SC_PAGE_SIZE"), SAMPLE_S
        while True:
            resident = int(STATM.read_text().split()[1]) * page / 1e6
            self.samples.append(((time.perf_counter() - self._start) * 1e3, resident))
            if len(self.samples) >= 1000:  # a long run: keep every second sample, look half as often
                self.samples, pause = self.samples[::2], pause * 2
            if self._done.wait(pause):
                return


def measure(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from edgeforge import backends
    from edgeforge.backends._child import save_arrays
    from edgeforge.bundle import load_bundle

    parts = load_bundle(Path(request["bundle"])).parts
    bundle, name = next(part for part in parts if part.part == request["part"]), request["backend"]
    chosen = backends.backend(name)
    codes = bundle.golden_part("input")
    sizes = {key: bundle.graph.type(key).shape[0] for key in codes}
    counts = {key: len(array) // sizes[key] for key, array in codes.items()}
    pieces = []
    for i in range(max(counts.values())):
        at = {key: min(i, counts[key] - 1) * sizes[key] for key in codes}
        pieces.append({key: np.ascontiguousarray(a[at[key] : at[key] + sizes[key]]) for key, a in codes.items()})
    with chosen.opened(bundle.artifact(name), bundle.graph, bundle.target, request["threads"]):
        pass  # imports the runtime, so that loading is not timed with it
    with Memory() as memory:
        begun = time.perf_counter()
        with chosen.opened(bundle.artifact(name), bundle.graph, bundle.target, request["threads"]) as step:
            loaded = time.perf_counter()
            outputs = [step(piece) for piece in pieces[:1]]
            first = time.perf_counter()
            outputs += [step(piece) for piece in pieces[1:]]
            for i in range(request["warmup"]):
                step(pieces[i % len(pieces)])
            samples = []
            for i in range(request["repeats"]):
                started = time.perf_counter_ns()
                step(pieces[i % len(pieces)])
                samples.append((time.perf_counter_ns() - started) / 1e3)
    joined = {key: np.concatenate([out[key] for out in outputs]) for key in outputs[0]}
    save_arrays(request["outputs"], joined)
    before = memory.samples[0][1] if memory.samples else 0.0
    return {
        "notes": [f"memory is the whole process's: {before:.0f} MB with the runtime, before the model was loaded"],
        "latency_us": samples,
        "load_ms": (loaded - begun) * 1e3,
        "first_run_ms": (first - loaded) * 1e3,
        "peak_memory_mb": max((mb for _, mb in memory.samples), default=None),
        "memory_mb": memory.samples,
    }


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    pin(request["threads"])
    Path(request["figures"]).write_text(json.dumps(measure(request)))


if __name__ == "__main__":
    main()
