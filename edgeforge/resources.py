"""Where the catalogue and the embedded models are: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """The folder ``targets`` or ``models``."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
