"""The op table: importing this package registers every op file beside it."""

from importlib import import_module
from pathlib import Path

from edgeforge.ir.op import OPS

for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    import_module(f"{__name__}.{_file.stem}")

__all__ = ["OPS"]
