"""Distinguishes the loss of another worker from a failure of this one, by the text of the error."""

from __future__ import annotations

PEER_LOSS_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "Connection refused",
    "Timed out waiting",
    "recvValue failed",
    "DistNetworkError",
    "failed to recv",
    "unexpected EOF",
    "remote process exited",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
    "wait timeout after",
)
"""Texts of errors that only say that another worker vanished."""


def reports_peer_loss(text: str) -> bool:
    """Return whether an error only says that another worker vanished."""
    return any(peer_text in text for peer_text in PEER_LOSS_TEXTS)
