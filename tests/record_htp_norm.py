"""Softmax, RMSNorm and LayerNorm on the HTP emulator: the graphs, their inputs and, run as a script, what it gave.

python tests/record_htp_norm.py        (needs edgeforge[qnn]) writes tests/data/htp_norm.npz"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import edgeforge.ops  # noqa: F401
from edgeforge.backends.ort_qnn import BACKEND
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import NUMPY, RANGE, QParams, TensorType, Value
from edgeforge.quantize.convert import with_profile
from edgeforge.target import load_target

RECORDED = Path(__file__).parent / "data" / "htp_norm.npz"
TARGET = load_target("snapdragon-8-gen-3")


def rms_norm(dtype: str, shape: tuple[int, int], eps: float, seed: int) -> tuple[Graph, np.ndarray]:
    """Rows of growing amplitude (the first is all zeros) and a gain of both signs with zeros in it."""
    rng, top = np.random.default_rng(seed), RANGE[dtype][1]
    zero, gain_zero = int(top * 0.45), top // 3
    codes = zero + rng.normal(0, np.linspace(0, top / 4, shape[0])[:, None], shape)
    gain = rng.integers(0, top + 1, shape[1])
    gain[::7] = gain_zero
    x = TensorType(shape, dtype, QParams(np.float32(11.3 / top), zero))
    w = TensorType(shape[1:], dtype, QParams(np.float32(2.7 / top), gain_zero))
    y = TensorType(shape, dtype, QParams(np.float32(9.1 / top), top // 2))
    values = {"x": Value("x", x), "w": Value("w", w, gain.astype(NUMPY[dtype])), "y": Value("y", y)}
    node = Node("rms_norm", ("x", "w"), "y", {"eps": eps})
    graph = with_profile(Graph("norm", "integer", ("x",), (node,), ("y",), values), TARGET.numerics)
    return graph, np.clip(np.rint(codes), 0, top).astype(NUMPY[dtype])


def layer_norm(dtype: str, shape: tuple[int, int], seed: int) -> tuple[Graph, np.ndarray]:
    """Rows of growing amplitude about other means (the first is constant), a gain with zeros in it, and a bias."""
    rng, top = np.random.default_rng(seed), RANGE[dtype][1]
    spread = np.linspace(0, top / 5, shape[0])[:, None]
    codes = rng.uniform(0.2, 0.8, (shape[0], 1)) * top + rng.normal(0, 1, shape) * spread
    x = TensorType(shape, dtype, QParams(np.float32(11.3 / top), top // 2))
    w = TensorType(shape[1:], "u8", QParams(np.float32(0.011), 80))
    bias = QParams(np.full(shape[1], x.q.scale * w.q.scale), 0, axis=0)
    y = TensorType(shape, dtype, QParams(np.float32(7.7 / top), top // 3))
    values = {"x": Value("x", x), "y": Value("y", y)}
    values["w"] = Value("w", w, rng.integers(0, 256, shape[1]).astype(np.uint8))
    values["b"] = Value("b", TensorType(shape[1:], "i32", bias), bias.quantize(rng.normal(0, 1, shape[1]), "i32"))
    node = Node("layer_norm", ("x", "w", "b"), "y", {"eps": 1e-5})
    graph = with_profile(Graph("norm", "integer", ("x",), (node,), ("y",), values), TARGET.numerics)
    return graph, np.clip(np.rint(codes), 0, top).astype(NUMPY[dtype])


def softmax(shape: tuple[int, int], scale: float, seed: int, dtype: str = "u16") -> tuple[Graph, np.ndarray]:
    """Rows of logits of growing spread, half of the entries masked by -20; the first row is constant."""
    rng, top = np.random.default_rng(seed), RANGE[dtype][1]
    zero = int(0.763 * top)
    real = rng.normal(0, np.linspace(0, 4, shape[0])[:, None], shape)
    real[shape[0] // 2 :] -= 20.0 * (rng.random(shape[1]) < 0.5)
    codes = np.clip(np.rint(real / scale) + zero, 0, top).astype(NUMPY[dtype])
    x = TensorType(shape, dtype, QParams(np.float32(scale), zero))
    y = TensorType(shape, dtype, QParams(np.float32(1 / (top + 1)), 0))
    node = Node("softmax", ("x",), "y", {"axis": 1})
    values = {"x": Value("x", x), "y": Value("y", y)}
    return with_profile(Graph("softmax", "integer", ("x",), (node,), ("y",), values), TARGET.numerics), codes


def cases() -> dict[str, tuple[Graph, np.ndarray]]:
    return {
        "rms_norm16": rms_norm("u16", (12, 96), 1e-5, 1),
        "rms_norm16_eps": rms_norm("u16", (6, 64), 1.0, 2),
        "rms_norm8": rms_norm("u8", (12, 96), 1e-5, 3),
        "softmax16": softmax((12, 96), 5e-4, 4),
        "softmax8": softmax((12, 96), 0.061, 5, "u8"),
        "layer_norm16": layer_norm("u16", (12, 96), 6),
        "layer_norm8": layer_norm("u8", (12, 96), 7),
    }


def emulate(graph: Graph, codes: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        BACKEND.compile(graph, TARGET, Path(folder))
        return BACKEND.run(Path(folder), graph, TARGET, {"x": codes})["y"]


if __name__ == "__main__":
    np.savez_compressed(RECORDED, **{name: emulate(*case) for name, case in cases().items()})
