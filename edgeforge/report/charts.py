"""Charts as inline SVG: no library in the page, colors by CSS class (light and dark), a title on every mark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 10, 40


@dataclass(frozen=True)
class Axis:
    """Values low..high, linear or logarithmic."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, label: str, values: Sequence[float], log: bool = False) -> Axis:
        """An axis that holds all values: from 0, or between powers of ten."""
        if not log:
            return cls(label, 0.0, max(values, default=1.0) * 1.05 or 1.0)
        known = [value for value in values if value > 0] or [1.0]
        low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
        return cls(label, 10.0**low, 10.0 ** max(high, low + 1), log=True)

    def place(self, value: float) -> float:
        """0..1 along the axis."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.log:
            return [10.0**e for e in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        step *= next(f for f in (0.1, 0.2, 0.5, 1, 2) if (self.high - self.low) / (step * f) <= 6)
        return [self.low + i * step for i in range(int((self.high - self.low) / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three digits, with a prefix: 1.23k, 45M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


class Chart:
    """A plot with axes, or a bare drawing without them. ``label`` is read aloud in its place."""

    def __init__(self, label: str, width: int, height: int, x: Axis | None = None, y: Axis | None = None):
        view = f"0 0 {width} {height}"
        self.svg = ElementTree.Element("svg", {"viewBox": view, "role": "img", "aria-label": label})
        self.width, self.height, self.x, self.y = width, height, x, y
        for axis, along in ((x, True), (y, False)):
            if axis is not None:
                self._draw(axis, along)

    def at(self, point: Point) -> Point:
        """Pixels of a point in the units of the axes."""
        assert self.x is not None and self.y is not None
        across, up = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        return LEFT + self.x.place(point[0]) * across, TOP + (1 - self.y.place(point[1])) * up

    def add(self, tag: str, title: str = "", text: str = "", **attributes: object) -> None:
        names = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        plain = {k: f"{v:.2f}".rstrip("0").rstrip(".") if isinstance(v, float) else str(v) for k, v in names.items()}
        made = ElementTree.SubElement(self.svg, tag, plain)
        made.text = text or None
        if title:
            ElementTree.SubElement(made, "title").text = title

    def line(self, points: Sequence[Point], class_: str, title: str = "") -> None:
        pixels = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
        self.add("polyline", title, points=pixels, class_=f"line {class_}")

    def dot(self, point: Point, class_: str, title: str, radius: float = 4) -> None:
        x, y = self.at(point)
        self.add("circle", title, cx=x, cy=y, r=radius, class_=class_)

    def markup(self) -> Markup:
        return Markup(ElementTree.tostring(self.svg, encoding="unicode"))

    def _draw(self, axis: Axis, along: bool) -> None:
        end = (self.width - RIGHT, self.height - BOTTOM)
        for tick in axis.ticks():
            place = axis.place(tick)
            if along:
                x = LEFT + place * (end[0] - LEFT)
                self.add("line", x1=x, x2=x, y1=TOP, y2=end[1], class_="grid")
                self.add("text", text=number(tick), x=x, y=end[1] + 15, text_anchor="middle")
            else:
                y = TOP + (1 - place) * (end[1] - TOP)
                self.add("line", x1=LEFT, x2=end[0], y1=y, y2=y, class_="grid")
                self.add("text", text=number(tick), x=LEFT - 6, y=y + 4, text_anchor="end")
        if along:
            self.add("text", text=axis.label, x=(LEFT + end[0]) / 2, y=self.height - 6, text_anchor="middle")
        else:
            middle = (TOP + end[1]) / 2
            turn = f"rotate(-90 14 {middle})"
            self.add("text", text=axis.label, x=14, y=middle, text_anchor="middle", transform=turn)


def spark(counts: Sequence[int], label: str) -> Markup:
    """A histogram the size of a word."""
    width, height, top = 96, 22, max(counts, default=0) or 1
    chart = Chart(label, width, height)
    step = width / max(len(counts), 1)
    bars = [f"M{i * step:.1f} {height}v{-height * math.sqrt(c / top):.1f}h{step:.1f}V{height}z" for i, c in
            enumerate(counts) if c]  # fmt: skip
    chart.add("path", d="".join(bars), class_="fill1")
    return chart.markup()


def bars(label: str, rows: Sequence[tuple[str, float, str, str]], unit: str) -> Markup:
    """Horizontal bars; a row: (name, value, class, title)."""
    width, height, left, pitch = 760, 24 * len(rows) + 8, 290, 24
    chart = Chart(label, width, height)
    top = max((value for _, value, _, _ in rows), default=1.0) or 1.0
    for i, (name, value, class_, title) in enumerate(rows):
        y = 4 + i * pitch
        length = max((width - left - 110) * value / top, 1.0)
        chart.add("text", title, text=name[:38], x=left - 8, y=y + 15, text_anchor="end")
        chart.add("rect", title, x=left, y=y + 2, width=length, height=pitch - 6, class_=class_)
        chart.add("text", text=f"{number(value)} {unit}", x=left + length + 6, y=y + 15)
    return chart.markup()


def lanes(label: str, rows: Sequence[tuple[str, Sequence[tuple[float, str, str]]]], unit: str) -> Markup:
    """Timelines below each other on one scale; a row: (name, [(duration, class, title)])."""
    total = max((sum(part[0] for part in parts) for _, parts in rows), default=1.0)
    axis = Axis(unit, 0.0, total or 1.0)
    height = TOP + BOTTOM + 46 * len(rows)
    chart = Chart(label, 980, height, x=axis)
    for i, (name, parts) in enumerate(rows):
        y, at = TOP + 46 * i, 0.0
        chart.add("text", text=name, x=LEFT, y=y + 12)
        for duration, class_, title in parts:
            x, width = (axis.place(value) * (980 - LEFT - RIGHT) for value in (at, duration))
            chart.add("rect", title, x=LEFT + x, y=y + 18, width=max(width, 0.3), height=20, class_=class_)
            at += duration
    return chart.markup()


def cells(label: str, marks: Sequence[tuple[str, str]], across: int = 40) -> Markup:
    """A grid of squares in reading order; a mark: (class, title)."""
    rows, size = -(-len(marks) // across), 20
    chart = Chart(label, across * size, max(rows, 1) * size)
    for i, (class_, title) in enumerate(marks):
        x, y = i % across * size, i // across * size
        chart.add("rect", title, x=x + 1, y=y + 1, width=size - 2, height=size - 2, class_=class_)
    return chart.markup()
