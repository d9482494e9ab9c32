"""The child process of ort_qnn: ONNX Runtime's QNN execution provider on the HTP emulator. ``argv[1]`` names a request:

    {"action": "compile", "model": QDQ.onnx, "context": EPContext.onnx, "soc": 57, "options": {...}, "dump": folder}
    {"action": "run", "model": .onnx, "soc": 57, "options": {...}, "feeds": .npz, "outputs": .npz, "sizes": {...}}
    {"action": "serve", "model": .onnx, "soc": 57, "options": {...}, "socket": 5}

Exit code 0, or an exception on stderr; native aborts are seen by the parent."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_qnn

from edgeforge.backends._child import in_batches, load_arrays, save_arrays, serve

PROVIDER = "QNNExecutionProvider"


def session_options(soc: int, options: Mapping[str, str]) -> Any:
    """Every node on the HTP of ``soc`` (QNN soc_model), none on the CPU."""
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 2
    # ONNX Runtime's clean-up of Quantize-Dequantize pairs would merge a requantize or a relu with what is before it.
    made.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    provider = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "soc_model": str(soc), **options}
    made.add_provider_for_devices(devices[:1], provider)
    made.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return made


def compile_context(request: Mapping[str, Any]) -> None:
    dump = {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": request["dump"]}
    options = session_options(request["soc"], {**request["options"], **dump})
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", request["context"])
    options.add_session_config_entry("ep.context_embed_mode", "0")
    # The model is given as bytes; its large constants lie beside it.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.path.dirname(request["model"])
    )
    with open(request["model"], "rb") as stream:
        onnxruntime.InferenceSession(stream.read(), options)


def opened(request: Mapping[str, Any]) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    session = onnxruntime.InferenceSession(request["model"], session_options(request["soc"], request["options"]))
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def run(request: Mapping[str, Any]) -> None:
    save_arrays(request["outputs"], in_batches(opened(request), request["sizes"], load_arrays(request["feeds"])))


def main() -> None:
    with open(sys.argv[1]) as stream:
        request = json.load(stream)
    if request["action"] == "serve":
        serve(request["socket"], opened(request))
    else:
        {"compile": compile_context, "run": run}[request["action"]](request)


if __name__ == "__main__":
    main()
