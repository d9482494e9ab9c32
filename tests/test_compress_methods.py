"""Methods that rewrite the float graph: the function stays, the integers get better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from compress_models import block, data, uneven

from edgeforge.compress import compress
from edgeforge.compress.channels import factors, find_channels
from edgeforge.compress.smooth import _Search
from edgeforge.data import from_arrays
from edgeforge.errors import InvalidInput
from edgeforge.frontend import Imported
from edgeforge.ir.graph import Graph
from edgeforge.models import Model
from edgeforge.pipeline import quantize
from edgeforge.quantize.assign import assign
from edgeforge.quantize.calibrate import calibrate
from edgeforge.quantize.convert import convert
from edgeforge.recipe import Equalize, Recipe, Smooth
from edgeforge.sim.evaluate import dequantize_outputs, quantize_feeds, run_float, simulate
from edgeforge.sim.parity import sqnr_db
from edgeforge.target import load_target, read_yaml

TARGET = load_target("snapdragon-8-gen-3")


def quality(graph: Graph, recipe: Recipe) -> float:
    """dB of the integer graph against the float one."""
    feeds = data().stacked()
    plan = assign(graph, calibrate(graph, [feeds]), recipe, TARGET)
    integer = convert(graph, plan, TARGET, recipe.weights)
    got = dequantize_outputs(integer, simulate(integer, quantize_feeds(integer, feeds)))
    db = sqnr_db(run_float(graph, feeds)[graph.outputs[0]], got[graph.outputs[0]])
    assert db is not None
    return db


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
@pytest.mark.parametrize("config", [Smooth(), Smooth(alpha=0.5), Equalize()], ids=repr)
def test_the_function_stays_and_uneven_channels_cost_less(config, precision):
    recipe = Recipe(precision=precision, compress=(config,))
    better = compress(uneven(), recipe, TARGET, data())
    feeds = data().stacked()
    before, after = (run_float(graph, feeds)[graph.outputs[0]] for graph in (uneven(), better))
    assert np.abs(before - after).max() < 1e-5 * np.abs(before).max()
    gain = quality(better, recipe) - quality(uneven(), recipe)
    assert gain > 3


def test_the_search_does_no_harm_where_channels_are_even():
    recipe = Recipe(compress=(Smooth(),))
    assert quality(compress(block(), recipe, TARGET, data()), recipe) > quality(block(), recipe) - 0.5


def test_smoothing_norms_alone_leaves_other_weights():
    better = compress(uneven(), Recipe(compress=(Smooth(alpha=0.5, pairs="norms"),)), TARGET, data())
    before = {value.name: value.data for value in uneven().constants()}
    changed = {value.name for value in better.constants() if not np.array_equal(value.data, before[value.name])}
    assert changed == {f"{name}.weight" for name in ("norm", "norm2", "q.scaled", "k", "v", "gate", "up")}


def test_equalized_weights_have_equal_peaks_on_both_sides():
    better = compress(uneven(), Recipe(compress=(Equalize(),)), TARGET, data())
    channels = find_channels(better)
    (group,) = (g for g in channels.groups if g.up == ("v",))
    peaks = []
    for key, part in ((("v", 1), 0), (("o", 1), 1)):
        name = next(n.inputs[1] for n in better.nodes if n.output == key[0])
        numbers = np.broadcast_to(np.abs(channels.constants[key][part]), better.values[name].type.shape)
        found = np.zeros(channels.count + 1)
        np.maximum.at(found, numbers, np.abs(better.values[name].data))
        peaks.append(found[1:][group.span])
    np.testing.assert_allclose(*peaks, rtol=1e-2)


def test_signed_numbers_stand_for_scales_and_their_inverses():
    np.testing.assert_allclose(factors(np.array([2, 0, -2, 1]), np.log([3.0, 4.0])), [4, 1, 0.25, 3])


def test_a_recipe_with_every_method_survives_its_file(tmp_path):
    recipe = Recipe().with_set(
        ["compress=[{method: rotate}, {method: equalize}, {method: smooth, alpha: 0.5}]", "train={steps: 3}"]
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    assert read_yaml(file, Recipe) == recipe
    with pytest.raises(InvalidInput, match="method"):
        recipe.with_set(["compress=[{method: magic}]"])


def test_one_recipe_runs_all_of_it_and_gives_an_integer_graph():
    steps = ["compress=[{method: rotate}, {method: smooth, samples: 4}]", "train={steps: 4, batch: 4}", "weights=gptq"]
    recipe = Recipe(precision="w4a16", bias_correction=4).with_set(steps)
    model = Model("block", Imported(uneven()), Path())
    assert quantize(model, recipe, TARGET, data()).level == "integer"


def test_the_search_looks_at_the_samples_with_the_largest_values():
    x = np.random.default_rng(3).normal(size=(24, 10, 16)).astype(np.float32)
    calm = from_arrays("calm", {block().inputs[0]: np.delete(x, 17, 0)}, block())
    x[17, 4] = 0
    x[17, 4, 3] = 9
    rare = from_arrays("rare", {block().inputs[0]: x}, block())
    searches = [_Search(block(), find_channels(block()), Recipe(), TARGET, data, 8) for data in (calm, rare)]
    for group in searches[0].channels.groups:
        (low, _), (high, _) = (search.peaks(group) for search in searches)
        assert (high >= low * 0.99).all()
    assert 17 in searches[1].seen(rare)[1][:8]
    wanted = run_float(block(), rare.sample(17))[block().outputs[0]]
    assert any(np.allclose(sample, wanted, atol=1e-4) for sample in searches[1].exact[block().outputs[0]].numpy())
