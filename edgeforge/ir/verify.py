"""verify: everything a graph promises, checked. Runs after each pass and on every graph that is loaded."""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from edgeforge.errors import InvalidGraph
from edgeforge.ir.fixed import channel_scale, dot_bound, expand_blocks, signed_sums
from edgeforge.ir.graph import Graph, NodeView
from edgeforge.ir.op import BIAS, OPS, WEIGHT
from edgeforge.ir.rules import RULES
from edgeforge.ir.types import NUMPY, RANGE, Value, is_finite

#: Constants that were found sound (most passes leave them as they are), and the sums of weights of layers.
_sound: WeakSet[Value] = WeakSet()
_sums: WeakKeyDictionary[Value, tuple[np.ndarray, np.ndarray]] = WeakKeyDictionary()


def verify(graph: Graph) -> Graph:
    """Return ``graph`` unchanged, or raise InvalidGraph with every broken rule (at most 20 are listed)."""
    problems: list[str] = []
    for value in graph.values.values():
        problems += _value_problems(graph, value)
    defined = {*graph.inputs, *(value.name for value in graph.constants())}
    for node in graph.nodes:
        try:
            if node.op not in OPS:
                raise InvalidGraph(f"{node.output}: no op {node.op!r}")
            undefined = [name for name in node.inputs if name not in defined]
            if undefined:
                raise InvalidGraph(f"{node.op} {node.output}: reads {', '.join(undefined)} before definition")
            if node.output in defined:
                raise InvalidGraph(f"{node.op} {node.output}: defined twice")
            _check_node(graph.view(node))
        except InvalidGraph as problem:
            problems.append(str(problem))
        defined.add(node.output)
    problems += [f"output {name} is never defined" for name in graph.outputs if name not in defined]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        raise InvalidGraph(f"graph {graph.name} ({graph.level}) breaks {len(problems)} rule(s):\n{shown}")
    return graph


def _value_problems(graph: Graph, value: Value) -> list[str]:
    kind, name = value.type, value.name
    problems = []
    if value in _sound and (graph.level == "float" or kind.dtype != "f32"):
        return problems
    if any(size < 1 for size in kind.shape):
        problems.append(f"{name}: shape {kind.shape} is not static and positive")
    if graph.level == "integer" and kind.dtype == "f32":
        problems.append(f"{name}: a float tensor in an integer graph")
    if graph.level == "integer" and kind.dtype in RANGE and kind.q is None:
        problems.append(f"{name}: {kind.dtype} codes without an encoding")
    if kind.q is not None:
        tiny = np.finfo(np.float32).tiny
        if not np.all(np.isfinite(kind.q.scale)) or not np.all(kind.q.scale >= tiny):
            problems.append(f"{name}: scale must be finite, positive and normal, got {kind.q.scale.min()}")
        low, high = RANGE[kind.dtype]
        if not low <= kind.q.zero <= high:
            problems.append(f"{name}: zero point {kind.q.zero} is outside {kind.dtype} [{low}, {high}]")
    if value.data is not None:
        if value.data.dtype != NUMPY[kind.dtype] or value.data.shape != kind.shape:
            problems.append(f"{name}: data is {value.data.dtype}{value.data.shape}, type says {kind.dtype}{kind.shape}")
        elif kind.dtype in RANGE and value.data.size:
            low, high = RANGE[kind.dtype]
            if value.data.min() < low or value.data.max() > high:
                problems.append(f"{name}: codes outside {kind.dtype} [{low}, {high}]")
        elif kind.dtype == "f32" and not is_finite(value.data):
            problems.append(f"{name}: constant holds NaN or infinity")
        if not problems:
            _sound.add(value)
    return problems


def _check_node(n: NodeView) -> None:
    op = OPS[n.node.op]
    required = sum(not port.optional for port in op.ports)
    most = None if op.ports[-1].variadic else len(op.ports)
    n.require(n.arity >= required and (most is None or n.arity <= most), f"takes {required} inputs, has {n.arity}")
    for i in range(n.arity):
        n.require(not op.port(i).const or n.data(i) is not None, f"input {op.port(i).name} must be a constant")
    try:
        shape = tuple(op.infer(n))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidGraph(f"{n.node.op} {n.node.output}: attributes or shapes are malformed ({error!r})") from error
    n.require(shape == n.out.shape, f"output is declared {n.out.shape}, its inputs give {shape}")
    if n.graph.level == "integer" and n.out.dtype != "i64":
        _check_integers(n)


def _check_integers(n: NodeView) -> None:
    op = OPS[n.node.op]
    for i in range(n.arity):
        n.require(n.type(i).dtype == "i64" or n.type(i).q is not None, f"input {i} has no encoding")
    n.require(n.out.dtype in ("u8", "u16"), f"output codes are {n.out.dtype}, expected u8 or u16")
    n.require(n.out.q is not None, "output has no encoding")
    if op.shared:
        for i in range(n.arity):
            if op.port(i).role not in (WEIGHT, BIAS) and n.type(i).q is not None:
                same = n.type(i).q == n.out.q and n.type(i).dtype == n.out.dtype
                n.require(same, f"input {i} and output must share one encoding")
    elif n.node.rule not in RULES:
        n.require(False, f"rounding rule {n.node.rule!r} is unknown")
    for i in range(1, n.arity):
        if op.port(i).role == BIAS:
            n.require(n.type(i).dtype == "i32", f"bias codes are {n.type(i).dtype}, expected i32")
    if op.numerics == "dot" and n.data(1) is not None:
        _check_dot(n)


def _check_dot(n: NodeView) -> None:
    weights, bias = n.graph.values[n.node.inputs[1]], None
    if weights not in _sums:
        assert weights.data is not None
        _sums[weights] = signed_sums(expand_blocks(n.q(1), weights.data))
    sums = _sums[weights]
    if n.arity == 3:
        bias = n.data(2)
        expected = np.broadcast_to(n.q(0).scale * channel_scale(n.q(1)).astype(np.float32), n.q(2).scale.shape)
        wrong = np.flatnonzero(expected != n.q(2).scale)
        n.require(
            wrong.size == 0,
            f"bias scale must be s_x * s_w (channel {wrong[:1]}: the NPU would silently misread the bias)",
        )
    low, high = RANGE[n.type(0).dtype]
    limit = 2**31 - 1
    if n.type(0).dtype == "u16":
        bound = dot_bound(sums, None, 0, 255)
        n.require(bound <= limit, f"byte-wise sum can reach {bound}, int32 holds {limit}")
    else:
        bound = dot_bound(sums, bias, low - n.zero(0), high - n.zero(0))
        n.require(bound <= limit, f"accumulator can reach {bound}, int32 holds {limit}")
