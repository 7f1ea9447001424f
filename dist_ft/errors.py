"""Typed errors: everything a user can meet derives from `DistFtError`.

A message reads `<field or path>=<value>: what is wrong; what is allowed; what to do`. Each error survives
pickling (Ray carries it from a worker to the driver), knows the exit code of the command line, and says whether
starting again could help (`retryable`).
"""

from __future__ import annotations

from collections.abc import Sequence


class DistFtError(Exception):
    """Base of every error a user meets; its text is one clear line."""

    exit_code = 1
    retryable = False


class ConfigError(DistFtError):
    """Everything wrong with a config, all of it at once (`problems`: one line each)."""

    exit_code = 2

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self):
        return (ConfigError, (self.problems, self.source))


class DataError(DistFtError):
    """A data set, shard or row that can not be used; the text names shard and row."""

    exit_code = 2


class ModelError(DistFtError):
    """A model or tokenizer that can not be used as asked."""

    exit_code = 2


class StorageError(DistFtError):
    """Storage that can not be read or written; the text names the URL."""

    retryable = True


class CheckpointError(DistFtError):
    """A checkpoint that is torn, altered, of another model, or that must not be written."""


class WorkerError(DistFtError):
    """Workers that could not be placed, or that died more often than the config allows."""


class Interrupted(DistFtError):
    """The user (or the machine) asked the run to stop; what was committed is kept."""

    exit_code = 130
