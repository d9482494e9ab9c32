"""A language model's bundle holds two graphs: each is timed, checked and reported apart."""

from __future__ import annotations

import json

import pytest
from conftest import Failed
from test_llm import folder, small  # noqa: F401 (fixtures)


@pytest.fixture
def bundle(small, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("EDGEFORGE_RESULTS", str(tmp_path / "results.sqlite"))
    return small.path


def test_both_graphs_are_timed_and_reported(run, bundle, tmp_path):
    words = ("--backend", "onnx_qdq", "--repeats", 4, "--warmup", 1, "--json")
    found = json.loads(run("bench", bundle, *words))["results"]
    assert [(r["artifact"], r["part"]) for r in found] == [("onnx_qdq", "prefill"), ("onnx_qdq", "decode")]
    for result in found:
        assert len(result["latency_us"]) == 4
        assert result["golden"]["identical"] > 0.9 and result["golden"]["max_lsb"] is not None
    prefill, decode = found
    assert prefill["first_token_ms"] * 1e3 == pytest.approx(prefill["percentiles_us"]["p50"])
    assert decode["tokens_per_second"] == pytest.approx(1e6 / decode["percentiles_us"]["p50"])
    assert prefill["tokens_per_second"] is None and decode["first_token_ms"] is None
    assert {r["artifact"] for r in json.loads(run("results", "--json"))["results"]} == {
        "onnx_qdq prefill", "onnx_qdq decode"}  # fmt: skip
    assert "tokens/s" in run("report", bundle, "--no-run", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<section class="bundle"') == 2 and "prefill w8a8" in page and "decode w8a8" in page
    assert "tokens/s" in page and "first token ms" in page


@pytest.mark.parametrize("place", ["hub", "adb"])
def test_places_that_keep_no_state_refuse_it(run, bundle, place):
    with pytest.raises(Failed, match="bench --on host"):
        run("bench", bundle, "--on", place, "--dry-run", "--runner", __file__)
