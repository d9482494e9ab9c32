"""The catalogue: lookup, inheritance from the Hexagon generation, and the facts each chip states."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from edgeforge.errors import InvalidInput
from edgeforge.target import load_target, names


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("Galaxy S24", "snapdragon-8-gen-3"),
        ("samsung galaxy s24+", "snapdragon-8-gen-3"),
        ("S24", "snapdragon-8-gen-3"),
        ("s24 ultra", "snapdragon-8-gen-3"),
        ("Tab S8", "snapdragon-8-gen-1"),
        ("SM8650", "snapdragon-8-gen-3"),
        ("Snapdragon 8 Gen 3", "snapdragon-8-gen-3"),
        ("Galaxy S22", "snapdragon-8-gen-1"),
        ("sm8750", "snapdragon-8-elite"),
        ("Snapdragon 8 Elite for Galaxy", "snapdragon-8-elite"),
        ("Snapdragon X Elite", "snapdragon-x-elite"),
        ("Pixel 4", "snapdragon-855"),
        ("qcs6490", "qcs6490"),
        ("Snapdragon® 8 Gen 3 Mobile", "snapdragon-8-gen-3"),
        ("Qualcomm® Dragonwing™ QCS8550 (Proxy)", "qcs8550"),
    ],
)
def test_a_target_is_found_by_part_number_marketing_name_or_device(asked: str, found: str) -> None:
    assert load_target(asked).name == found


HUB = Path(os.environ.get("EDGEFORGE_DATA", "../shared/data")) / "hub_measurements" / "devices_and_chipsets.yaml"


@pytest.mark.skipif(not HUB.is_file(), reason="the device list of the hosted measurements is absent")
def test_the_catalogue_has_every_hosted_chipset_and_device() -> None:
    hub = yaml.safe_load(HUB.read_text())
    for key, chip in hub["chipsets"].items():
        soc = load_target(key).soc
        assert soc is not None
        assert (soc.model, soc.hexagon) == (chip["soc_model"], f"v{chip['htp_version']}"), key
        for name in (*chip["aliases"], chip["marketing_name"]):
            assert load_target(name).soc == soc
    for name, device in hub["devices"].items():
        assert load_target(name).name == load_target(device["chipset"]).name


@pytest.mark.parametrize("asked", ["iPhone 15", "", "snapdragon-9-gen-9-ultra", "../../etc/passwd", "gone.yaml"])
def test_an_unknown_target_is_refused_with_suggestions(asked: str) -> None:
    with pytest.raises(InvalidInput, match=r"did you mean ([\w-]+, ){0,2}[\w-]+\? "):
        load_target(asked)


@pytest.mark.parametrize("name", names())
def test_every_target_of_the_catalogue_reads(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.precisions
    assert all(figure.unit and figure.source for figure in target.figures.values())


def test_a_generation_states_its_limits() -> None:
    v68, v69, v73 = (load_target(f"snapdragon-{name}") for name in ("888", "8-gen-1", "8-gen-2"))
    assert not any("-b" in precision for precision in v68.precisions)
    assert v69.precisions == v73.precisions
    assert (v68.numerics, v69.numerics, v73.numerics) == ("htp-v68", "htp-v68", "htp-v73")
    assert (v68.weight_sharing, v69.weight_sharing, v73.weight_sharing) == (False, False, True)


def test_an_own_file_may_build_on_a_generation(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nbase: hexagon-v73\ndescription: my board\nmax_rank: 4\n")
    target = load_target(str(file))
    assert (target.numerics, target.max_rank, target.second_operand_zero) == ("htp-v73", 4, 128)
    file.write_text("name: mine\nbase: hexagon-v99\ndescription: my board\n")
    with pytest.raises(InvalidInput, match="unknown base 'hexagon-v99'"):
        load_target(str(file))
