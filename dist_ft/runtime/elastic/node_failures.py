"""Which nodes the failures of a run point to. Pure.

The reason for the end of an attempt names worker and node; it is stored with the next attempt, so
that what a node did is known after the driver has ended too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

NODE_KINDS = ("crash", "out of memory", "lost")
"""Kinds of failures that may be the fault of the node. Errors of code or data, kills from outside
and failing storage are not."""
KNOWN_LOSS = "the worker or its node was lost"
"""Text of a loss whose worker is known."""
UNKNOWN_LOSS = "a worker or its node was lost"
"""Text of a loss that names another worker, because it is not known whose it is."""
SILENT = "no sign of life from "
"""Start of the list of workers that did not report although the others did."""
_FAILED = re.compile(rf"worker \d+ on node (\S+): ({'|'.join(NODE_KINDS)}) \((?!{UNKNOWN_LOSS})")
_HANG = re.compile(rf"worker \d+ on node \S+: hang \(.*?{SILENT}([^;()]*)")
_WORKER = re.compile(r"worker \d+ on node (\S+?)(?:,|$)")


@dataclass(frozen=True)
class NodeFailure:
    """A failure that points to a node.

    Attributes:
        node: name of the node.
        kind: what happened.
        at_s: when (time.time).
    """

    node: str
    kind: str
    at_s: float


def node_failures(reason: str, at_s: float) -> list[NodeFailure]:
    """Return the failures of nodes in the reason why an attempt ended; each node once."""
    match = _FAILED.match(reason)
    if match:
        return [NodeFailure(match[1], match[2], at_s)]

    # Who reports a hang waited for another worker, which may be unable to report.
    match = _HANG.match(reason)
    if not match:
        return []
    nodes = dict.fromkeys(_WORKER.findall(match[1]))
    return [NodeFailure(node, "hang", at_s) for node in nodes]


class WorkerPlace(NamedTuple):
    """The rank and the node of a worker."""

    rank: int
    node: str

    def __str__(self) -> str:
        return f"worker {self.rank} on node {self.node}"


def name_silent_workers(text: str, workers: Sequence[WorkerPlace]) -> str:
    """Return the text of a hang with the workers that did not report."""
    return f"{text}; {SILENT}{', '.join(map(str, workers))}"
