"""The child process of ort_qnn: ONNX Runtime's QNN execution provider on the HTP emulator. ``argv[1]`` names a request:

    {"action": "compile", "model": QDQ.onnx, "context": EPContext.onnx, "soc": 57, "options": {...}, "dump": folder}
    {"action": "share", "models": {EPContext.onnx: QDQ.onnx, ...}, "soc": 57, "options": {...}}
    {"action": "run", "model": .onnx, "soc": 57, "options": {...}, "feeds": .npz, "outputs": .npz, "sizes": {...}}
    {"action": "serve", "model": .onnx, "soc": 57, "options": {...}, "socket": 5}

Exit code 0, or an exception on stderr; native aborts are seen by the parent."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_qnn

from edgeforge.backends._child import in_batches, load_arrays, save_arrays, serve

PROVIDER = "QNNExecutionProvider"


@cache
def _devices() -> list[Any]:
    """The provider's device, after its library was registered."""
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER][:1]


def session_options(soc: int, options: Mapping[str, str]) -> Any:
    """Every node on the HTP of ``soc`` (QNN soc_model), none on the CPU."""
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 2
    # ONNX Runtime's clean-up of Quantize-Dequantize pairs would merge a requantize or a relu with what is before it.
    made.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    provider = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "soc_model": str(soc), **options}
    made.add_provider_for_devices(_devices(), provider)
    made.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return made


def compile_context(request: Mapping[str, Any]) -> None:
    dump = {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": request["dump"]}
    _write_context(request["model"], request["context"], session_options(request["soc"], request["options"] | dump))


def share_context(request: Mapping[str, Any]) -> None:
    """One context binary for all models, with the weights that they have in common once."""
    sessions = []
    for number, (context, model) in enumerate(request["models"].items(), 1):
        options = session_options(request["soc"], request["options"] | {"enable_htp_weight_sharing": "1"})
        options.add_session_config_entry("ep.share_ep_contexts", "1")
        if number == len(request["models"]):
            options.add_session_config_entry("ep.stop_share_ep_contexts", "1")
        sessions.append(_write_context(model, context, options))


def _write_context(model: str, context: str, options: Any) -> Any:
    """The session that wrote the EPContext model ``context``."""
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", context)
    options.add_session_config_entry("ep.context_embed_mode", "0")
    # The model is given as bytes; its large constants lie beside it.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.path.dirname(model))
    with open(model, "rb") as stream:
        return onnxruntime.InferenceSession(stream.read(), options)


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
        {"compile": compile_context, "share": share_context, "run": run}[request["action"]](request)


if __name__ == "__main__":
    main()
