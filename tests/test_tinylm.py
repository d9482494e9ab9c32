"""The embedded language model: its perplexity survives quantization, and it tells a story."""

from __future__ import annotations

import json
import sys

import pytest

from edgeforge import cli
from edgeforge.bundle import load_bundle
from edgeforge.errors import InvalidInput
from edgeforge.llm.generate import generate
from edgeforge.pipeline import export, find_data, load
from edgeforge.validate import validate

TARGET = "snapdragon-8-gen-3"


@pytest.fixture(scope="module")
def model():
    return load("tinylm")


@pytest.fixture(scope="module", params=["w8a8", "w8a16"])
def bundle(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("tinylm") / request.param
    return export("tinylm", TARGET, out, "embedded", request.param, backend_names=("simulator", "onnx_qdq"))


def test_integer_perplexity_is_within_two_percent_of_float(bundle, model):
    data = find_data("embedded", "heldout", model, bundle.graph, bundle.recipe, bundle.path).head(32)
    for result in validate(bundle, data, model.imported.graph):
        assert result.metric is not None and result.metric["name"] == "perplexity"
        assert result.metric["value"] < 1.02 * result.metric["float"], result.backend


def test_the_residual_stream_keeps_16_bits(bundle):
    adds = [
        n
        for n in bundle.graph.nodes
        if n.op == "add" and n.source.startswith("model.layers") and "attn" not in n.source
    ]
    assert adds and {bundle.graph.type(n.output).dtype for n in adds} == {"u16"}
    softmax = [n for n in bundle.graph.nodes if n.op == "softmax"]
    assert {bundle.graph.type(n.output).dtype for n in softmax} == {"u16"}


def test_generation_is_greedy_repeatable_and_fits_the_window(bundle):
    first = list(generate(bundle, "Once upon a time", 12))
    assert first == list(generate(bundle, "Once upon a time", 12))
    text = "".join(piece for _, piece in first)
    assert "there was" in text
    (name,) = bundle.graph.inputs
    window = bundle.graph.type(name).shape[1]
    assert len(list(generate(bundle, "One day Tim went to the park with his mom. " * 2, window))) <= window
    with pytest.raises(InvalidInput, match="does not fit the window"):
        next(generate(bundle, "word " * 200, 1))


def test_generate_prints_one_json_document(bundle, monkeypatch, capsys):
    words = ["generate", str(bundle.path), "--prompt", "Lily", "--max-tokens", "4", "--json"]
    monkeypatch.setattr(sys, "argv", ["edgeforge", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert not done.value.code and len(found["tokens"]) == 4 and found["source"].startswith("simulated")


def test_a_model_without_a_tokenizer_does_not_generate(tmp_path):
    digits = export("digits", TARGET, tmp_path / "digits", "embedded", backend_names=("simulator",))
    with pytest.raises(InvalidInput, match="is no language model"):
        next(generate(load_bundle(digits.path), "Once", 1))
