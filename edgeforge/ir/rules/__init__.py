"""Rounding rules, one file per runtime: each file's ``RULES``, and the ``PROFILES`` that say which rule its runtime
uses for which op."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from edgeforge.ir.fixed import Rule
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules.exact import Profile

RULES: dict[str, Rule] = {}
PROFILES: dict[str, Profile] = {}

for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    _module = import_module(f"{__name__}.{_file.stem}")
    for _rule in _module.RULES:
        assert _rule.name not in RULES, f"rule {_rule.name} stands in two files"
        RULES[_rule.name] = _rule
    for _profile, _widths in _module.PROFILES.items():
        for _width, _table in _widths.items():
            PROFILES.setdefault(_profile, {}).setdefault(_width, {}).update(_table)


def rule_of(profile: str, family: str, n: NodeView) -> Rule:
    """The rule by which a runtime rounds a node. An entry of the node's op goes before that of its family."""
    dot = family == "dot"
    activations = {n.type(i).dtype for i in range(1 if dot else n.arity)} | (set() if dot else {n.out.dtype})
    widths = PROFILES[profile]
    table = widths["u16"] if "u16" in activations else widths["u8"]
    if len(activations) > 1:
        table = widths.get("mixed", table)
    if "dot_dw2" in table and _is_depthwise_stride_2(n):
        return RULES[table["dot_dw2"]]
    if "softmax_short" in table and n.node.op == "softmax" and n.shape(0)[n["axis"]] < 3:
        return RULES[table["softmax_short"]]
    if dot and "dot_i4" in table and n.type(1).dtype == "i4":
        return RULES[table["dot_i4"]]
    return RULES[table.get(n.node.op, table[family])]


def _is_depthwise_stride_2(n: NodeView) -> bool:
    """Whether Hexagon has its own kernel: for sides of 3 to 7, but not of 4 at 16 bits."""
    if n.node.op != "conv2d" or n["stride"] != (2, 2) or not 1 < n["groups"] == n.shape(0)[1] == n.shape(1)[0]:
        return False
    sides = n.shape(1)[2:]
    return 3 <= min(sides) and max(sides) <= 7 and not (n.type(0).dtype == "u16" and 4 in sides)
