"""Ray does not upload the current folder by itself, unless the user says so."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from dist_ft.runtime.ray_backend import implicit_uploads
from dist_ft.runtime.ray_backend.implicit_uploads import VARIABLE


@pytest.mark.parametrize(("chosen", "expected"), [(None, "0"), ("1", "1"), ("0", "0")])
def test_variable(monkeypatch, chosen, expected):
    # set first, so that it is restored whatever happens
    monkeypatch.setenv(VARIABLE, "x")
    if chosen is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, chosen)
    implicit_uploads.forbid()
    assert os.environ[VARIABLE] == expected


@pytest.mark.parametrize(("chosen", "expected"), [(None, False), ("1", True)])
def test_ray_that_was_imported_before(monkeypatch, chosen, expected):
    constants = SimpleNamespace(**{VARIABLE: True})
    monkeypatch.setitem(sys.modules, "ray._private.ray_constants", constants)
    monkeypatch.setenv(VARIABLE, "x")
    monkeypatch.delenv(VARIABLE)
    if chosen is not None:
        monkeypatch.setenv(VARIABLE, chosen)
    implicit_uploads.forbid()
    assert getattr(constants, VARIABLE) is expected
