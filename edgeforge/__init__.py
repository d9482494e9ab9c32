"""EdgeForge: compressed models become integer-only graphs for phone NPUs.

The verbs of the command line are functions here: `load`, `quantize`, `lower`, `export`, `simulate`, `validate`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_VERBS = {
    "load": "edgeforge.pipeline",
    "quantize": "edgeforge.pipeline",
    "lower": "edgeforge.pipeline",
    "export": "edgeforge.pipeline",
    "simulate": "edgeforge.sim.evaluate",
    "validate": "edgeforge.validate",
}

__all__ = ["__version__", "export", "load", "lower", "quantize", "simulate", "validate"]


def __getattr__(name: str) -> Any:
    """Verbs are imported when they are first used: torch takes seconds."""
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'edgeforge' has no attribute {name!r}")
