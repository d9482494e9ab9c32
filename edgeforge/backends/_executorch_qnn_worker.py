"""The child process of executorch_qnn: ExecuTorch's QNN lowering and runtime. ``argv[1]`` names a request:

    {"action": "compile", "graphs": {METHOD: {"graph": .txt, "arrays": .npz}, ...}, "shared": bool (weights of all
     graphs once), "soc": "SM8650", "pte": .pte}
    {"action": "run", "pte": .pte, "method": METHOD, "inputs": [...], "results": [...], "feeds": .npz, "outputs": .npz,
     "sizes": {...}}
    {"action": "serve", "pte": .pte, "method": METHOD, "inputs": [...], "results": [...], "socket": 5}

QNN_SDK_ROOT and LD_LIBRARY_PATH must be set when the process starts. Exit code 0, or an exception on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeforge.backends._child import in_batches, load_arrays, save_arrays, serve


def opened(request: Mapping[str, Any]) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    from executorch.runtime import Runtime

    # The program must outlive its method: the runtime keeps no reference.
    program = Runtime.get().load_program(Path(request["pte"]).read_bytes())
    method = program.load_method(request["method"])

    def step(piece: dict[str, np.ndarray], program: Any = program) -> dict[str, np.ndarray]:
        outputs = method.execute([_tensor(piece[name]) for name in request["inputs"]])
        return {name: y.numpy().copy() for name, y in zip(request["results"], outputs, strict=True)}

    return step


def run_program(request: Mapping[str, Any]) -> None:
    save_arrays(request["outputs"], in_batches(opened(request), request["sizes"], load_arrays(request["feeds"])))


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Codes as they are; int64 ids as the int32 that the program takes."""
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.int32) if array.dtype == np.int64 else array))


def main() -> None:
    torch.set_num_threads(1)
    with open(sys.argv[1]) as stream:
        request = json.load(stream)
    if request["action"] == "run":
        run_program(request)
    elif request["action"] == "serve":
        serve(request["socket"], opened(request))
    else:
        # Only here: the lowering's imports take several seconds.
        from edgeforge.backends._executorch_qnn_lowering import compile_program

        compile_program(request)


if __name__ == "__main__":
    main()
