"""Rounding rules, one file per runtime: each file's ``RULES``, and the ``PROFILES`` that say which rule its runtime
uses for which op."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from edgeforge.ir.fixed import Rule
from edgeforge.ir.graph import NodeView
from edgeforge.ir.rules._kinds import kinds
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
    """The rule by which a runtime rounds a node: that of the most special kind of node that its profile knows."""
    dot = family == "dot"
    activations = {n.type(i).dtype for i in range(1 if dot else n.arity)} | (set() if dot else {n.out.dtype})
    widths = PROFILES[profile]
    table = widths["u16"] if "u16" in activations else widths["u8"]
    return RULES[next(table[kind] for kind in (*kinds(n), n.node.op, family) if kind in table)]
