"""Typed errors: everything a user can meet derives from `DistFtError`.

A message reads `<field or path>=<value>: what is wrong; what is allowed; what to do`. Each error survives
pickling (Ray carries it from a worker to the driver), knows the exit code of the command line, and says whether
starting again could help (`retryable`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PLANNED = "planned: "
"""So begins why an attempt ended, where nothing failed."""


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


class PeerError(WorkerError):
    """Another worker failed; its own error says why."""

    retryable = True


class Interrupted(DistFtError):
    """The user (or the machine) asked the run to stop; what was committed is kept."""

    exit_code = 130


_NO_MEMORY = ("CUDA out of memory", "OutOfMemoryError")
_NO_HOST_MEMORY = ("DefaultCPUAllocator: can't allocate memory",)
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
)


def explain_library_error(error: BaseException) -> WorkerError | None:
    """Return what an error of a library, or one it was raised from, means to a user; None: nothing known."""
    for one in _chain(error):
        name = type(one).__name__
        if name == "OutOfMemoryError" or _NO_MEMORY[0] in str(one):
            return WorkerError(
                f"out of GPU memory ({_line_of(one, _NO_MEMORY)}); a step needs less with a smaller "
                "batch.micro_batch or batch.sequence_length, the state with more workers, a higher "
                "zero.stage, or zero.offload_optimizer=cpu"
            )
        if isinstance(one, MemoryError) or _NO_HOST_MEMORY[0] in str(one):
            return WorkerError(
                f"out of memory ({_line_of(one, _NO_HOST_MEMORY)}); use a machine with more, fewer "
                "workers on it, a smaller batch.micro_batch, or leave out zero.offload_optimizer and "
                "zero.offload_param"
            )
        if isinstance(one, RuntimeError) and any(text in str(one) for text in _PEER_GONE):
            return WorkerError(
                f"another worker has ended ({_line_of(one, _PEER_GONE)}); its own log says why; look "
                "there first (torchrun names the rank that failed first)"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error`, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _line_of(error: BaseException, texts: Sequence[str] = ()) -> str:
    """Return the line of an error's text that holds one of `texts`, else its first; without text, its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if any(text in line for text in texts)), lines[0]).strip()[
        :200
    ]
