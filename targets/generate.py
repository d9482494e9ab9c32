"""Writes one YAML per chipset from the facts below: ``python targets/generate.py``.

What a chipset shares with its Hexagon generation stands in ``bases/``. The ``encodings`` and ``latency`` blocks of an
existing file are kept: they come from probing and from `edgeforge calibrate`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
LISTING = "Qualcomm AI Hub device list (qai-hub-models 0.65.0)"
EXECUTORCH = "ExecuTorch 1.5.1 backends/qualcomm/serialization/qc_schema.py"


@dataclass(frozen=True)
class Chip:
    """soc: part number. model: QNN soc_model. hexagon: generation. vtcm: MB, where ExecuTorch names the chip;
    bandwidth: peak DRAM GB/s and its source;
    same_as: the target with the same NPU (the device list names it as the reference, or the soc_model is the same)."""

    name: str
    title: str
    soc: str
    model: int
    hexagon: int
    form: str
    devices: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    fp16: bool = True
    sharing: bool | None = None
    vtcm: int | None = None
    executorch: bool = False
    bandwidth: tuple[float, str] | None = None
    same_as: str = ""


def galaxy(*names: str) -> tuple[str, ...]:
    return tuple(f"Samsung Galaxy {name}" for name in names)


def pixel(*names: str) -> tuple[str, ...]:
    return tuple(f"Google Pixel {name}" for name in names)


CHIPS = (
    Chip(
        "snapdragon-8-gen-1", "Qualcomm Snapdragon 8 Gen 1", "SM8450", 36, 69, "phone",
        (*galaxy("S22 5G", "S22+ 5G", "S22 Ultra 5G", "Tab S8"), "Xiaomi 12"), vtcm=8, executorch=True,
    ),
    Chip(
        "snapdragon-8-gen-2", "Qualcomm Snapdragon 8 Gen 2", "SM8550", 43, 73, "phone",
        galaxy("S23", "S23+", "S23 Ultra"), vtcm=8, executorch=True, same_as="qcs8550",
        bandwidth=(67.2, "64 bit LPDDR5X at 4,200 MHz, clock as in droidholic.com/snapdragon-8-gen-3-launched"),
    ),
    Chip(
        "snapdragon-8-gen-3", "Qualcomm Snapdragon 8 Gen 3", "SM8650", 57, 75, "phone",
        galaxy("S24", "S24+", "S24 Ultra"), vtcm=8, executorch=True,
        bandwidth=(76.8, "64 bit LPDDR5X at 4,800 MHz, clock as in droidholic.com/snapdragon-8-gen-3-launched"),
    ),
    Chip(
        "snapdragon-8-elite", "Qualcomm Snapdragon 8 Elite", "SM8750", 69, 79, "phone",
        galaxy("S25", "S25+", "S25 Ultra"),
        ("SM8750-AC", "Snapdragon 8 Elite for Galaxy", "Snapdragon 8 Gen 4"), vtcm=8, executorch=True,
        bandwidth=(84.8, "geektopia.es, 2024-10-22: LPDDR5X at 5,300 MHz"),
    ),
    Chip(
        "snapdragon-8-elite-gen-5", "Qualcomm Snapdragon 8 Elite Gen 5", "SM8850", 87, 81, "phone",
        galaxy("S26", "S26+", "S26 Ultra"), ("SM8850-AD", "Snapdragon 8 Elite Gen 5 for Galaxy"), vtcm=8,
        executorch=True,
    ),
    Chip(
        "snapdragon-8-elite-gen-6", "Qualcomm Snapdragon 8 Elite Gen 6", "SM8950", 113, 85, "phone",
        ("Snapdragon 8 Elite Gen 6 QRD",),
    ),
    Chip(
        "snapdragon-8-elite-extreme-gen-6", "Qualcomm Snapdragon 8 Elite Extreme Gen 6", "SM8975", 103, 85, "phone",
        ("Snapdragon 8 Elite Extreme Gen 6 QRD",),
    ),
    Chip(
        "snapdragon-7-gen-4", "Qualcomm Snapdragon 7 Gen 4", "SM7750", 86, 73, "phone", ("Snapdragon 7 Gen 4 QRD",),
        fp16=False,
    ),
    Chip(
        "snapdragon-888", "Qualcomm Snapdragon 888", "SM8350", 30, 68, "phone", galaxy("S21", "S21 Ultra"),
        fp16=False, vtcm=4, executorch=True,
    ),
    Chip(
        "snapdragon-778g", "Qualcomm Snapdragon 778G", "SM7325", 35, 68, "phone", galaxy("A73 5G"), fp16=False,
        sharing=True,
    ),
    Chip(
        "snapdragon-x-elite", "Qualcomm Snapdragon X Elite", "SC8380XP", 60, 73, "PC", ("Snapdragon X Elite CRD",),
        vtcm=8, executorch=True, bandwidth=(136.0, "tweaktown.com/news/93943: LPDDR5X-8533, 136 GB/s"),
    ),
    Chip(
        "snapdragon-x-plus-8-core", "Qualcomm Snapdragon X Plus 8-Core", "SC8340XP", 60, 73, "PC",
        ("Snapdragon X Plus 8-Core CRD",), same_as="snapdragon-x-elite",
    ),
    Chip(
        "snapdragon-x2-elite", "Qualcomm Snapdragon X2 Elite", "SC8480XP", 88, 81, "PC", ("Snapdragon X2 Elite CRD",),
        bandwidth=(152.0, "nhub.news/fr/2025/09: 152 GB/s (the Extreme variant has 228)"),
    ),
    Chip("qcm6690", "Qualcomm Dragonwing Q-6690", "QCM6690", 78, 73, "IoT", ("Dragonwing Q-6690 MTP",), fp16=False),
    Chip(
        "qcs5121", "Qualcomm Dragonwing IQ-X5121", "QCS5121", 60, 73, "IoT", ("Dragonwing IQ-X5121",),
        same_as="snapdragon-x-elite",
    ),
    Chip(
        "qcs6490", "Qualcomm Dragonwing QCS6490", "QCS6490", 93, 68, "IoT", ("Dragonwing RB3 Gen 2 Vision Kit",),
        ("QCM6490",), fp16=False, vtcm=2,
    ),
    Chip(
        "qcs7181", "Qualcomm Dragonwing IQ-X7181", "QCS7181", 60, 73, "IoT", ("Dragonwing IQ-X7181",),
        same_as="snapdragon-x-elite",
    ),
    Chip("qcs7790", "Qualcomm Dragonwing Q-7790", "QCS7790", 86, 73, "IoT", ("Dragonwing Q-7790",)),
    Chip("qcs8275", "Qualcomm Dragonwing IQ-8275", "QCS8275", 82, 75, "IoT", ("Arduino VENTUNO Q",)),
    Chip(
        "qcs8450", "Qualcomm QCS8450", "QCS8450", 36, 69, "XR", ("Snapdragon XR2 Gen 2",),
        same_as="snapdragon-8-gen-1",
    ),
    Chip(
        "qcs8550", "Qualcomm Dragonwing QCS8550", "QCS8550", 43, 73, "IoT", ("QCS8550 (Proxy)",), ("QCS8550 Proxy",)
    ),
    Chip(
        "qcs8750", "Qualcomm Dragonwing Q-8750", "QCS8750", 69, 79, "IoT", ("Dragonwing Q-8750",),
        same_as="snapdragon-8-elite",
    ),
    Chip("qcs9075", "Qualcomm Dragonwing IQ-9075", "QCS9075", 77, 73, "IoT", ("Dragonwing IQ-9075 EVK",), vtcm=8),
    Chip("sa7255p", "Qualcomm SA7255P", "SA7255P", 67, 75, "automotive", ("SA7255P ADP",)),
    Chip("sa8255p", "Qualcomm SA8255P", "SA8255P", 52, 73, "automotive", ("SA8255P ADP",), vtcm=8),
    Chip("sa8295p", "Qualcomm SA8295P", "SA8295P", 39, 68, "automotive", ("SA8295P ADP",), sharing=True, vtcm=8),
    Chip("sa8650p", "Qualcomm SA8650P", "SA8650P", 52, 73, "automotive", ("SA8650P ADP",)),
    Chip("sa8775p", "Qualcomm SA8775P", "SA8775P", 52, 73, "automotive", ("SA8775P ADP",)),
    Chip("snapdragon-670", "Qualcomm Snapdragon 670", "SDM670", 6, 65, "phone", pixel("3a", "3a XL"), fp16=False),
    Chip(
        "snapdragon-678", "Qualcomm Snapdragon 678", "SM6150-AC", 16, 66, "phone", ("Xiaomi Redmi Note 10 5G",),
        fp16=False,
    ),
    Chip("snapdragon-765g", "Qualcomm Snapdragon 765G", "SM7250", 25, 66, "phone", pixel("5", "5a 5G"), fp16=False),
    Chip("snapdragon-845", "Qualcomm Snapdragon 845", "SDM845", 1, 65, "phone", pixel("3", "3 XL"), fp16=False),
    Chip("snapdragon-855", "Qualcomm Snapdragon 855", "SM8150", 12, 66, "phone", pixel("4"), fp16=False),
    Chip(
        "snapdragon-865-plus", "Qualcomm Snapdragon 865+", "SM8250-AB", 21, 66, "tablet", galaxy("Tab S7"), fp16=False
    ),
)  # fmt: skip


def base(chip: Chip) -> str:
    """The capability generation: v73 to v85 are served alike."""
    return "hexagon-dsp" if chip.hexagon < 68 else f"hexagon-v{min(chip.hexagon, 73)}"


def document(chip: Chip) -> dict[str, Any]:
    """The chip's YAML; keys that equal the base's are left out."""
    dsp = chip.hexagon < 68
    unproven = ", numerics assumed as v81's" if chip.hexagon > 81 else ""
    unit = "DSP (the NPU backends start at v68: the CPU runs the model)" if dsp else "NPU"
    found: dict[str, Any] = {
        "name": chip.name,
        "base": base(chip),
        "description": f"{chip.title} ({chip.soc}), Hexagon v{chip.hexagon} {unit}, {chip.form}{unproven}",
        "soc": {"model": chip.model, "name": chip.soc, "hexagon": f"v{chip.hexagon}"},
        "aliases": [chip.title.removeprefix("Qualcomm "), *chip.aliases],
        "devices": list(chip.devices),
        "source": LISTING,
    }
    if not dsp and not chip.executorch:
        found["backends"] = ["simulator", "onnx_qdq", "ort_qnn", "executorch_xnnpack"]
    if chip.fp16 and not dsp:
        found["fp16"] = True
    if chip.sharing is not None:
        found["weight_sharing"] = chip.sharing
    if chip.same_as:
        found["latency_of"] = chip.same_as
    figures = {}
    if chip.vtcm:
        figures["vtcm"] = {"value": chip.vtcm, "unit": "MB", "source": EXECUTORCH}
    if chip.bandwidth:
        value, source = chip.bandwidth
        figures["dram_bandwidth"] = {"value": value, "unit": "GB/s", "source": source}
    if figures:
        found["figures"] = figures
    return found


def blocks(text: str) -> dict[str, str]:
    """Top-level key -> its lines, as written."""
    found = re.split(r"^(?=\w)", text, flags=re.M)
    return {block.partition(":")[0]: block for block in found if block}


def main() -> None:
    for chip in CHIPS:
        file = HERE / f"{chip.name}.yaml"
        old = blocks(file.read_text()) if file.is_file() else {}
        kept = [old[key] for key in ("encodings", "latency") if key in old]
        file.write_text("".join([yaml.safe_dump(document(chip), sort_keys=False, width=120), *kept]))


if __name__ == "__main__":
    main()
