"""simulator: EdgeForge's own integer evaluator, under the target's rounding rules. The reference for every artifact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgeforge.backends import Artifact, Codes, Step
from edgeforge.errors import Reason
from edgeforge.ir.graph import Graph
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import simulate
from edgeforge.target import Target


class Simulator:
    name = "simulator"
    numerics = ""
    source, timed, dynamic = "simulated", True, True
    summary = "EdgeForge's bit-exact evaluator"

    def missing(self) -> str:
        return ""

    def cannot_run(self) -> str:
        return ""

    def refusals(self, graph: Graph, target: Target) -> list[Reason]:
        return []

    def compile(self, graph: Graph, target: Target, folder: Path) -> Artifact:
        return Artifact(files=(), notes=(f"rounding rules of {target.numerics}; runs the bundle's integer graph",))

    def run(self, folder: Path, graph: Graph, target: Target, feeds: Codes) -> dict[str, np.ndarray]:
        with self.opened(folder, graph, target) as step:
            return dict(step(feeds))

    @contextmanager
    def opened(self, folder: Path, graph: Graph, target: Target, threads: int | None = None) -> Iterator[Step]:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        rounded = with_profile(graph, target.numerics)
        yield lambda feeds: simulate(rounded, feeds)


BACKEND = Simulator()
