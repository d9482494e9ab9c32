"""Logs of vendors' libraries: a run that ends well, or for reasons of its own, leaves nothing; a failure leaves its log
and names it."""

from __future__ import annotations

import tempfile

import pytest

from edgeforge.backends._child import in_child, served
from edgeforge.backends._log import new_log
from edgeforge.errors import BackendFailed

#: A program of Python's that reads the request, prints it and ends: a child that works, and one that does not serve.
PRINTS, FAILS = "json.tool", "edgeforge.backends.absent"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The system's temporary folder, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_child_that_works_leaves_nothing(place):
    in_child("probe", PRINTS, {"a": 1})
    assert list(place.iterdir()) == []


def test_a_child_that_fails_leaves_its_log_alone(place):
    with pytest.raises(BackendFailed) as failed:
        in_child("probe", FAILS, {})
    (log,) = place.iterdir()
    assert f"log: {log}" in str(failed.value) and "No module named" in log.read_text()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, BackendFailed])
def test_an_error_of_the_caller_leaves_nothing(place, error):
    with pytest.raises(error), served("probe", PRINTS, {}):
        raise error("not the child's")
    assert list(place.iterdir()) == []


def test_a_child_that_stops_answering_leaves_its_log_alone(place):
    with pytest.raises(BackendFailed) as failed, served("probe", PRINTS, {}) as step:
        step({})
    (log,) = place.iterdir()
    assert f"log: {log}" in str(failed.value)


def test_a_log_is_kept_for_an_error_that_names_it_alone(place):
    with pytest.raises(BackendFailed), new_log("a"):
        raise BackendFailed("something else")
    assert list(place.iterdir()) == []
    with pytest.raises(BackendFailed), new_log("a") as log:
        raise BackendFailed(f"see {log}")
    assert list(place.iterdir()) == [log]
