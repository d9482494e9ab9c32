"""keep: the encodings that a QDQ model brought along become the plan, and its weights keep their codes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeforge.errors import Reason, Unsupported
from edgeforge.frontend import Imported
from edgeforge.ir.graph import Graph, Node
from edgeforge.ir.op import ACT, BIAS, OPS, WEIGHT
from edgeforge.ir.types import RANGE, QParams, TensorType
from edgeforge.quantize.assign import Groups, Plan, _check, symmetric
from edgeforge.recipe import Precision, Recipe
from edgeforge.target import Target

REMEDY = "--requantize (calibrate anew and drop the file's encodings)"

#: A bias scale within this of s_x * s_w is that product in another order of rounding.
BIAS_TOLERANCE = 1e-5


def plan_from(imported: Imported, recipe: Recipe, target: Target) -> Plan:
    """The plan that keeps every encoding of an imported (and optimized) QDQ graph.

    Signed activations become unsigned with the zero point moved (the real numbers are the same); weights keep their
    codes; a tensor without an encoding takes that of the group it shares one with. Raises Unsupported with every
    tensor whose encoding the target or the integer graph cannot take, and nodes it cannot run."""
    return _Keeper(imported.graph, imported.encodings, recipe, target).plan()


class _Keeper:
    def __init__(self, graph: Graph, encodings: Mapping[str, TensorType], recipe: Recipe, target: Target):
        self.graph, self.encodings, self.recipe, self.target = graph, encodings, recipe, target
        self.groups = Groups(graph)
        self.reasons: list[Reason] = []
        self.producers = graph.producers()

    def plan(self) -> Plan:
        types = self.activations()
        constants: dict[str, TensorType] = {}
        precision: dict[str, Precision] = {}
        for node in self.graph.nodes:
            precision[node.output] = Precision(self.recipe.precision)
            for i, name in enumerate(node.inputs):
                if self.graph.values[name].const and name in self.encodings:
                    self.constant(node, i, types, constants)
            weighted = len(node.inputs) > 1 and OPS[node.op].port(1).role == WEIGHT
            if weighted and node.inputs[1] in constants and node.inputs[0] in types:
                weights, inputs = constants[node.inputs[1]].dtype, types[node.inputs[0]].dtype
                precision[node.output] = Precision(f"w{weights[1:]}a{inputs[1:]}")
            elif weighted and node.inputs[1] not in self.encodings:
                self.refuse(node.inputs[1], node, "weights have no encoding in the file (or a fusion changed them)")
        self.forced(types)
        reads = self.second_operands(types)
        try:
            _check(self.graph, precision, types, self.target)
        except Unsupported as more:
            self.reasons += more.reasons
        if self.reasons:
            raise Unsupported(f"the encodings of {self.graph.name} cannot be kept on {self.target.name}", self.reasons)
        return Plan(types, precision, reads, constants)

    def refuse(self, name: str, node: Node | None, why: str) -> None:
        self.reasons.append(Reason(name, node.op if node is not None else "input", why, REMEDY))

    def activations(self) -> dict[str, TensorType]:
        """Every activation's type, one per group of values that share an encoding."""
        members: dict[str, list[str]] = {}
        for name, value in self.graph.values.items():
            shares = value.const and self.groups.find(name) != name
            if value.type.dtype == "f32" and (not value.const or shares):
                members.setdefault(self.groups.find(name), []).append(name)
        types: dict[str, TensorType] = {}
        for names in members.values():
            kept = self.group(names)
            for name in names if kept is not None else ():
                types[name] = TensorType(self.graph.type(name).shape, kept.dtype, kept.q)
        return types

    def group(self, names: list[str]) -> TensorType | None:
        node = self.producers.get(names[-1])
        known = {name: _unsigned(self.encodings[name]) for name in names if name in self.encodings}
        broken = [name for name, kind in known.items() if kind is None]
        for name in broken:
            self.refuse(
                name, self.producers.get(name), "is encoded per channel or with blocks; activations have one scale"
            )
        if not known:
            for name in names:
                self.refuse(name, self.producers.get(name), "has no encoding in the file")
        if broken or not known:
            return None
        first, *others = known
        for other in others:
            if (known[other].dtype, known[other].q) != (known[first].dtype, known[first].q):
                why = f"shares one encoding with {first}, but has {_show(known[other])} against {_show(known[first])}"
                self.refuse(other, node, why)
        return known[first]

    def constant(self, node: Node, i: int, types: Mapping[str, TensorType], constants: dict[str, TensorType]) -> None:
        """Keep the codes of constant input ``i``, or say why not."""
        name, kind, port = node.inputs[i], self.encodings[node.inputs[i]], OPS[node.op].port(i)
        if port.role == BIAS:
            self.bias(node, name, kind, types, constants)
        elif port.role == WEIGHT:
            channels = self.graph.type(name).shape[0]
            if kind.q is None:
                self.refuse(name, node, "weights have block scales or several zero points")
            elif kind.q.zero != 0:
                self.refuse(name, node, f"weights are asymmetric (zero point {kind.q.zero})")
            elif kind.q.axis not in (None, 0) or kind.dtype not in ("i8", "i4"):
                self.refuse(name, node, f"weights are {kind.dtype}, scaled along axis {kind.q.axis}; expected axis 0")
            elif self.lowest(name, kind.q) < RANGE[kind.dtype][0]:
                self.refuse(name, node, f"weights hold code {self.lowest(name, kind.q)}, which {kind.dtype} leaves out")
            else:
                scale = np.broadcast_to(kind.q.scale.reshape(-1), (channels,)).copy()
                constants[name] = TensorType(self.graph.type(name).shape, kind.dtype, QParams(scale, 0, axis=0))
        elif port.role == ACT and not OPS[node.op].shared:
            unsigned = _unsigned(kind)
            if unsigned is None:
                self.refuse(name, node, "is encoded per channel or with blocks; operands have one scale")
            else:
                constants[name] = TensorType(self.graph.type(name).shape, unsigned.dtype, unsigned.q)

    def lowest(self, name: str, q: QParams) -> int:
        data = self.graph.values[name].data
        assert data is not None
        return int(np.rint(data.astype(np.float64) / q.broadcast(data.shape)).min())

    def bias(
        self,
        node: Node,
        name: str,
        kind: TensorType,
        types: Mapping[str, TensorType],
        constants: Mapping[str, TensorType],
    ) -> None:
        """A bias at s_x * s_w keeps its codes when it is rounded again at that scale."""
        x, w = types.get(node.inputs[0]), constants.get(node.inputs[1])
        if OPS[node.op].port(1).role != WEIGHT or x is None or w is None or x.q is None or w.q is None:
            return
        if kind.q is None or kind.q.zero != 0:
            self.refuse(name, node, "bias is asymmetric or has blocks")
        elif not np.allclose(kind.q.scale, x.q.scale * w.q.scale, rtol=BIAS_TOLERANCE, atol=0):
            self.refuse(name, node, "bias scale is not s_x * s_w: its codes would change")

    def forced(self, types: Mapping[str, TensorType]) -> None:
        """Outputs whose encoding the hardware writes whatever the graph says."""
        for node in self.graph.nodes:
            kept = types.get(node.output)
            if kept is None or kept.q is None:
                continue
            rule = self.target.encodings.get(node.op, {}).get("a8" if kept.dtype == "u8" else "a16")
            if rule is not None and kept.q != QParams(np.float32(1 / rule.steps), rule.zero):
                why = f"has {_show(kept)}; {self.target.name} writes scale 1/{rule.steps}, zero point {rule.zero}"
                self.refuse(node.output, node, why)

    def second_operands(self, types: Mapping[str, TensorType]) -> dict[tuple[str, int], TensorType]:
        """The uint8 encoding at the prescribed zero point that a matmul's second operand is rounded to, as `assign`
        does."""
        zero, reads = self.target.second_operand_zero, {}
        for node in self.graph.nodes:
            kept = types.get(node.inputs[1]) if node.op == "matmul" else None
            if zero is None or kept is None or kept.q is None or (kept.dtype == "u8" and kept.q.zero == zero):
                continue
            low, high = ((code - kept.q.zero) * float(kept.q.scale) for code in RANGE[kept.dtype])
            reads[node.output, 1] = TensorType(kept.shape, "u8", symmetric((low, high), zero))
        return reads


def _unsigned(kind: TensorType) -> TensorType | None:
    """The same real numbers as unsigned codes; None where one scale and zero point do not say it."""
    if kind.q is None or kind.q.scale.size != 1:
        return None
    scale = kind.q.scale.reshape(())
    if kind.dtype == "i8":
        return TensorType(kind.shape, "u8", QParams(scale, kind.q.zero + 128))
    return TensorType(kind.shape, kind.dtype, QParams(scale, kind.q.zero)) if kind.dtype in ("u8", "u16") else None


def _show(kind: TensorType) -> str:
    assert kind.q is not None
    return f"{kind.dtype}(scale {float(kind.q.scale):.6g}, zero point {kind.q.zero})"
