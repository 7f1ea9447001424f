"""The token of a Ray cluster, read where Ray reads it, and hidden from all output from then on.

RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token. Imports no Ray.
"""

from __future__ import annotations

import os
from pathlib import Path

from dist_ft.core.errors import ConfigError
from dist_ft.core.redaction import remember_secret
from dist_ft.storage.local_files import read_regular

MAX_BYTES = 2**16
"""Bytes of a token's file; Ray's have 64."""
TOKEN_HELP = (
    "Set RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or RAY_AUTH_TOKEN (for "
    'launch/cluster.sh: eval "$(./launch/cluster.sh env)").'
)


def find_token() -> str | None:
    """Return the token that Ray would send, or None.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token or os.environ.get("RAY_AUTH_MODE", "token") == "disabled":
        return token or None

    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        file = Path(path) if path else Path.home() / ".ray/auth_token"
        token = read_regular(file, MAX_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        # RuntimeError: there is no home folder. Only a file that was named must exist.
        if path:
            raise ConfigError(
                [
                    f"RAY_AUTH_TOKEN_PATH={path}: cannot be read ({error}). It must name a file "
                    "with the cluster's token."
                ],
                "submit",
            ) from error
        return None

    # `redact` knows the variables of the environment, but no files.
    remember_secret("RAY_AUTH_TOKEN", token)
    return token or None
