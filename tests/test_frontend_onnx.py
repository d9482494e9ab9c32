"""ONNX files become float graphs that compute what ONNX Runtime computes; damaged files become clear errors."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from frontend_models import ARCHITECTURES, build, example
from onnx import TensorProto, helper, numpy_helper

from edgeforge.errors import EdgeForgeError, InvalidInput, Unsupported
from edgeforge.frontend.onnx import from_onnx
from edgeforge.ir.verify import verify
from edgeforge.passes import optimize
from edgeforge.sim.evaluate import run_float

TOLERANCE = 1e-3
RANDOM = np.random.default_rng(0)


def save(path, nodes, inputs, outputs, weights=None, opset=21, domains=()):
    """Write a model. inputs, outputs: name -> shape (or (shape, element type))."""

    def infos(named):
        for name, shape in named.items():
            kind, shape = (shape[1], shape[0]) if isinstance(shape, tuple) else (TensorProto.FLOAT, shape)
            yield helper.make_tensor_value_info(name, kind, shape)

    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "test", [*infos(inputs)], [*infos(outputs)], constants)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"n.{outputs.split()[0]}", **attributes)


def check(path, **feeds):
    """Every output within TOLERANCE of ONNX Runtime's. Gives the optimized graph."""
    graph = optimize(from_onnx(path).graph)
    session = ort.InferenceSession(path)
    wanted = session.run(None, feeds)
    got = run_float(graph, feeds)
    for name, want in zip((o.name for o in session.get_outputs()), wanted, strict=True):
        error = np.abs(got[name] - want).max() / max(np.abs(want).max(), 1e-9)
        assert got[name].shape == want.shape and error < TOLERANCE, f"{name}: max relative error {error:.2e}"
    return graph


@functools.cache
def exported(folder, name, opset):
    path = folder / f"{name}-{opset}.onnx"
    torch.onnx.export(
        build(name), (example(name),), path, opset_version=opset, dynamo=True, input_names=["x"], verbose=False
    )
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exported_architecture_computes_what_onnx_runtime_computes(name, folder):
    graph = check(exported(folder, name, 18), x=example(name, seed=1).numpy())
    assert graph.inputs == ("x",)
    assert not {n.op for n in graph.nodes} & {"erf", "rsqrt", "reciprocal", "sqrt"}, "a written-out layer was not fused"


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_newer_opsets_attention_and_norm_are_imported(name, folder):
    path = exported(folder, name, 23)
    assert {"Attention"} <= {n.op_type for n in onnx.load(path, load_external_data=False).graph.node}
    check(path, x=example(name, seed=1).numpy())


def test_source_is_the_module_that_the_exporter_noted(folder):
    graph = optimize(from_onnx(exported(folder, "vit", 18)).graph)
    assert any(n.source.endswith("attention") or "layers.0" in n.source for n in graph.nodes)


X = {"x": [1, 4, 8, 8]}
W = RANDOM.normal(size=(6, 4, 3, 3)).astype(np.float32)
F = np.float32
SINGLE = {
    "conv, same upper": ([node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 2])], {"w": W}),
    "conv, same lower": ([node("Conv", "x w", "y", auto_pad="SAME_LOWER")], {"w": W[:, :, :2, :2]}),
    "conv, explicit pads": ([node("Conv", "x w b", "y", pads=[0, 1, 2, 0])], {"w": W, "b": np.arange(6, dtype=F)}),
    "batch norm": (
        [node("BatchNormalization", "x s b m v", "y")],
        {"s": F([1, 2, 3, 4]), "b": F([0, 1, 0, 1]), "m": F([0, 0.1, 0, 0]), "v": F([1, 2, 1, 1])},
    ),
    "max pool, ceil": ([node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}),
    "average pool": ([node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}),
    "global pool": ([node("GlobalAveragePool", "x", "p"), node("Flatten", "p", "y")], {}),
    "gemm": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b", "y", alpha=0.5, beta=2.0)],
        {"w": RANDOM.normal(size=(256, 5)).astype(F), "b": np.arange(5, dtype=F)},
    ),
    "matmul": ([node("MatMul", "x w", "y")], {"w": RANDOM.normal(size=(8, 3)).astype(F)}),
    "clip, hard sigmoid": (
        [node("Clip", "x lo hi", "c"), node("HardSigmoid", "c", "y", alpha=0.2)],
        {"lo": F(-0.5), "hi": F(1)},
    ),
    "hard swish by hand": ([node("HardSigmoid", "x", "h", alpha=1 / 6), node("Mul", "h x", "y")], {}),
    "min and max": ([node("Min", "x hi", "a"), node("Max", "lo a", "y")], {"lo": F(-1), "hi": F(0.5)}),
    "split and concat": ([node("Split", "x", "a b", axis=1, num_outputs=2), node("Concat", "b a x", "y", axis=1)], {}),
    "slices": ([node("Slice", "x s e a t", "y")], {"s": [1, -4], "e": [2**62, -1], "a": [2, 3], "t": [2, 1]}),
    "gather of an activation": ([node("Gather", "x i", "y", axis=1)], {"i": np.array([3, 0, -2])}),
    "squeeze and unsqueeze": ([node("Squeeze", "x a", "s"), node("Unsqueeze", "s u", "y")], {"a": [0], "u": [1, -1]}),
    "shape arithmetic": (
        [node("Shape", "x", "s", end=2), node("Concat", "s m", "t", axis=0), node("Reshape", "x t", "y")],
        {"m": np.array([-1])},
    ),
    "expand and tile": ([node("Expand", "x e", "b"), node("Tile", "b t", "y")], {"e": [1, 4, 8, 8], "t": [1, 2, 1, 1]}),
    "pad": ([node("Pad", "x p", "y")], {"p": [0, 0, 1, 2, 0, 0, 0, 1]}),
    "where": ([node("Where", "c x v", "y")], {"c": np.arange(8) > 3, "v": F(2)}),
    "reduce": ([node("ReduceMean", "x a", "m"), node("ReduceSum", "m b", "y", keepdims=0)], {"a": [3], "b": [2]}),
    "softmax of one axis": ([node("Softmax", "x", "y", axis=1)], {}),
    "constants are folded": (
        [node("ConstantOfShape", "n", "o"), node("Cos", "o", "c"), node("Sub", "x c", "y")],
        {"n": np.array([8])},
    ),
    "division, power, root": (
        [node("Pow", "x two", "q"), node("Add", "q one", "r"), node("Sqrt", "r", "s"), node("Div", "x s", "y")],
        {"two": F(2), "one": F([1])},
    ),
    "layer norm": ([node("LayerNormalization", "x g", "y")], {"g": np.arange(8, dtype=F)}),
    "casts and dropout": (
        [
            node("Cast", "x", "c", to=TensorProto.DOUBLE),
            node("Cast", "c", "d", to=TensorProto.FLOAT),
            node("Dropout", "d", "e"),
            node("Relu", "e", "y"),
        ],
        {},
    ),
}


@pytest.mark.parametrize("case", SINGLE)
def test_node_is_imported(case, tmp_path):
    nodes, weights = SINGLE[case]
    path = save(tmp_path / "m.onnx", nodes, X, {"y": None}, weights)
    check(path, x=RANDOM.normal(size=(1, 4, 8, 8)).astype(np.float32))


def test_embedding_with_int32_ids_is_imported(tmp_path):
    table = RANDOM.normal(size=(11, 4)).astype(np.float32)
    inputs = {"ids": ([1, 5], TensorProto.INT64)}
    nodes = [node("Cast", "ids", "i", to=TensorProto.INT32), node("Gather", "t i", "y")]
    check(save(tmp_path / "m.onnx", nodes, inputs, {"y": None}, {"t": table}), ids=np.array([[1, 2, 3, 10, 0]]))


def test_every_unsupported_node_is_reported(tmp_path):
    nodes = [node("Relu", "x", "a"), node("TopK", "a k", "v i"), node("LpPool", "v", "b", kernel_shape=[1, 1]),
             node("Celu", "b", "y")]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, X, {"y": None}, {"k": np.array([2])})
    with pytest.raises(Unsupported) as caught:
        from_onnx(path)
    assert [(r.where, r.op) for r in caught.value.reasons] == [("n.v", "TopK"), ("n.b", "LpPool"), ("n.y", "Celu")]


@pytest.mark.parametrize("shape", [["batch", 4], [None, 4], [0, 4]])
def test_dynamic_dimension_is_named(shape, tmp_path):
    path = save(tmp_path / "m.onnx", [node("Relu", "x", "y")], {"x": shape}, {"y": None})
    with pytest.raises(InvalidInput, match=r"input x: dimension 0 is dynamic .* -> export with fixed shapes"):
        from_onnx(path)


def test_nan_weights_are_named(tmp_path):
    path = save(tmp_path / "m.onnx", [node("Add", "x w", "y")], X, {"y": None}, {"w": F([np.nan] * 8)})
    with pytest.raises(InvalidInput, match="NaN or infinity in w"):
        from_onnx(path)


def test_missing_and_foreign_files_are_invalid_input(tmp_path):
    with pytest.raises(InvalidInput, match="No such file"):
        from_onnx(tmp_path / "absent.onnx")
    for data in (b"", b"not a model", b"\x08\x0a" * 40, b"\x00" * 100):
        (tmp_path / "foreign.onnx").write_bytes(data)
        with pytest.raises(InvalidInput, match=r"foreign\.onnx is not an ONNX model"):
            from_onnx(tmp_path / "foreign.onnx")


def external(path, location, **entries):
    """A model whose weights lie in ``location``."""
    save(path, [node("Add", "x w", "y")], {"x": [8]}, {"y": None}, {"w": np.arange(8, dtype=F)})
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_beside_the_model_is_read(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\0" * 4 + np.arange(8, dtype=F).tobytes())
    path = external(tmp_path / "m.onnx", "weights.bin", offset=4, length=32)
    graph = from_onnx(path).graph
    assert np.array_equal(graph.values["w"].data, np.arange(8, dtype=F))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin"])
def test_external_data_outside_the_folder_is_refused(location, tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 32)
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(InvalidInput, match="lies outside the model's folder"):
        from_onnx(external(inside / "m.onnx", location))


def test_missing_or_short_external_data_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="is missing"):
        from_onnx(external(tmp_path / "m.onnx", "absent.bin"))
    (tmp_path / "short.bin").write_bytes(b"\0" * 8)
    with pytest.raises(InvalidInput, match="too short"):
        from_onnx(external(tmp_path / "m.onnx", "short.bin", length=32))
    with pytest.raises(InvalidInput):
        from_onnx(external(tmp_path / "m.onnx", "short.bin"))


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_give_an_error_of_ours_or_a_valid_graph(seed, tmp_path):
    nodes = [
        node("Conv", "x w b", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("AveragePool", "p", "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", "a s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("Reshape", "d t", "f"),
        node("Gemm", "f g", "h", transB=1),
        node("Softmax", "h", "y", axis=-1),
    ]
    weights = {"w": W[:2, :, :2, :2], "b": F([0, 1]), "t": np.array([1, -1]), "g": np.ones((3, 32), F)}
    weights |= {"s": F(0.1), "z": np.uint8(3)}
    data = save(tmp_path / "m.onnx", nodes, X, {"y": [1, 3]}, weights).read_bytes()
    source, read = np.random.default_rng(seed), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(source.integers(1, 4)):
            damaged[source.integers(len(data))] = source.integers(256)
        (tmp_path / "d.onnx").write_bytes(damaged)
        try:
            verify(optimize(from_onnx(tmp_path / "d.onnx").graph))
            read += 1
        except EdgeForgeError:
            continue
    assert read, "no damaged file could be read: the test tests nothing"
