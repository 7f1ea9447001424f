"""The two places a checkpoint can be written to."""

from __future__ import annotations

from enum import Enum


class Tier(Enum):
    """Where the files of a checkpoint are; the value is the folder of the run with its manifests.

    STORAGE: the run's storage, which every worker reads.
    LOCAL: the disks of the workers' own nodes. Only the manifest is in the run's storage.
    """

    STORAGE = "checkpoints"
    LOCAL = "node-checkpoints"
