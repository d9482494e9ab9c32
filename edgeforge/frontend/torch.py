"""torch.export programs -> float Graph. The functional program's nodes are translated one by one (`aten.TABLE`); nodes
that depend on constants alone (masks, position tables, index arithmetic) are evaluated by torch here and now."""

from __future__ import annotations

import io
import json
import operator
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from edgeforge.errors import InvalidInput
from edgeforge.frontend import Imported, aten_layers
from edgeforge.frontend.aten import TABLE
from edgeforge.frontend.builder import Act, Builder, Const, Refused

assert aten_layers  # importing it fills the rest of TABLE

#: What torch raises, by experience, when a model cannot be traced or a program cannot be read.
_TORCH_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    torch._dynamo.exc.TorchDynamoException,
)


def from_module(module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], name: str) -> Imported:
    """The float graph of ``module`` in eval mode at the shapes of ``example_inputs``.

    Raises InvalidInput when torch.export cannot trace it, and what `from_exported` raises."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        program = torch.export.export(module, tuple(example_inputs))
    except _TORCH_ERRORS as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise InvalidInput(f"{name}: torch.export cannot trace the model ({first}) -> make torch.export work") from None
    finally:
        for part, mode in modes.items():
            part.training = mode
    return from_exported(program, name)


def from_exported(program: ExportedProgram, name: str) -> Imported:
    """The float graph of an exported program: inputs f32 (any float) or i64 (ids), named as its placeholders.

    Raises Unsupported with one reason per node that has no meaning in the op table, InvalidInput on dynamic shapes,
    on NaN or infinite weights, and on outputs that are constants."""
    _require_static(program, name)
    try:
        program = program.run_decompositions(_decompositions())
    except _TORCH_ERRORS as error:
        raise InvalidInput(f"{name}: torch cannot make the program functional ({error})") from None
    return Imported(_Importer(program, name).run())


def from_pt2(path: str | Path, name: str | None = None) -> Imported:
    """The float graph of a ``.pt2`` file written by torch.export.save.

    torch.export.load can unpickle and can load native code, so archives that hold either are refused before it runs.
    Raises InvalidInput on a damaged or unsafe file, and what `from_exported` raises."""
    path = Path(path)
    _check_archive(path)
    try:
        program = torch.export.load(path)
    except (*_TORCH_ERRORS, OSError, EOFError, zipfile.BadZipFile) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise InvalidInput(
            f"{path.name}: torch.export.load refuses it ({first}) -> export again with {torch.__version__}"
        ) from None
    return from_exported(program, name or path.stem)


def _check_archive(path: Path) -> None:
    """Raise InvalidInput unless ``path`` is an intact zip archive of plain tensors and one static program."""
    advice = "export again with torch.export.save"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise InvalidInput(f"{path.name}: {damaged} is damaged (checksum) -> copy the file again")
            for entry in archive.namelist():
                _check_entry(path, entry, archive)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as error:
        raise InvalidInput(f"{path.name} is not a .pt2 archive or is damaged ({error}) -> {advice}") from None


def _check_entry(path: Path, entry: str, archive: zipfile.ZipFile) -> None:
    inside = entry.partition("/")[2]
    if inside.startswith("data/aotinductor"):
        raise InvalidInput(f"{path.name}: holds compiled native code ({entry}) -> save the ExportedProgram only")
    if inside.endswith(("_weights_config.json", "_constants_config.json")):
        for tensor, payload in json.loads(archive.read(entry)).get("config", {}).items():
            if payload.get("use_pickle"):
                raise InvalidInput(f"{path.name}: {tensor} is a pickled object -> save plain dense tensors")
    elif entry.endswith(".pt"):
        try:
            torch.load(io.BytesIO(archive.read(entry)), weights_only=True)
        except _UNSAFE as error:
            first = str(error).splitlines()[0]
            raise InvalidInput(f"{path.name}: {entry} is damaged or holds more than tensors ({first})") from None
    elif (inside.startswith("models/") or "exported_program" in entry) and b'"expr_str"' in archive.read(entry):
        # torch evaluates symbolic expressions with sympy, which runs Python: static programs have none.
        raise InvalidInput(f"{path.name}: has dynamic shapes -> export with fixed shapes (no dynamic_shapes)")


_UNSAFE = (*_TORCH_ERRORS, torch.serialization.pickle.UnpicklingError, EOFError, zipfile.BadZipFile)


def _decompositions() -> dict[Any, Any]:
    """Everything torch can decompose and the table does not hold whole."""
    known = torch.export.default_decompositions()
    return {op: rule for op, rule in known.items() if not _handler_names(op) & TABLE.keys()}


def _handler_names(op: Any) -> set[str]:
    full = str(op).partition(".")[2] if str(op).startswith("aten.") else str(op)
    return {full, full.partition(".")[0]}


def _require_static(program: ExportedProgram, name: str) -> None:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for axis, size in enumerate(getattr(value, "shape", ())):
            if isinstance(size, torch.SymInt):
                what = (
                    f"input {node.name}" if node.op == "placeholder" else f"{_module_path(node) or name}: {node.target}"
                )
                raise InvalidInput(
                    f"{name}: {what}: dimension {axis} is dynamic ({size}) -> export without dynamic_shapes"
                )


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return path.removeprefix("L['self'].").replace("slice(None, None, None)", "")


def _is_layer(node: torch.fx.Node) -> bool:
    """Whether the node's module is one of torch's own layers, whose result may carry the module's name."""
    stack = node.meta.get("nn_module_stack") or {}
    kind = list(stack.values())[-1][1] if stack else ""
    return str(kind).startswith("torch.nn.modules")


class _Importer:
    def __init__(self, program: ExportedProgram, name: str):
        self.program = program
        self.g = Builder(name)
        self.env: dict[torch.fx.Node, Any] = {}

    def run(self) -> Any:
        outputs: list[Any] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self.placeholder(node)
            elif node.op == "get_attr":
                self.env[node] = self.attribute(node)
            elif node.op == "call_function":
                self.g.where = _module_path(node)
                self.env[node] = self.call(node)
            elif node.op == "output":
                kinds = {
                    spec.arg.name: spec.kind
                    for spec in self.program.graph_signature.output_specs
                    if hasattr(spec.arg, "name")
                }
                for result in node.args[0]:
                    if isinstance(result, torch.fx.Node) and kinds.get(result.name) == OutputKind.USER_OUTPUT:
                        outputs.append(self.env[result])
        self.g.where = ""
        return self.g.finish(outputs)

    def placeholder(self, node: torch.fx.Node) -> Any:
        spec = next(s for s in self.program.graph_signature.input_specs if s.arg.name == node.name)
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                return spec.arg.value
            if not isinstance(spec.arg, TensorArgument):
                raise InvalidInput(f"{self.g.name}: input {node.name} is not a tensor -> pass tensors only")
            value = node.meta["val"]
            if value.dtype == torch.bool:
                raise InvalidInput(
                    f"{self.g.name}: input {node.name} is boolean -> make the mask a constant of the model"
                )
            return self.g.input(node.name, value.shape, "f32" if value.is_floating_point() else "i64")
        assert spec.target is not None
        tensors: Mapping[str, Any] = {**self.program.constants, **self.program.state_dict}
        if not isinstance(tensors.get(spec.target), torch.Tensor):
            raise InvalidInput(f"{self.g.name}: {spec.target} is not a tensor -> keep tensors only in the model")
        return self.constant(tensors[spec.target], spec.target)

    def attribute(self, node: torch.fx.Node) -> Any:
        found: Any = self.program.graph_module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return self.constant(found, str(node.target)) if isinstance(found, torch.Tensor) else found

    @staticmethod
    def constant(tensor: torch.Tensor, name: str) -> Const:
        tensor = tensor.detach().cpu()
        return Const((tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy(), name)

    def call(self, node: torch.fx.Node) -> Any:
        args, kwargs = (torch.fx.node.map_arg(part, lambda n: self.env[n]) for part in (node.args, node.kwargs))
        if node.target is operator.getitem:
            return args[0][args[1]]
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        if "assert" in str(node.target) or node.target is torch.ops.aten.sym_constrain_range_for_size.default:
            return None
        if not any(isinstance(leaf, Act) for leaf in flat):
            return self.evaluate(node, args, kwargs)
        return self.translate(node, args, kwargs)

    def evaluate(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        """A node without activations, by torch itself."""

        def tensor(leaf: Any) -> Any:
            return torch.from_numpy(np.array(leaf.data)) if isinstance(leaf, Const) else leaf

        args, kwargs = (torch.utils._pytree.tree_map(tensor, part) for part in (args, kwargs))
        with torch.no_grad():
            made = node.target(*args, **kwargs)  # type: ignore[operator]
        name = ".".join(part for part in (self.g.where, node.name) if part)
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: self.constant(t, name), made)

    def translate(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        op = str(node.target)
        full, short = op.partition(".")[2], op.partition(".")[2].partition(".")[0]
        handler = (TABLE.get(full) or TABLE.get(short)) if op.startswith("aten.") else None
        try:
            if handler is None:
                raise Refused(
                    "has no meaning in the op table",
                    "replace it, or add edgeforge/ops/<op>.py and a row in frontend/aten.py",
                )
            before = len(self.g.nodes)
            made = handler(self.g, *_positional(node.target, args, kwargs))
        except Refused as refused:
            self.g.refuse(op, refused.why, refused.remedy)
            return torch.utils._pytree.tree_map(self.poison, node.meta.get("val"))
        if isinstance(made, Act) and _is_layer(node) and len(self.g.nodes) > before:
            return self.g.rename(made, self.g.where)
        return made

    def poison(self, value: Any) -> Any:
        return self.g.poison(value.shape) if isinstance(value, torch.Tensor) else value


def _positional(op: Any, args: Any, kwargs: Any) -> list[Any]:
    """All arguments of an aten op in schema order, defaults filled in."""
    arguments = op._schema.arguments
    return [
        args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(arguments)
    ]
