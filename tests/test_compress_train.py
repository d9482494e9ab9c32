"""Training through the rounded graph: it computes what the integer graph computes, improves it, and goes on where it
stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compress_models import block, data, stack, uneven

from edgeforge.compress.student import Student, _Rounded
from edgeforge.compress.train import _Run, train
from edgeforge.ir.graph import Graph
from edgeforge.quantize.assign import Plan, assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert
from edgeforge.recipe import Recipe, Train
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.parity import sqnr_db
from edgeforge.target import load_target

TARGET = load_target("snapdragon-8-gen-3")


def planned(graph: Graph, precision: str) -> Plan:
    return assign(graph, calibrate(graph, [data().stacked()]), Recipe(precision=precision), TARGET)


def integers(graph: Graph, plan: Plan) -> np.ndarray:
    integer, feeds = convert(graph, plan, TARGET), data().stacked()
    return dequantize_outputs(integer, simulate(integer, quantize_feeds(integer, feeds)))[graph.outputs[0]]


def quality(graph: Graph, plan: Plan) -> float:
    """dB against the float function, which ``graph`` has too."""
    db = sqnr_db(run_float(graph, data().stacked())[graph.outputs[0]], integers(graph, plan))
    assert db is not None
    return db


@pytest.mark.parametrize("precision", ["w8a16", "w4a16", "w4a16-b16"])
def test_the_student_computes_what_the_integer_graph_computes(precision):
    """With 16-bit activations the two are nearer to each other than either to the float model."""
    graph = block()
    plan = planned(graph, precision)
    student = Student(graph, plan, TARGET)
    with torch.no_grad():
        for name, parameter in student.parameters.items():
            if name.startswith("clip"):
                parameter.fill_(40.0)
        feeds = {name: torch.from_numpy(x) for name, x in data().stacked().items()}
        got = student.rounded(graph.nodes, student.encode(feeds))[graph.outputs[0]].numpy()
    expected = integers(graph, plan)
    apart = sqnr_db(expected, got)
    assert apart is not None and apart > quality(graph, plan) + 6
    same_graph, same_plan = student.fold()
    np.testing.assert_array_equal(integers(same_graph, same_plan), expected)


@pytest.mark.parametrize(("precision", "loss"), [("w8a8", "hidden"), ("w4a8", "hidden"), ("w4a16-b16", "kl")])
def test_training_mends_uneven_channels(precision, loss):
    config = Train(steps=150, batch=8, check=50, scale_rate=5e-2, range_rate=1e-2, loss=loss)
    plan = planned(uneven(), precision)
    graph, learned = train(uneven(), plan, config, TARGET, data())
    assert quality(graph, learned) > quality(uneven(), plan) + 1.5


def moved(before: Graph, after: Graph) -> set[str]:
    return {
        n for n, value in after.values.items() if value.const and not np.array_equal(value.data, before.values[n].data)
    }


def test_training_block_by_block_reaches_every_block():
    before = uneven(stack())
    plan = planned(before, "w8a8")
    config = Train(steps=40, batch=8, check=20, scale_rate=5e-2, range_rate=1e-2, blocks=True)
    graph, learned = train(before, plan, config, TARGET, data())
    assert quality(graph, learned) > quality(before, plan) + 1
    assert {name.split(".")[1] for name in moved(before, graph)} == {"0", "1"}
    wanted, got = (run_float(g, data().stacked())[graph.outputs[0]] for g in (before, graph))
    assert np.abs(wanted - got).max() < 1e-4


def test_learned_weights_end_on_their_grid_and_bring_more_than_what_is_learned_around_them():
    before, config = block(), Train(steps=200, batch=8, check=50, loss="hidden", patience=9)
    plan = planned(before, "w4a16")
    _, around = train(before, plan, config, TARGET, data())
    graph, learned = train(before, plan, config.model_copy(update={"weight_rate": 2e-2}), TARGET, data())
    assert quality(graph, learned) > quality(before, around) + 3
    for name in {node.inputs[1] for node in graph.nodes if node.op == "linear"}:
        kind, weight = learned.constants[name], graph.values[name].data
        np.testing.assert_allclose(kind.q.dequantize(kind.q.quantize(weight, kind.dtype)), weight, rtol=1e-6)


@pytest.mark.parametrize(("low", "high", "zero"), [(0, 255, 130.4), (-127, 127, 0.0)])
def test_rounding_is_what_torch_computes_and_so_are_its_derivatives(low, high, zero):
    results = []
    for call in (_Rounded.apply, lambda *args: torch._fake_quantize_learnable_per_tensor_affine(*args, 1.0)):
        torch.manual_seed(0)
        x = torch.randn(64, 33).mul_(2).requires_grad_()
        scale, offset = torch.tensor([0.02]).requires_grad_(), torch.tensor([zero]).requires_grad_()
        y = call(x, scale, offset, low, high)
        (y * torch.randn(64, 33)).sum().backward()
        results.append([t.detach().numpy() for t in (y, x.grad, scale.grad, offset.grad)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5)


def test_scales_of_norms_alone_change_norms_and_their_readers_alone():
    before = uneven(stack())
    config = Train(steps=2, batch=4, check=1, scale_rate=5e-2, clip_rate=0, range_rate=0, pairs="norms")
    graph, _ = train(before, planned(before, "w8a8"), config, TARGET, data(8))
    parts = {name.split(".")[2] for name in moved(before, graph)}
    assert parts <= {"norm", "norm2", "q", "k", "v", "gate", "up"} and parts


def test_learned_zero_points_are_whole_and_those_of_the_target_stay():
    plan = planned(uneven(), "w4a8")
    _, learned = train(uneven(), plan, Train(steps=20, check=10, range_rate=1e-2), TARGET, data())
    moved = [n for n, kind in learned.types.items() if kind.q.zero != plan.types[n].q.zero]
    assert moved and all(isinstance(kind.q.zero, int) for kind in learned.types.values())
    assert learned.types["softmax"] == plan.types["softmax"]
    values = [kind for (output, i), kind in learned.reads.items() if i == 1]
    assert all(kind.q.zero == TARGET.second_operand_zero for kind in values)


def test_a_stopped_run_goes_on_to_the_same_result(tmp_path, monkeypatch):
    plan, file = planned(uneven(), "w8a8"), tmp_path / "state.pt"
    whole = train(uneven(), plan, Train(steps=12, check=4), TARGET, data())

    class Stopped(Exception):
        pass

    class Halting(_Run):
        def descend(self, loss: torch.Tensor) -> None:
            if self.step == 9:
                raise Stopped
            super().descend(loss)

    config = Train(steps=12, check=4, checkpoint=str(file))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("edgeforge.compress.train._Run", Halting)
        train(uneven(), plan, config, TARGET, data())
    resumed = train(uneven(), plan, config, TARGET, data())
    for a, b in zip(whole[0].constants(), resumed[0].constants(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)
    assert whole[1].types == resumed[1].types
