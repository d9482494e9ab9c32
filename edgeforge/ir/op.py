"""The op table's row type and the table itself; each file of ``edgeforge.ops`` registers one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeforge.ir.graph import NodeView
from edgeforge.ir.types import TensorType

ACT, WEIGHT, BIAS, INDEX = "activation", "weight", "bias", "index"

#: Layers with weights [O, I, ...] per output channel. Those of images have their channels on axis 1.
CONVOLUTIONS = ("conv2d", "conv_transpose2d")
LAYERS = ("linear", *CONVOLUTIONS)


@dataclass(frozen=True)
class Port:
    """An input: its role decides its dtype when the graph is quantized."""

    name: str
    role: str = ACT
    const: bool = False
    optional: bool = False
    variadic: bool = False


@dataclass(frozen=True)
class Cost:
    """Work of one node: multiply-accumulates, and bytes moved if nothing is cached."""

    macs: int = 0
    weight_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0


@dataclass(frozen=True)
class Op:
    """One row. Columns are functions:

    infer(n) -> shape                     output shape from input shapes; ``n.require`` states preconditions
    integer(k, n, *codes) -> codes        the integer meaning, in terms of the kernels ``k`` (sim/reference.py)
    torch(T, n, *tensors) -> tensor       the real-valued meaning; ``T`` is the torch module
    onnx(g, n, *names) -> name            emits ONNX nodes; ``g(op_type, *inputs, **attributes)``
    tosa(g, n, *names) -> name            emits TOSA operators (None: it has none for this);
                                          ``g(op, inputs, shape, dtype, **attributes)``
    cost(n) -> Cost

    numerics: family of rounding rule (a key of a profile in ``edgeforge.ir.fixed``), "move" when no arithmetic
    happens. shared: output and activation inputs must have one encoding. real: float64 function of a unary op.
    """

    name: str
    ports: tuple[Port, ...]
    infer: Callable[[NodeView], tuple[int, ...]]
    integer: Callable[..., Any]
    cost: Callable[[NodeView], Cost]
    onnx: Callable[..., Any]
    torch: Callable[..., Any]
    tosa: Callable[..., Any] | None = None
    numerics: str = "move"
    shared: bool = False
    real: Callable[..., Any] | None = None
    doc: str = ""

    def port(self, index: int) -> Port:
        last = self.ports[-1]
        return last if last.variadic and index >= len(self.ports) else self.ports[index]


OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    """Add a row. Two files that claim one name are a defect."""
    assert op.name not in OPS, f"op {op.name} is registered twice"
    OPS[op.name] = op


def move_cost(n: NodeView) -> Cost:
    """Cost of an op that only reads its inputs and writes its output."""
    return Cost(read_bytes=sum(n.type(i).nbytes for i in range(n.arity)), write_bytes=n.out.nbytes)


def output_type(n: NodeView) -> TensorType:
    """The type of a float node's output: inferred shape, and the dtype of the inputs that carry data."""
    return TensorType(OPS[n.node.op].infer(n), "f32")
