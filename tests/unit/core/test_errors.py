"""Errors pass between processes unchanged, with their exit code."""

from __future__ import annotations

import json
import pickle

import pytest

from dist_ft.core import errors

PLAIN = [
    errors.DataError,
    errors.ModelError,
    errors.StorageError,
    errors.CheckpointError,
    errors.WorkerError,
    errors.Interrupted,
]


@pytest.mark.parametrize("kind", PLAIN)
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("x=1: wrong. Allowed: y. Do z.")))
    assert type(error) is kind and str(error) == "x=1: wrong. Allowed: y. Do z."
    assert isinstance(error, errors.DistFtError)


def test_config_errors_keep_their_problems():
    error = pickle.loads(pickle.dumps(errors.ConfigError(["a=1: no", "b=2: no"], "run.yaml")))
    assert (error.problems, error.source) == (("a=1: no", "b=2: no"), "run.yaml")
    assert str(error) == "run.yaml: 2 problems\n  - a=1: no\n  - b=2: no"
    assert str(errors.ConfigError(["a=1: no"])) == "config: 1 problem\n  - a=1: no"


def test_exit_codes_and_which_errors_are_retryable():
    codes = {kind.__name__: kind.exit_code for kind in [*PLAIN, errors.ConfigError]}
    assert codes == {
        "DataError": 2,
        "ModelError": 2,
        "ConfigError": 2,
        "StorageError": 1,
        "CheckpointError": 1,
        "WorkerError": 1,
        "Interrupted": 130,
    }
    assert [kind for kind in PLAIN if kind.retryable] == [errors.StorageError]


@pytest.mark.parametrize("kind", PLAIN)
def test_a_sent_error_keeps_its_type_and_text(kind):
    sent = json.loads(json.dumps(errors.SentError.from_error(kind("one\ntwo"))))
    found = errors.SentError(*sent).restore(errors.DataError)
    assert (type(found), str(found)) == (kind, "one\ntwo")


def test_a_sent_config_error_keeps_its_problems():
    """They were once taken apart letter by letter."""
    sent = errors.SentError.from_error(errors.ConfigError(["a: wrong", "b: wrong"]))
    assert errors.SentError(*sent).restore(errors.DataError).problems == ("a: wrong", "b: wrong")


def test_a_sent_error_of_another_kind_becomes_the_given_one():
    for error in (KeyError("x"), RuntimeError("x")):
        found = errors.SentError.from_error(error).restore(errors.WorkerError)
        assert type(found) is errors.WorkerError
    assert type(errors.SentError("Sequence", ["x"]).restore(errors.DataError)) is errors.DataError


def test_text_of_a_config_error_lists_some_problems_and_counts_all():
    error = errors.ConfigError(
        [f"data.train.{number}=0: not a source" for number in range(3000)], "a.yaml"
    )
    lines = str(error).splitlines()
    assert lines[0] == "a.yaml: 3000 problems" and len(lines) == 52
    assert lines[-1] == "  - ... and 2,950 more. Correct these first."
    assert len(error.problems) == 3000 and len(pickle.loads(pickle.dumps(error)).problems) == 3000
