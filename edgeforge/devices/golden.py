"""The golden check: what a device computed for the bundle's inputs, against the simulator's integers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeforge import backends
from edgeforge.bundle import Bundle
from edgeforge.devices.result import Golden
from edgeforge.quantize.convert import with_profile
from edgeforge.sim.evaluate import simulate
from edgeforge.sim.parity import parity


def expected(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    """The simulator's output codes for the golden inputs, under the rounding rules of backend ``name``'s runtime."""
    profile = backends.backend(name).numerics
    if not profile or profile == bundle.target.numerics:
        return bundle.golden_part("output")
    return simulate(with_profile(bundle.graph, profile), bundle.golden_part("input"))


def compare(wanted: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray], islands: bool = False) -> Golden:
    """Integers of every output, and the first that departs. islands: part of the artifact runs in float, so that its
    integers are reported but need not agree."""
    status, shares, worst, where = "identical", [], 0, ""
    for name, codes in wanted.items():
        if name not in got or got[name].shape != codes.shape:
            found = "missing" if name not in got else f"of shape {got[name].shape}, not {codes.shape}"
            return Golden(status="differs", where=f"{name} is {found}")
        share, lsb = parity(got[name], codes)
        shares.append(share * codes.size)
        worst = max(worst, lsb)
        if lsb and not where:
            at = tuple(int(i) for i in np.argwhere(got[name] != codes)[0])
            where = f"{name}{list(at)}: {int(got[name][at])} instead of {int(codes[at])}"
            status = "float islands" if islands else "differs"
    total = sum(codes.size for codes in wanted.values())
    return Golden(status=status, identical=sum(shares) / total, max_lsb=worst, where=where)
