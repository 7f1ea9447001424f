"""Keeps Ray from uploading the current folder by itself.

A driver that `uv run` started would otherwise send the whole folder to the cluster, keys included:
Ray packs it as the workers' working directory. Projects are uploaded by `dist-ft submit` only,
which searches them. Does not import Ray.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
"""The variable by which a user of Ray can have that nevertheless."""


def forbid() -> None:
    """Turn the upload off for this process, before it connects to Ray."""
    if VARIABLE in os.environ:  # the user decided
        return
    os.environ[VARIABLE] = "0"

    # If Ray was imported already, it has read the variable and kept its own default.
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:
        setattr(constants, VARIABLE, False)
