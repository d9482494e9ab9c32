"""MobileNetV2 1.0 at 224x224 (Sandler et al. 2018), 1001 ImageNet classes, batch normalization already folded.

The weights are not part of EdgeForge: they are read from the data folder (environment variable EDGEFORGE_DATA)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeforge.data import Dataset, images
from edgeforge.errors import InvalidInput
from edgeforge.recipe import ImageData

#: (expansion, width, repeats, stride)
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class Conv(nn.Module):
    """Convolution with TensorFlow's SAME padding (at stride 2: nothing before, one after), and ReLU6 if asked."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, relu6: bool):
        super().__init__()
        padding = 0 if stride == 2 else kernel // 2
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)
        self.act = nn.ReLU6() if relu6 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(self.pad(x)))


class Block(nn.Module):
    """Inverted residual."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        hidden = inputs * expansion
        self.expand = Conv(inputs, hidden, 1, 1, 1, True) if expansion > 1 else nn.Identity()
        self.dw = Conv(hidden, hidden, 3, stride, hidden, True)
        self.project = Conv(hidden, outputs, 1, 1, 1, False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.dw(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """float32 [N, 3, 224, 224] in -1..1 -> logits [N, 1001]; class 0 is background."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, 2, 1, True)
        blocks, width = [], 32
        for expansion, outputs, repeats, stride in BLOCKS:
            for i in range(repeats):
                blocks.append(Block(width, outputs, expansion, stride if i == 0 else 1))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Conv(width, 1280, 1, 1, 1, True)
        self.classifier = nn.Linear(1280, 1001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))


def data_folder() -> Path:
    folder = Path(os.environ.get("EDGEFORGE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    if not (folder / "vision_mobilenetv2" / "weights.npz").is_file():
        raise InvalidInput(
            f"mobilenetv2: no vision_mobilenetv2/weights.npz in {folder} -> set EDGEFORGE_DATA to the data folder"
        )
    return folder


def load() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model with its ImageNet weights, and an example input."""
    model = MobileNetV2().eval()
    layers = {"stem": model.stem.conv, "head": model.head.conv, "classifier": model.classifier}
    for i, block in enumerate(model.blocks):
        parts = ("expand", "dw", "project") if i else ("dw", "project")
        layers |= {f"b{i}.{part}": getattr(block, part).conv for part in parts}
    with np.load(data_folder() / "vision_mobilenetv2" / "weights.npz", allow_pickle=False) as weights:
        for name, layer in layers.items():
            for part in ("weight", "bias"):
                array = torch.from_numpy(weights[f"{name}.{part}"])
                getattr(layer, part).data.copy_(array.reshape(getattr(layer, part).shape))
    return model, (torch.zeros(1, 3, 224, 224),)


def calibration() -> Dataset:
    """The 200 calibration photographs."""
    names = json.loads((data_folder() / "splits.json").read_text())["images_imagenet_sample"]["calibration"]
    return images("x", [data_folder() / "images_imagenet_sample" / "img" / name for name in names], ImageData(), None)


def heldout() -> Dataset:
    """The 800 + 200 labelled photographs that calibration never sees."""
    import csv

    folder = data_folder()
    calibration_names = set(json.loads((folder / "splits.json").read_text())["images_imagenet_sample"]["calibration"])
    files, labels = [], []
    for part in ("images_imagenet_sample", "images_nips17"):
        with (folder / part / "labels.csv").open(newline="") as stream:
            for row in csv.DictReader(stream):
                file = folder / part / "img" / Path(row["file"]).name
                if file.name not in calibration_names and file.is_file():
                    files.append(file)
                    labels.append(int(row["label"]))
    return images("x", files, ImageData(), np.array(labels, np.int64))
