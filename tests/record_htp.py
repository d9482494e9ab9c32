"""Conformance cases on the HTP emulator: which, and, run as a script, what they gave.

python tests/record_htp.py             (needs edgeforge[qnn]) writes tests/data/htp_ops.npz"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

import edgeforge.ops  # noqa: F401
from edgeforge.backends.ort_qnn import BACKEND
from edgeforge.conformance.cases import Case, make_case, prefix, union
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import simulate
from edgeforge.target import load_target

RECORDED = Path(__file__).parent / "data" / "htp_ops.npz"
TARGET = load_target("snapdragon-8-gen-3")
SEED = 3
#: First codes of an output, kept to show what differs.
HEAD = 16
#: op -> precisions and number of cases; the kinds of convolution, width and broadcast are the samplers' affair.
CHOSEN = {
    "conv2d": (("w8a8", "w8a16", "w4a8", "w4a16"), 8),
    "linear": (("w8a8", "w8a16", "w4a8", "w4a16", "w4a16-b32"), 4),
    "avg_pool": (("w8a8", "w8a16"), 6),
    "reduce_mean": (("w8a8", "w8a16"), 4),
    "requantize": (("w8a8", "w8a16"), 8),
    "mul": (("w8a8", "w8a16"), 8),
    **dict.fromkeys(("add", "sub", "matmul", "concat", "relu"), (("w8a8", "w8a16"), 4)),
    **dict.fromkeys(("neg", "pad"), (("w8a16",), 4)),
}


def cases() -> list[Case]:
    """Those that the emulator takes and whose rule is exact, named ``<op>.<precision>.<number>.`` by `prefix`."""
    listed = [
        make_case(op, precision, number, SEED, TARGET)
        for op, (precisions, count) in CHOSEN.items()
        for precision in precisions
        for number in range(count)
    ]
    return [case for case in listed if not BACKEND.refusals(case.graph, TARGET)]


def digest(codes: np.ndarray) -> int:
    """64 bits that stand for an output's shape and codes."""
    made = hashlib.sha256(repr(codes.shape).encode() + np.ascontiguousarray(codes).astype("<u2").tobytes())
    return int.from_bytes(made.digest()[:8], "little")


def head(codes: np.ndarray) -> np.ndarray:
    return np.resize(codes.reshape(-1), HEAD).astype(np.uint16)


def simulated(case: Case) -> np.ndarray:
    return simulate(with_profile(case.graph, TARGET.numerics), case.feeds)[case.graph.outputs[0]]


def emulated(listed: list[Case]) -> list[np.ndarray]:
    graph, feeds = union(listed)
    found = BACKEND.evaluate(graph, TARGET, feeds)
    return [found[prefix(case) + case.graph.outputs[0]] for case in listed]


if __name__ == "__main__":
    listed = cases()
    outputs = [codes for start in range(0, len(listed), 50) for codes in emulated(listed[start : start + 50])]
    np.savez_compressed(
        RECORDED,
        names=np.array([prefix(case) for case in listed]),
        graphs=np.array([case.graph.hash() for case in listed]),
        digests=np.array([digest(codes) for codes in outputs], np.uint64),
        heads=np.array([head(codes) for codes in outputs]),
    )
