"""Latency, energy and memory of a model on a target, estimated: never measured, always with an interval."""

from __future__ import annotations

from edgeforge.estimate.estimate import Estimate, Range, estimate_decoder, estimate_program

__all__ = ["Estimate", "Range", "estimate_decoder", "estimate_program"]
