"""One HTML page over bundles and their results, that opens offline and asks nobody anything; and one screen of text."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edgeforge import __version__
from edgeforge.devices.result import DeviceResult
from edgeforge.report.charts import Axis, Chart, bars, cells, lanes, number, spark
from edgeforge.report.gather import Facts

HERE = Path(__file__).parent
#: Class of a chart mark by what a node is bound by, and by dtype.
BOUND = {"compute": "fill1", "vector": "fill2", "overhead": "fill3", "ddr": "fill4", "fused": "fill0", "": "fill0"}
DTYPE = {"u8": "fill1", "u16": "fill2", "i32": "fill3", "i64": "fill0"}
UNIT = {"NPU": "fill1", "GPU": "fill2", "CPU": "fill4"}


def render(facts: Sequence[Facts], compare: bool) -> str:
    """The page. The same facts give the same bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "spark": spark}
    environment.globals |= {"measured_ratio": measured_ratio, "watched": watched}
    script, style = ((HERE / name).read_text() for name in ("page.js", "page.css"))
    return environment.get_template("page.html.j2").render(
        facts=facts,
        compared=comparison(facts) if compare else None,
        charts={one.id: charts(one) for one in facts},
        version=__version__,
        script=Markup(script),
        style=Markup(style),
        policy=f"default-src 'none'; script-src 'sha256-{_csp(script)}'; style-src 'sha256-{_csp(style)}'",
    )


def _csp(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def charts(facts: Facts) -> dict[str, Markup]:
    """SVG by name; only those for which there is data."""
    found = {"precision": _precision_map(facts), "memory": _live_memory(facts)}
    if facts.estimate is not None:
        found["roofline"] = _roofline(facts)
    if lanes := _timelines(facts):
        found["timeline"] = lanes
    if watched(facts):
        found["resident"] = _resident_memory(facts)
    return found


def _title(node: Any) -> str:
    return f"{node.name} ({node.op}{f', from {node.source}' if node.source else ''})"


def _roofline(facts: Facts) -> Markup:
    """MACs per second over MACs per byte, both axes logarithmic; the roofs are the estimator's model of the chip."""
    assert facts.roofs is not None
    compute, memory = facts.roofs
    points = [(n, n.macs / n.bytes, n.macs / n.us * 1e6) for n in facts.nodes if n.macs and n.us and n.bytes]
    x = Axis.over("MACs per byte moved if nothing is cached", [p[1] for p in points], log=True)
    y = Axis.over("MAC/s, estimated", [*(p[2] for p in points), compute], log=True)
    chart = Chart("Roofline of the nodes, estimated", 760, 420, x, y)
    title = f"roofs of the estimator: {number(compute)} MAC/s, {number(memory)}B/s"
    corners = sorted({x.low, min(max(compute / memory, x.low), x.high), x.high})
    chart.line([(corner, min(corner * memory, compute)) for corner in corners], "roof", title)
    for node, intensity, rate in points:
        detail = (
            f"{_title(node)}: {number(rate)} MAC/s at {intensity:.3g} MAC/B, {node.us:.3g} us, bound by {node.bound}"
        )
        chart.dot((intensity, rate), BOUND[node.bound], detail)
    return chart.markup()


def _timelines(facts: Facts) -> Markup | None:
    rows = []
    if facts.estimate is not None:
        parts = [
            (n.us, BOUND[n.bound], f"{_title(n)}: {n.us:.3g} us estimated, bound by {n.bound}")
            for n in facts.nodes
            if n.us
        ]
        rows.append(("estimate, " + facts.estimate.target, parts))
    for result in facts.latest("device-hosted", "device-usb", "device-app", "loopback"):
        if result.nodes:
            parts = [(n.us, UNIT.get(n.unit, "fill0"), f"{n.name}: {n.us:.3g} us on {n.unit}") for n in result.nodes]
            rows.append((f"{result.source}: {result.artifact} on {result.device.name}", parts))
    return lanes("Timeline of the nodes", rows, "microseconds") if rows else None


def _live_memory(facts: Facts) -> Markup:
    values = [n.live_bytes / 1e3 for n in facts.nodes]
    x, y = Axis("node", 0, max(len(values), 2)), Axis.over("kB of activations alive", values)
    chart = Chart("Activations alive at each node", 760, 260, x, y)
    chart.line(list(enumerate(values)), "line1", f"at most {max(values):.4g} kB")
    return chart.markup()


def watched(facts: Facts) -> list[DeviceResult]:
    """Results of this host whose memory was watched, in the order of the chart's colors."""
    return [r for r in facts.latest("host", "emulated") if r.memory_mb][:4]


def _resident_memory(facts: Facts) -> Markup:
    shown = watched(facts)
    points = [point for r in shown for point in r.memory_mb]
    x, y = Axis.over("milliseconds", [p[0] for p in points]), Axis.over("resident MB", [p[1] for p in points])
    chart = Chart("Resident memory while artifacts ran on this host", 760, 260, x, y)
    for i, result in enumerate(shown):
        chart.line(result.memory_mb, f"line{i + 1}", f"{result.artifact}: peak {result.peak_memory_mb:.4g} MB")
    return chart.markup()


def _precision_map(facts: Facts) -> Markup:
    marks = [(DTYPE.get(n.dtype, "fill0"), f"{_title(n)}: {n.dtype}, rule {n.rule} ({n.status})") for n in facts.nodes]
    return cells("Output width of every node, in order", marks)


def comparison(facts: Sequence[Facts]) -> dict[str, Any]:
    """Bundles side by side. Devices: only results measured on devices; what was emulated has no row here."""
    devices = [(one, result) for one in facts for result in one.devices()]
    rows = [
        (f"{one.name}", result.p50_us / 1e3, "fill1", f"{result.artifact} on {result.device.name}, {result.source}")
        for one, result in devices
        if result.p50_us is not None
    ]
    estimated = [
        (one.name, one.estimate.latency_ms.p50, "fill3", f"{one.estimate.latency_ms} ms")
        for one in facts
        if one.estimate
    ]
    return {
        "devices": devices,
        "chart": bars("Median latency on devices", rows, "ms") if rows else None,
        "estimated": bars("Estimated latency", estimated, "ms") if estimated else None,
    }


def measured_ratio(facts: Facts, result: DeviceResult) -> float | None:
    """Measured over estimated, where both speak of the same chip."""
    soc = facts.bundle.target.soc
    same = soc is not None and result.device.soc == soc.name
    if facts.estimate is None or result.p50_us is None or not same:
        return None
    return result.p50_us / 1e3 / facts.estimate.latency_ms.p50


def summary(facts: Facts) -> tuple[list[str], list[list[Any]]]:
    """The page in one screen: (columns, rows) of figures with where they come from."""
    rows: list[list[Any]] = [[f.name, f"{f.value:.6g} {f.unit}", f.kind] for f in facts.bundle.manifest.figures]
    if facts.estimate is not None:
        e = facts.estimate
        for name, value, unit in (("latency", e.latency_ms, "ms"), ("energy", e.energy_mj, "mJ")):
            rows.append([name, f"{value.p50:.3g} {unit} ({value.low:.3g} to {value.high:.3g})", "estimated"])
    for r in facts.agreement:
        text = "not run" if not r.ran else "float islands" if r.identical is None else f"{r.identical:.2%} identical"
        rows.append([r.backend, text, r.source if r.ran else r.reason[:60]])
    for result in (*facts.devices(), *facts.latest("host")):
        if result.p50_us is not None:
            flags = f" [{'; '.join(result.flags)}]" if result.flags else ""
            speed = f", {result.tokens_per_second:.3g} tokens/s" if result.tokens_per_second else ""
            rows.append(
                [
                    f"{result.artifact} p50",
                    f"{result.p50_us / 1e3:.3g} ms{speed}{flags}",
                    f"{result.source}: {result.device.name}",
                ]
            )
    for node in facts.worst_first()[:5]:
        sqnr = "-" if node.sqnr_db is None else f"{node.sqnr_db:.1f} dB"
        rows.append([f"worst: {node.name}", sqnr, f"{node.op} {node.source}"])
    return ["figure", "value", "source"], rows
