"""The graph: frozen, SSA, static shapes, constants inside. One type for the float and the integer level."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from edgeforge.errors import InvalidGraph
from edgeforge.ir.types import QParams, TensorType, Value


@dataclass(frozen=True, eq=False)
class Node:
    """One operation with one output. ``attrs`` (int, float, bool, str, tuples of numbers) say what is computed;
    at the integer level ``rule`` names the rounding rule and ``fixed`` holds its integer constants (numbers and
    arrays). ``source`` names the module the node came from."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    rule: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Graph:
    """``level`` is "float" (every tensor f32, or i64 indices; weights of dynamic linears are codes) or "integer" (codes
    with encodings, no float)."""

    name: str
    level: str
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Value]

    def type(self, name: str) -> TensorType:
        return self.values[name].type

    def view(self, node: Node) -> NodeView:
        return NodeView(self, node)

    def users(self) -> dict[str, list[Node]]:
        """Value name -> nodes that read it, in order."""
        users: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users[name].append(node)
        return users

    def producers(self) -> dict[str, Node]:
        return {node.output: node for node in self.nodes}

    def constants(self) -> Iterable[Value]:
        return (value for value in self.values.values() if value.const)

    def rebuild(
        self,
        nodes: Iterable[Node] | None = None,
        values: Mapping[str, Value] | None = None,
        **changes: Any,
    ) -> Graph:
        """A copy with other nodes and values; values that nothing names any more are dropped."""
        nodes = self.nodes if nodes is None else tuple(nodes)
        values = self.values if values is None else values
        graph = replace(self, nodes=nodes, **changes)
        named = [*graph.inputs, *(n for node in nodes for n in (*node.inputs, node.output)), *graph.outputs]
        return replace(graph, values={name: values[name] for name in dict.fromkeys(named)})

    def hash(self) -> str:
        """sha256 over text and constants: equal hashes mean the same integers."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        from edgeforge.ir.text import print_graph, tensors

        digest = hashlib.sha256(print_graph(self).encode())
        for key, array in sorted(tensors(self).items()):
            digest.update(f"{key}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class NodeView:
    """A node with its place in a graph: what the functions of the op table read."""

    graph: Graph
    node: Node

    @property
    def attrs(self) -> Mapping[str, Any]:
        return self.node.attrs

    @property
    def fixed(self) -> Mapping[str, Any]:
        return self.node.fixed

    def __getitem__(self, attr: str) -> Any:
        return self.node.attrs[attr]

    @property
    def out(self) -> TensorType:
        return self.graph.type(self.node.output)

    @property
    def arity(self) -> int:
        return len(self.node.inputs)

    def type(self, index: int) -> TensorType:
        return self.graph.type(self.node.inputs[index])

    def shape(self, index: int) -> tuple[int, ...]:
        return self.type(index).shape

    def data(self, index: int) -> np.ndarray | None:
        return self.graph.values[self.node.inputs[index]].data

    def q(self, index: int) -> QParams:
        """Encoding of an input; -1 is the output."""
        found = self.out.q if index == -1 else self.type(index).q
        assert found is not None, f"{self.node.output}: input {index} has no encoding"
        return found

    def zero(self, index: int) -> int:
        return self.q(index).zero

    def require(self, condition: bool, reason: str) -> None:
        """Raise InvalidGraph naming this node unless ``condition`` holds."""
        if not condition:
            source = f" (from {self.node.source})" if self.node.source else ""
            raise InvalidGraph(f"{self.node.op} {self.node.output}{source}: {reason}")


Pass = Callable[[Graph], Graph]
