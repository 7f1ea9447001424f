"""Typed errors: every error that a user can see derives from `DistFtError`.

A message reads `<field or path>=<value>: what is wrong. What is allowed. What to do.` Each error
survives pickling (Ray carries it from a worker to the driver), has the exit code of the command
line, knows whether a restart could help (`retryable`), and holds no credential (`redaction`):
wherever its text is shown, stored or sent, it was redacted when the error was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dist_ft.core.redaction import redact

PLANNED = "planned: "
"""Prefix of the reason why an attempt ended, if nothing failed."""
MAX_PROBLEMS = 50
"""Problems of a config in its text: a list of a wrong type has one for each of its items."""
MAX_LINE = 200
"""Characters of a library's error that are quoted."""


class DistFtError(Exception):
    """Base of all errors that a user sees; its text is one clear line."""

    exit_code = 1
    retryable = False

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(part) if isinstance(part, str) else part for part in args))


class ConfigError(DistFtError):
    """All problems of a config.

    Attributes:
        problems: one line each.
        source: file or command that has them.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(redact(problem) for problem in problems)
        self.source = redact(source)

        noun = "problems"
        if len(self.problems) == 1:
            noun = "problem"

        lines = [f"{self.source}: {len(self.problems)} {noun}"]
        lines.extend(f"  - {problem}" for problem in self.problems[:MAX_PROBLEMS])
        num_more = len(self.problems) - MAX_PROBLEMS
        if num_more > 0:
            lines.append(f"  - ... and {num_more:,} more. Correct these first.")
        super().__init__("\n".join(lines))

    def __reduce__(self):
        # By default an exception is rebuilt from its text, which is not what __init__ takes.
        return (ConfigError, (self.problems, self.source))


class DataError(DistFtError):
    """A data set, shard or row that cannot be used; the text names shard and row."""

    exit_code = 2


class ModelError(DistFtError):
    """A model or tokenizer that cannot be used as configured."""

    exit_code = 2


class StorageError(DistFtError):
    """Storage that cannot be read or written; the text names the URL."""

    retryable = True


class DocumentError(DistFtError, ValueError):
    """A JSON or YAML file that is torn, too large, nested too deeply or of another form.

    It is a ValueError too: readers that take a damaged file for an absent one catch those.
    """

    exit_code = 2


class FolderError(DistFtError):
    """A folder on this machine that others own or may write to; the text names it."""

    exit_code = 2


class CheckpointError(DistFtError):
    """A checkpoint that is incomplete, altered, of another model, or that must not be written."""


class WorkerError(DistFtError):
    """Workers that could not be scheduled, or that died more often than the config allows."""


class PeerError(WorkerError):
    """Another worker failed; its own error has the cause."""

    retryable = True


class Interrupted(DistFtError):
    """The user (or the machine) stopped the run; committed checkpoints are kept."""

    exit_code = 130


class LimitReached(DistFtError):
    """The run reached run.max_hours or run.max_cost; it saved before."""

    exit_code = 3


class SentError(NamedTuple):
    """An error as another process can read it (JSON).

    Attributes:
        type_name: name of its class.
        lines: its text; of a `ConfigError` each problem.
    """

    type_name: str
    lines: list[str]

    @classmethod
    def from_error(cls, error: BaseException) -> SentError:
        """Return an error as it is sent."""
        lines = list(error.problems) if isinstance(error, ConfigError) else [str(error)]
        return cls(type(error).__name__, lines)

    def restore(self, otherwise: type[DistFtError]) -> DistFtError:
        """Return the error as its own type; as `otherwise` if that is none of this module."""
        if self.type_name == ConfigError.__name__:
            return ConfigError(self.lines)

        # Errors of other modules, such as those of storage, are not found by their name alone.
        error_type = globals().get(self.type_name)
        if not (isinstance(error_type, type) and issubclass(error_type, DistFtError)):
            error_type = otherwise
        return error_type("\n".join(self.lines))


_NO_GPU_MEMORY = ("CUDA out of memory", "OutOfMemoryError")
_NO_HOST_MEMORY = ("DefaultCPUAllocator: can't allocate memory",)
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
)


def explain_library_error(error: BaseException) -> WorkerError | None:
    """Return the meaning of a library's error, or of one of its causes; None if it is not known."""
    for cause in _causes(error):
        text = str(cause)

        # Compared by name, so that commands that need no torch do not import it.
        if type(cause).__name__ == "OutOfMemoryError" or _NO_GPU_MEMORY[0] in text:
            return WorkerError(
                f"out of GPU memory ({_matching_line(cause, _NO_GPU_MEMORY)}). Lower "
                "batch.micro_batch or batch.sequence_length, use more workers or a higher "
                "zero.stage, or set zero.offload_optimizer=cpu."
            )

        if isinstance(cause, MemoryError) or _NO_HOST_MEMORY[0] in text:
            return WorkerError(
                f"out of memory ({_matching_line(cause, _NO_HOST_MEMORY)}). Use a machine with "
                "more memory, fewer workers on each machine or a smaller batch.micro_batch, or "
                "remove zero.offload_optimizer and zero.offload_param."
            )

        # Compared by name: each native module has a class of its own, and exports none.
        if type(cause).__name__ == "PanicException":
            return WorkerError(
                f"native code of a library failed ({_matching_line(cause, ())}). The usual cause "
                "is a tokenizer that does not fit a text, or a damaged file. Check the files of "
                "model.path and the texts."
            )

        # Only RuntimeError, which gloo and NCCL raise: an OSError with one of these texts comes
        # from storage or another server.
        peer_gone = any(pattern in text for pattern in _PEER_GONE)
        if isinstance(cause, RuntimeError) and peer_gone:
            return WorkerError(
                f"another worker ended ({_matching_line(cause, _PEER_GONE)}). Look for the cause "
                "in the log of that worker (torchrun names the rank that failed first)."
            )

    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error`, the error it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _matching_line(error: BaseException, patterns: Sequence[str]) -> str:
    """Return the first line of the error's text with one of `patterns`, else its first line.

    An error without text gives the name of its type.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]

    # NCCL, for one, names the error on its second line, after a place in its source code.
    for line in lines:
        if any(pattern in line for pattern in patterns):
            return line.strip()[:MAX_LINE]

    return lines[0].strip()[:MAX_LINE]
