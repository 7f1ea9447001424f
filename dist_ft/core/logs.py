"""Logging: one line per message, prefixed by rank; ranks other than 0 log only from WARNING up.

Guarantees: no value of a known credential reaches a handler set up here (`redact`), and irrelevant
third-party warnings are silenced by name, never all at once.
"""

from __future__ import annotations

import logging
import sys
import warnings

from dist_ft.core.printable import printable
from dist_ft.core.redaction import redact

__all__ = ["quiet_third_parties", "redact", "setup_logging"]

# Loggers whose INFO and WARNING lines do not help a user.
QUIET_LOGGERS = (
    "DeepSpeed",  # op compatibility and timer chatter on every rank
    "datasets",  # cache notices
    "httpx",  # one line per request
    "botocore.credentials",  # "found credentials in environment variables"
    "ray.data",  # not used by training
    "absl",
    "torchao",
    "torchao.kernel.intmm",
    "torch.utils._pytree",  # kernels of GPUs that the machine does not have
)


class _RedactingFormatter(logging.Formatter):
    """Formats a record, then removes credentials and control characters from the line."""

    def format(self, record: logging.LogRecord) -> str:
        # Escaped last: a credential is recognized in the text as it was.
        return printable(redact(super().format(record)))


def setup_logging(
    rank: int = 0,
    num_ranks: int = 1,
    level: str = "info",
    extra_handler: logging.Handler | None = None,
) -> None:
    """Send the `dist_ft` logger to stderr and to `extra_handler`.

    Rank 0 logs from `level` up, the others from WARNING up.
    """
    prefix = ""
    if num_ranks > 1:
        prefix = f"[rank {rank}] "

    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if extra_handler is not None:
        handlers.append(extra_handler)

    for handler in handlers:
        handler.setFormatter(_RedactingFormatter(f"{prefix}%(levelname)s %(message)s"))

    logger = logging.getLogger("dist_ft")
    logger.handlers[:] = handlers
    # A handler that some library adds to the root logger would print each line again, and with
    # credentials.
    logger.propagate = False
    threshold: int | str = logging.WARNING
    if rank == 0:
        threshold = level.upper()
    logger.setLevel(threshold)

    quiet_third_parties()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet_third_parties() -> None:
    """Silence, by name, third-party messages that do not help a user."""
    for name in QUIET_LOGGERS:
        # A filter, as some libraries set their level when they are imported.
        logging.getLogger(name).addFilter(_is_error)

    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*")
    # DeepSpeed makes the deprecated calls.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*")
    warnings.filterwarnings(
        "ignore", message=".*barrier\\(\\): using the device under current context.*"
    )
