"""Hexagon's changes of encoding against integers of the HTP emulator (QNN 2.49, v75)."""

from __future__ import annotations

import numpy as np
import pytest

from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import QParams, TensorType, Value
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import simulate


@pytest.mark.parametrize(
    ("power", "zero_x", "zero_y", "shift"),
    [
        (8, 31232, 122, 128),
        (8, 31235, 122, 127),
        (4, 30003, 100, 7),
        (3, 30001, 7, 2),
        (2, 30001, 3, 0),
        (1, 30000, 3, 0),
    ],
)
def test_narrowing_by_a_power_of_two(power: int, zero_x: int, zero_y: int, shift: int) -> None:
    """The emulator steps to the next code ``shift`` input codes above the exact value of the last."""
    kinds = [TensorType((65536,), "u16", QParams(np.float32(0.05 / 2**power), zero_x))]
    kinds.append(TensorType((65536,), "u8", QParams(np.float32(0.05), zero_y)))
    values = {name: Value(name, kind) for name, kind in zip("xy", kinds, strict=True)}
    graph = Graph("narrow", "integer", ("x",), (Node("requantize", ("x",), "y"),), ("y",), values)
    x = np.arange(65536)
    found = simulate(with_profile(graph, "htp-v73"), {"x": x.astype(np.uint16)})["y"]
    up = (x - zero_x - shift >> power) + 1 if shift else x - zero_x >> power
    assert np.array_equal(found, np.clip(up + zero_y, 0, 255))
