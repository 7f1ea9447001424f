"""The token of a cluster is hidden once it was read, from a file too."""

from __future__ import annotations

import pytest

from dist_ft.cluster.jobs.ray_token import find_token
from dist_ft.core import redaction
from dist_ft.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(redaction, "_remembered", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_a_token_from_a_file_is_hidden(monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text("f1le-1977-token\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert redaction.redact("x f1le-1977-token") == "x f1le-1977-token"
    assert find_token() == "f1le-1977-token"
    assert redaction.redact("x f1le-1977-token") == "x <RAY_AUTH_TOKEN>"


def test_no_token(monkeypatch, tmp_path):
    assert find_token() is None
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH=.*none: cannot be read"):
        find_token()
