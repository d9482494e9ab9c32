"""Errors a user can act on: what, where, why, what to do. The command line prints them and exits with code 2."""

from __future__ import annotations

from dataclasses import dataclass


class EdgeForgeError(Exception):
    """Base of every error caused by the input, the target or the environment (never by a defect in EdgeForge)."""


class InvalidInput(EdgeForgeError):
    """A file, an option or data cannot be used as given."""


class InvalidGraph(EdgeForgeError):
    """A graph breaks a rule of the IR; the message names node, value and rule."""


class MissingDependency(EdgeForgeError):
    """An optional package that the request needs is absent or has the wrong version."""


class BackendFailed(EdgeForgeError):
    """A vendor's compiler or runtime refused a graph; the message names its log."""


@dataclass(frozen=True)
class Reason:
    """One reason of a refusal: the node (or value) it is about, its op, the rule broken, and the remedy."""

    where: str
    op: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"  {self.where}  {self.op}  {self.why}  -> {self.remedy}"


class Unsupported(EdgeForgeError):
    """Everything that stands in the way, collected and reported together."""

    def __init__(self, headline: str, reasons: list[Reason]):
        self.reasons = reasons
        super().__init__("\n".join([f"{headline}: {len(reasons)} reason(s)", *map(str, reasons)]))
