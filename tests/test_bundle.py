"""The folder of a bundle, which an interrupt takes away; its arrays: read as they were written, without being copied
into memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgeforge.bundle import load_arrays, save_arrays, writing
from edgeforge.errors import InvalidInput

ARRAYS = {
    "w": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "w|scale": np.float32([0.5, 0.25, 1]),
    "codes": np.arange(7, dtype=np.uint16),
    "ids": np.arange(5),
    "none": np.zeros((0, 3), np.int32),
}


def test_an_interrupt_while_the_folder_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.mkdir

    def interrupted(path: Path, mode: int = 0o777) -> None:
        make(path, mode)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.safetensors", ARRAYS)
    found = load_arrays(tmp_path / "a.safetensors")
    assert sorted(found) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_arrays_are_mapped_and_what_is_written_to_them_stays_private(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_arrays(file, ARRAYS)
    before, found = file.read_bytes(), load_arrays(file)
    assert not found["w"].flags.owndata
    found["w"][:] = 99
    assert file.read_bytes() == before


@pytest.mark.parametrize("damaged", [b"", b"1234", b"\xff" * 100])
def test_a_damaged_file_is_named(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(damaged)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_arrays(tmp_path / "a.safetensors")
