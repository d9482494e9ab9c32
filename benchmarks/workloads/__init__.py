"""Measured models as layer lists: own definitions with the exact input sizes of the hosted measurements.

``MODELS[model_id, component]`` builds a `Program`. Where an architecture is known only roughly it is not here: the
benchmark names every measured model without a workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from benchmarks.workloads.net import Net, Value
from edgeforge.estimate.program import Program


@dataclass(frozen=True)
class Workload:
    """``family``: models that share most of their structure (the unit of leave-one-family-out)."""

    model: str
    component: str
    family: str
    build: Callable[[], Program]


MODELS: dict[tuple[str, str], Workload] = {}


def workload(
    model: str, component: str, family: str
) -> Callable[[Callable[[Net], Value | list[Value]]], Callable[[Net], Value | list[Value]]]:
    """Register a function that fills a `Net` and returns its output(s)."""

    def add(fill: Callable[[Net], Value | list[Value]]) -> Callable[[Net], Value | list[Value]]:
        def build() -> Program:
            net = Net(model)
            outputs = fill(net)
            return net.finish(*(outputs if isinstance(outputs, list) else [outputs]))

        assert (model, component) not in MODELS, f"workload {model} {component} stands in two places"
        MODELS[model, component] = Workload(model, component, family, build)
        return fill

    return add


for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    if _file.stem != "net":
        import_module(f"{__name__}.{_file.stem}")
