"""Logging: one line a message, prefixed by rank; other ranks than 0 speak only from WARNING up.

Guarantees: no value of a known credential reaches a handler set up here (`redact`), and third-party warnings that
mean nothing are silenced by name, never wholesale.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from urllib.parse import quote

SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|CREDENTIAL|CONNECTION_STRING|_KEY$|\bSAS|_SAS)",
    re.IGNORECASE,
)
USERINFO = re.compile(
    r"(?<=://)(?:[^/@\s:]*:[^/@\s]+)(?=@)|(?<=http://)[^/@\s:]+(?=@)|(?<=https://)[^/@\s:]+(?=@)"
)
QUERY_SECRET = re.compile(
    r"(?i)([?&](?:sig|signature|(?:access_|auth_)?token|password|secret|client_secret|(?:api_?)?key|awsaccesskeyid"
    r"|x-amz-(?:signature|security-token|credential)|x-goog-(?:signature|credential))=)[^&\s'\"]+"
)

# (logger name, why its INFO and WARNING lines carry nothing for a user)
QUIET_LOGGERS = (
    "DeepSpeed",  # op compatibility and timer chatter on every rank
    "datasets",  # cache notices
    "httpx",  # one line a request
    "botocore.credentials",  # "found credentials in environment variables"
    "ray.data",  # not used by training
    "absl",
    "torchao",
    "torchao.kernel.intmm",
    "torch.utils._pytree",  # kernels of GPUs that are not there
)


def redact(text: str) -> str:
    """Return `text` without credentials: values of secret environment variables, user info and signatures in URLs."""
    secrets = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= 8 and SECRET_NAME.search(name)
    }
    for value in sorted(secrets, key=len, reverse=True):  # one may be part of another
        for written in (value, quote(value, safe="")):
            text = text.replace(written, f"<{secrets[value]}>")
    return QUERY_SECRET.sub(r"\1<redacted>", USERINFO.sub("<redacted>", text))


class _Redacting(logging.Formatter):
    """Formats a record, then removes credentials from the finished line."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def setup_logging(
    rank: int = 0, num_ranks: int = 1, level: str = "info", extra_handler: logging.Handler | None = None
) -> None:
    """Send the `dist_ft` logger to stderr (and to the handler `also`): rank 0 from `level`, the others from WARNING."""
    prefix = f"[rank {rank}] " if num_ranks > 1 else ""
    handlers = [logging.StreamHandler(sys.stderr), *([extra_handler] if extra_handler is not None else [])]
    for handler in handlers:
        handler.setFormatter(_Redacting(f"{prefix}%(levelname)s %(message)s"))
    logger = logging.getLogger("dist_ft")
    logger.handlers[:] = handlers
    logger.propagate = False
    logger.setLevel(level.upper() if rank == 0 else logging.WARNING)
    quiet_third_parties()


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet_third_parties() -> None:
    """Silence, by name, third-party messages that tell a user nothing."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).addFilter(
            _errors_only
        )  # a filter: some libraries set their level when imported
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*")
    warnings.filterwarnings(
        "ignore", message=".*torch.distributed.*is deprecated.*"
    )  # DeepSpeed's calls, not ours
    warnings.filterwarnings(
        "ignore", message=".*barrier\\(\\): using the device under current context.*"
    )
