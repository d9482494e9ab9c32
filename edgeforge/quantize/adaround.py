"""adaround: each weight is rounded up or down, whichever serves the layer's output, found by gradient descent.

    min over V of E |f(W x + b) - f(W' x' + b)|^2 + l sum(1 - |2 h(V) - 1|^t)     W' = s (floor(W / s) + h(V))

h is a sigmoid stretched to -0.1..1.1 and cut to 0..1, f the clamp of a fused activation; t falls from 20 to 2, so that
h ends at 0 or 1. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv:2004.10568), layer
by layer with the rounded layers before it. The ranges are those of `seqmse`."""

from __future__ import annotations

import numpy as np
import torch

from edgeforge.ir.types import TensorType
from edgeforge.quantize.layerwise import Layer
from edgeforge.quantize.seqmse import clipping

STEPS = 600
BATCH = 512
RATE = 1e-2
#: l, as a share of the output's variance per weight.
WEIGHT = 0.01
#: The first share of the steps has no regularization.
WARM = 0.2


def choose(layer: Layer) -> tuple[np.ndarray, TensorType]:
    """See `layerwise.Choose`. Repeatable: batches are drawn from one seed."""
    kind, scales = layer.scaled(clipping(layer))
    scale, weight = torch.from_numpy(scales).float(), torch.from_numpy(layer.weight)
    low = (weight / scale).floor()
    rest = weight / scale - low
    free = (-torch.log(1.2 / (rest + 0.1) - 1)).requires_grad_()
    exact, rounded = torch.from_numpy(layer.exact), torch.from_numpy(layer.rounded)
    bias = torch.from_numpy(layer.bias)[:, None]

    def output(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x @ w.mT + bias
        return y if layer.clamp is None else y.clamp(*layer.clamp)

    optimizer = torch.optim.Adam([free], RATE)
    order = np.random.default_rng(0)
    level = float(output(exact[:, :BATCH], weight).var()) + 1e-12
    for step in range(STEPS):
        rows = torch.from_numpy(order.integers(0, exact.shape[1], BATCH))
        up = (torch.sigmoid(free) * 1.2 - 0.1).clamp(0, 1)
        with torch.no_grad():
            wanted = output(exact[:, rows], weight)
        got = output(rounded[:, rows], (low + up).clamp(-layer.top, layer.top) * scale)
        loss = ((got - wanted) ** 2).mean() / level
        progress = (step / STEPS - WARM) / (1 - WARM)
        if progress > 0:
            power = 2 + 18 * (1 - progress)
            loss = loss + WEIGHT * (1 - (2 * up - 1).abs() ** power).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    codes = (low + (free.detach() > 0)).clamp(-layer.top, layer.top)
    return codes.double().numpy() * scales, kind
