"""The planted outliers of the quality benchmark: nothing changes in float, and plain rounding fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import Case, perplexity_of
from benchmarks.stress import stress
from edgeforge.frontend.language import Language
from edgeforge.llm.evaluate import float_scorer
from edgeforge.llm.quantize import read_texts, token_sequences
from edgeforge.models import load_model

TINYLM = Path(__file__).parents[1] / "models" / "tinylm"


@pytest.fixture(scope="module")
def language() -> Language:
    return load_model(str(TINYLM), traced=False).language


@pytest.fixture(scope="module")
def ids(language) -> np.ndarray:
    found = token_sequences(read_texts(TINYLM / "calibration.txt"), language.encoder(), language.bos, 64)
    return np.array([s for s in found if len(s) == 64][:24], np.int64)


@pytest.mark.parametrize("seed", [0, 1])
def test_outliers_and_sinks_leave_the_float_model(language, ids, seed):
    changed = stress(language, ids[:8], seed)
    before, after = (float_scorer(model, 64)(ids) for model in (language, changed))
    assert np.abs(before - after).max() < 1e-4
    peaks = [float(max(abs(w).max() for n, w in m.weights.items() if "up_proj" in n)) for m in (language, changed)]
    assert peaks[1] > 5 * peaks[0]


def test_outliers_break_plain_rounding_and_a_prefix_with_smoothing_mends_it(language, ids):
    changed = stress(language, ids[:8], 0)
    exact = np.exp(-float_scorer(language, 64)(ids[8:]).mean())
    found = {}
    for lines in ((), ("language.prefix=true", "compress=[{method: smooth, alpha: 0.5}]")):
        case = Case(changed, "w8a8", (*lines, "calibration.samples=8"))
        found[lines] = perplexity_of(case.quantized(ids[:8]), changed, ids[8:]) / exact - 1
    plain, mended = found.values()
    assert plain > 0.2 and mended < 0.1
