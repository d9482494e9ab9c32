"""The op support matrix, made from the op table and the profiles of rounding rules."""

from __future__ import annotations

from typing import Any

import edgeforge.ops  # noqa: F401 (registers the op table)
from edgeforge.ir.op import OPS, Op
from edgeforge.ir.rules import PROFILES, RULES


def support() -> list[dict[str, Any]]:
    """Per op its meaning and, per profile and width of the activations, rule and status: ``{"op", "doc", "numerics":
    {profile: {"u8" | "u16": {"rule", "status"}}}}``."""
    return [
        {"op": op.name, "doc": op.doc.strip(), "numerics": {p: _widths(op, p) for p in PROFILES}}
        for op in sorted(OPS.values(), key=lambda op: op.name)
    ]


def _widths(op: Op, profile: str) -> dict[str, dict[str, str]]:
    found = {}
    for width, table in PROFILES[profile].items():
        name = "move" if op.numerics == "move" else table.get(op.name, table[op.numerics])
        found[width] = {"rule": name, "status": "exact" if name == "move" else RULES[name].status}
    return found


def markdown() -> str:
    """The matrix as a table: status at 8 bits / at 16 bits, one word where they agree."""
    lines = [f"| op | {' | '.join(PROFILES)} |", "|---|" + "---|" * len(PROFILES)]
    for row in support():
        cells = []
        for widths in row["numerics"].values():
            narrow, wide = widths["u8"]["status"], widths["u16"]["status"]
            cells.append(narrow if narrow == wide else f"{narrow} / {wide}")
        lines.append(f"| {row['op']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
