"""Train the digits network (seconds on a CPU): writes weights.safetensors, calibration.npz and heldout.npz here."""

from __future__ import annotations

import numpy as np
import torch
from model import HERE, Digits
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, labels = load_digits(return_X_y=True)
    pixels = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(pixels))
    train, held = order[:1400], order[1400:]
    images, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for _ in range(60):
        for batch in torch.from_numpy(np.random.default_rng(1).permutation(train)).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = (model(images[held]).argmax(1) == targets[held]).double().mean()
    print(f"held-out accuracy {right:.4f} on {len(held)} digits")
    save_file(model.state_dict(), HERE / "weights.safetensors")
    np.savez(HERE / "calibration.npz", x=pixels[train[:100]])
    np.savez(HERE / "heldout.npz", x=pixels[held], labels=labels[held])


if __name__ == "__main__":
    main()
