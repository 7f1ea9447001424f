"""Files are recognized as credentials by name, and honest names are not."""

from __future__ import annotations

import pytest
from packing_names import HONEST, SECRET

from dist_ft.cluster.jobs.secret_names import is_secret_name


@pytest.mark.parametrize("name", SECRET)
def test_name_of_a_credential(name):
    assert is_secret_name(name)
    assert is_secret_name(f"some/folder/{name}") and is_secret_name(name.upper())


@pytest.mark.parametrize("name", HONEST)
def test_honest_name(name):
    assert not is_secret_name(name)
    assert not is_secret_name(f"some/folder/{name}")


def test_there_are_enough_names():
    assert len(set(SECRET)) >= 80 and len(set(HONEST)) >= 40
