"""A small convolutional network for the 8x8 digits of scikit-learn (UCI Optical Recognition of Handwritten Digits)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


class Digits(nn.Module):
    """float32 [N, 1, 8, 8] in 0..1 -> logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mix = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.classifier = nn.Linear(32, 10)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        x = x + self.mix(self.act(self.depthwise(x)))
        return self.classifier(self.act(self.down(x)).mean((2, 3)))


def load() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The trained model and an example input."""
    from safetensors.torch import load_file

    model = Digits().eval()
    model.load_state_dict(load_file(HERE / "weights.safetensors"))
    return model, (torch.zeros(1, 1, 8, 8),)


def calibration() -> Path:
    return HERE / "calibration.npz"


def heldout() -> Path:
    return HERE / "heldout.npz"
