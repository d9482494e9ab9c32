"""The text form of a graph: printable, parseable, diffable. Arrays are named by shape and hash and live beside it.

graph digits integer
in %x: u8[1,1,8,8] q(0.0625, 0)
const %w: i8[8,1,3,3] q(#[8]:1f0c2a9b, 0, axis=0) = #[8,1,3,3]:9d2e11aa
%y: u8[1,8,8,8] q(0.031, 0) = conv2d(%x, %w, %b) {"groups": 1, ...} htp8 {"mult": "#[8]:77aa01cc", ...} ; conv1
out %y
"""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeforge.errors import InvalidInput
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.types import NUMPY, QParams, TensorType, Value

_VALUE = re.compile(r"%(?P<name>\S+): (?P<dtype>\w+)\[(?P<shape>[\d,]*)\](?: q\((?P<q>.*?)\))?$")
_NODE = re.compile(
    r"(?P<value>%.*?) = (?P<op>\w+)\((?P<inputs>[^)]*)\) (?P<attrs>\{[^}]*\})"
    r"(?: (?P<rule>\w+) (?P<fixed>\{[^}]*\}))?(?: ; (?P<source>.*))?$"
)


#: Arrays of so many bytes are hashed once while they live (by id): nobody changes a constant of that size.
LARGE = 1 << 20
_digests: dict[int, str] = {}


def _digest(array: np.ndarray) -> str:
    if array.nbytes < LARGE:
        return _hashed(array)
    if id(array) not in _digests:
        _digests[id(array)] = _hashed(array)
        weakref.finalize(array, _digests.pop, id(array))
    return _digests[id(array)]


def _hashed(array: np.ndarray) -> str:
    digest = hashlib.sha256(str(array.dtype).encode())
    digest.update(np.ascontiguousarray(array).data)
    return f"#[{','.join(map(str, array.shape))}]:{digest.hexdigest()[:8]}"


def _print_value(value: Value) -> str:
    kind = value.type
    text = f"%{value.name}: {kind.dtype}[{','.join(map(str, kind.shape))}]"
    if kind.q is None:
        return text
    scale = str(kind.q.scale) if kind.q.scale.ndim == 0 else _digest(kind.q.scale)
    extra = "".join(f", {key}={v}" for key in ("axis", "block") if (v := getattr(kind.q, key)) is not None)
    return f"{text} q({scale}, {kind.q.zero}{extra})"


def _print_attrs(attrs: Mapping[str, Any]) -> str:
    return json.dumps({k: _digest(v) if isinstance(v, np.ndarray) else v for k, v in sorted(attrs.items())})


def print_graph(graph: Graph) -> str:
    """The graph as text; two graphs with equal text and equal `tensors` compute the same."""
    lines = [f"graph {graph.name} {graph.level}"]
    lines += [f"in {_print_value(graph.values[name])}" for name in graph.inputs]
    lines += [f"const {_print_value(value)} = {_digest(value.data)}" for value in graph.values.values() if value.const]
    for node in graph.nodes:
        args = ", ".join(f"%{name}" for name in node.inputs)
        rule = f" {node.rule} {_print_attrs(node.fixed)}" if node.rule else ""
        source = f" ; {node.source}" if node.source else ""
        value = _print_value(graph.values[node.output])
        lines.append(f"{value} = {node.op}({args}) {_print_attrs(node.attrs)}{rule}{source}")
    lines += [f"out %{name}" for name in graph.outputs]
    return "\n".join(lines) + "\n"


def tensors(graph: Graph) -> dict[str, np.ndarray]:
    """Every array the text refers to: ``w`` (data), ``w|scale`` (encoding), ``y|mult`` (array constant of y's rule)."""
    found: dict[str, np.ndarray] = {}
    for value in graph.values.values():
        if value.data is not None:
            found[value.name] = value.data
        if value.type.q is not None and value.type.q.scale.ndim:
            found[f"{value.name}|scale"] = value.type.q.scale
    for node in graph.nodes:
        found |= {f"{node.output}|{k}": v for k, v in node.fixed.items() if isinstance(v, np.ndarray)}
    return found


class _Parser:
    def __init__(self, text: str, arrays: dict[str, np.ndarray]):
        self.lines = text.splitlines()
        self.arrays = arrays
        self.number = 0

    def fail(self, why: str) -> InvalidInput:
        return InvalidInput(f"graph text, line {self.number}: {why}: {self.lines[self.number - 1][:120]!r}")

    def array(self, key: str, digest: str) -> np.ndarray:
        if key not in self.arrays:
            raise self.fail(f"no tensor {key!r}")
        if _digest(self.arrays[key]) != digest:
            raise self.fail(f"tensor {key!r} is not the one named ({digest})")
        return self.arrays[key]

    def value(self, text: str) -> tuple[str, TensorType]:
        match = _VALUE.match(text)
        if not match or match["dtype"] not in NUMPY:
            raise self.fail("expected '%name: dtype[shape] q(...)'")
        shape = tuple(int(n) for n in match["shape"].split(",") if n)
        return match["name"], TensorType(shape, match["dtype"], self.encoding(match["name"], match["q"]))

    def encoding(self, name: str, text: str | None) -> QParams | None:
        if text is None:
            return None
        # A digest holds commas inside its brackets, so split on ", ".
        try:
            scale, zero, *rest = text.split(", ")
            options = {key: int(number) for key, number in (part.split("=") for part in rest)}
            data = self.array(f"{name}|scale", scale) if scale.startswith("#") else np.float32(scale)
            return QParams(data, int(zero), **options)
        except (ValueError, TypeError) as error:
            raise self.fail(f"bad encoding ({error})") from None

    def attrs(self, output: str, text: str) -> dict[str, Any]:
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise self.fail(f"bad attributes ({error})") from None
        return {key: self._attr(f"{output}|{key}", item) for key, item in raw.items()}

    def _attr(self, key: str, item: Any) -> Any:
        if isinstance(item, str) and item.startswith("#["):
            return self.array(key, item)
        return tuple(item) if isinstance(item, list) else item

    def parse(self) -> Graph:
        header, inputs, nodes, outputs, values = None, [], [], [], {}
        for number, line in enumerate(self.lines, 1):
            self.number = number
            if not line.strip():
                continue
            keyword, _, rest = line.partition(" ")
            if keyword == "graph":
                header = rest.split(" ")
                if len(header) != 2 or header[1] not in ("float", "integer"):
                    raise self.fail("expected 'graph NAME float|integer'")
            elif keyword == "in":
                name, kind = self.value(rest)
                inputs.append(name)
                values[name] = Value(name, kind)
            elif keyword == "const":
                text, _, digest = rest.rpartition(" = ")
                name, kind = self.value(text)
                values[name] = Value(name, kind, self.array(name, digest))
            elif keyword == "out":
                outputs.append(rest.removeprefix("%"))
            else:
                match = _NODE.match(line)
                if not match:
                    raise self.fail("expected '%name: type = op(%inputs) {attributes}'")
                name, kind = self.value(match["value"])
                values[name] = Value(name, kind)
                args = tuple(arg.strip().removeprefix("%") for arg in match["inputs"].split(",") if arg.strip())
                attrs, fixed = (self.attrs(name, match[part] or "{}") for part in ("attrs", "fixed"))
                nodes.append(Node(match["op"], args, name, attrs, match["source"] or "", match["rule"] or "", fixed))
        if header is None:
            raise InvalidInput("graph text: no 'graph NAME LEVEL' line")
        missing = {name for node in nodes for name in node.inputs if name not in values} | (set(outputs) - set(values))
        if missing:
            raise InvalidInput(f"graph text: undefined values {', '.join(sorted(missing))}")
        return Graph(header[0], header[1], tuple(inputs), tuple(nodes), tuple(outputs), values)


def parse_graph(text: str, arrays: dict[str, np.ndarray] | None = None) -> Graph:
    """Inverse of `print_graph`; ``arrays`` is what `tensors` gave. Raises InvalidInput with line and reason."""
    return _Parser(text, arrays or {}).parse()
