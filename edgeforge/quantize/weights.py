"""Symmetric weight quantization: per output channel, or block-wise (LPBQ) with integer block scales."""

from __future__ import annotations

import numpy as np

from edgeforge.errors import InvalidInput
from edgeforge.ir.fixed import LPBQ_SLACK, LPBQ_STEPS
from edgeforge.ir.types import RANGE, QParams, TensorType, Value, row_blocks


def quantize_weight(
    name: str, data: np.ndarray, dtype: str, block: int | None, method: str, least: np.ndarray | float = 0.0
) -> Value:
    """``least``: smallest scale per channel (a channel of near-zero weights must not push its bias out of int32).
    Codes of float weights [O, ...]: ``scale = max|w| / 127`` (or / 7) per output channel; with method "mse" the
    factor in 0.5..1 of that scale with the least squared error, per channel."""
    if block is not None:
        scales = _block_scales(name, data, dtype, block)
        q = QParams(scales, 0, axis=0, block=block)
    else:
        parts = [channel_scales(data[rows], RANGE[dtype][1], method) for rows in row_blocks(data.shape)]
        q = QParams(np.maximum(np.concatenate(parts), least).astype(np.float32), 0, axis=0)
    return Value(name, TensorType(data.shape, dtype, q), q.quantize(data, dtype))


def channel_scales(data: np.ndarray, top: int, method: str) -> np.ndarray:
    """float64 scale per output channel."""
    flat = data.reshape(len(data), -1).astype(np.float64)
    widest = np.maximum(np.abs(flat).max(1), 1e-9 * top) / top
    if method != "mse":
        return widest
    factors = np.linspace(0.5, 1.0, 51)
    best, best_error = widest, np.full(len(flat), np.inf)
    for factor in factors:
        scale = (widest * factor)[:, None]
        error = ((np.clip(np.rint(flat / scale), -top, top) * scale - flat) ** 2).sum(1)
        best, best_error = np.where(error < best_error, scale[:, 0], best), np.minimum(error, best_error)
    return best


def least_scale(bias: np.ndarray, x: TensorType) -> np.ndarray:
    """The weight scale per channel below which the bias would need more steps of s_x * s_w than int32 has room for:
    2**30 beside 16-bit inputs. Beside 8-bit ones 2**24 cost no layer precision, and Hexagon loses the bias of a 4-bit
    channel without weights that takes 2**30."""
    assert x.q is not None
    return np.abs(bias.astype(np.float64)) / (2.0 ** (24 if x.dtype == "u8" else 30) * float(x.q.scale))


def _block_scales(name: str, data: np.ndarray, dtype: str, block: int) -> np.ndarray:
    """LPBQ (low-power block quantization, Qualcomm AIMET): 4-bit codes; the scale of a block is an integer 1..16 times
    a per-channel scale, so that a dot product stays one integer sum per channel."""
    if data.ndim != 2 or data.shape[1] % block:
        raise InvalidInput(f"{name}: block-wise weights need [O, I] with I a multiple of {block}, got {data.shape}")
    top = RANGE[dtype][1]
    blocks = data.reshape(len(data), -1, block).astype(np.float64)
    widest = np.maximum(np.abs(blocks).max(2), 1e-9) / top
    channel = np.float32(widest.max(1) / LPBQ_STEPS)
    multiplier = np.clip(np.ceil(widest / channel[:, None] - LPBQ_SLACK), 1, LPBQ_STEPS)
    return (multiplier * channel[:, None]).astype(np.float32)
