"""What both ExecuTorch backends say of their programs."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from edgeforge.errors import Reason
from edgeforge.ir.graph import Node

MODEL = "model.pte"
VERSION = "1.5.1"


def no_transposed(node: Node) -> Reason:
    why = "ExecuTorch's partitioners take no transposed convolution with quantized weights [O, I, KH, KW]"
    return Reason(node.source or node.output, node.op, why, "resize and convolve, or export with onnx_qdq or ort_qnn")


def wrong_executorch() -> str:
    """What to install when ExecuTorch is absent or of another version, or ""."""
    try:
        found = importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found == VERSION:
        return ""
    return f"executorch {VERSION} is needed, found {found} -> pip install 'edgeforge[executorch]'"


def method_in(folder: Path) -> tuple[Path, str]:
    """The program of an artifact's folder and its method there: the one of a program in it, or, of a program beside
    it, the one with the folder's name."""
    own = folder / MODEL
    return (own, "forward") if own.is_file() else (folder.parent / MODEL, folder.name)
