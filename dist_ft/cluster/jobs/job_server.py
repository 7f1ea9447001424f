"""The job server of a Ray cluster (its dashboard) as asked over HTTP: who answers, its versions and nodes.

Guarantees: every question has a time limit; what goes wrong is one line that names the address and the remedy; the
token is read where Ray reads it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token), never shown. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, WorkerError
from dist_ft.core.logs import redact
from dist_ft.runtime.ray_backend.placement import resources

DEFAULT = "http://127.0.0.1:8265"
ANSWER_S = 30.0
OLDEST_RAY = (2, 60)
"""As pyproject.toml wants it."""
HERE = ".".join(map(str, sys.version_info[:2]))
TOKEN_HELP = (
    "set RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or RAY_AUTH_TOKEN (for launch/cluster.sh: "
    'eval "$(./launch/cluster.sh env)")'
)


class UnreachableError(WorkerError):
    """Nobody answers at the address, perhaps for a moment."""


class UnknownJobError(WorkerError):
    """The cluster has no job of this name."""


@dataclass(frozen=True)
class Node:
    """A node that is alive: its address, what it has (Ray's names: CPU, GPU, ...) and what of that is free."""

    ip: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def resolve(address: str | None) -> str:
    """Return the URL of the job server: `address`, or what the environment names, or the default of a local one."""
    named = os.environ.get("RAY_ADDRESS", "")
    url = (
        address
        or os.environ.get("RAY_API_SERVER_ADDRESS")
        or (named if named.startswith("http") else DEFAULT)
    ).rstrip("/")
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    raise ConfigError(
        [
            f"--address={redact(url)}: not the URL of a job server; http://HOST:8265 (or https://...) of "
            "the cluster's head is wanted; Ray's own port (6379) and ray:// are not asked"
        ],
        "submit",
    )


def token() -> str | None:
    """Return the token Ray would send, or None."""
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or os.environ.get("RAY_AUTH_MODE", "token") == "disabled":
        return given or None
    try:
        return (Path(path) if path else Path.home() / ".ray/auth_token").read_text(
            "utf-8"
        ).strip() or None
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        if path:
            raise ConfigError(
                [
                    f"RAY_AUTH_TOKEN_PATH={path}: can not be read ({error}); a file with the cluster's "
                    "token is wanted; correct it"
                ],
                "submit",
            ) from error
        return None


class Server:
    """One job server."""

    def __init__(self, url: str) -> None:
        """Take the URL that `resolve` gave; nothing is asked yet."""
        self.url = url
        self.shown = redact(url)
        found = token()
        self.headers = {"Authorization": f"Bearer {found}"} if found else {}

    def ask(self, path: str, method: str = "GET") -> Any:
        """Return the JSON answer; raises UnreachableError, UnknownJobError, WorkerError."""
        import requests

        try:
            answer = requests.request(
                method, self.url + path, headers=self.headers, timeout=ANSWER_S
            )
        except (requests.RequestException, ValueError) as error:
            raise UnreachableError(
                f"--address={self.shown}: no job server of Ray answers there ({_why(error)}); check "
                "that the cluster runs, its port (8265) and a port-forward if there is one, or "
                "start one here: ./launch/cluster.sh start"
            ) from error
        if answer.status_code in (401, 403):
            said = (
                "its token was not accepted: it is another cluster's, or an old one"
                if self.headers
                else ("it wants a token, and none was found")
            )
            raise WorkerError(f"--address={self.shown}: {said}; {TOKEN_HELP}")
        if answer.status_code in (502, 503, 504):
            raise UnreachableError(
                f"--address={self.shown}: what stands before the job server says "
                f"{answer.status_code}; wait until the cluster is up"
            )
        if answer.status_code == 404 and path.startswith("/api/jobs/"):
            raise UnknownJobError(
                f"{path.split('/')[3]}: no such job at {self.shown}; see dist-ft jobs list"
            )
        try:
            answer.raise_for_status()
            return answer.json()
        except (requests.RequestException, ValueError) as error:
            raise WorkerError(
                f"--address={self.shown}: answers {answer.status_code} to {path}, not what a job server "
                "of Ray does; check the address and that a Ray of 2.60 or newer runs there"
            ) from error

    def jobs(self) -> list[dict[str, Any]]:
        """Return all submitted jobs the cluster knows."""
        return [job for job in self.ask("/api/jobs/") if job.get("submission_id")]

    def job(self, name: str) -> dict[str, Any]:
        """Return what is known of one job."""
        return self.ask(f"/api/jobs/{quote(name, safe='')}")

    def log(self, name: str) -> str:
        """Return a job's whole log so far."""
        return self.ask(f"/api/jobs/{quote(name, safe='')}/logs").get("logs") or ""

    def stop(self, name: str) -> None:
        """Have the job's processes be asked to end."""
        self.ask(f"/api/jobs/{quote(name, safe='')}/stop", "POST")

    def versions(self) -> tuple[str, str | None]:
        """Return the versions of Ray and of Python there (None: it does not say)."""
        ray = str(self.ask("/api/version").get("ray_version", "0"))
        if _pair(ray) < OLDEST_RAY:
            return ray, None  # an old one has no more to say
        return ray, self.ask("/api/v0/cluster_metadata")["data"].get("pythonVersion")

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive."""
        found = self.ask("/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        used: Any = {}
        with contextlib.suppress(
            WorkerError, KeyError, TypeError, AttributeError
        ):  # only to tell that one will wait
            used = (
                self.ask("/api/cluster_status")["data"]["clusterStatus"]["loadMetricsReport"][
                    "usageByNode"
                ]
                or {}
            )
        return [
            Node(
                node["node_ip"],
                total := node["resources_total"],
                free_of(total, used.get(node["node_id"], {})),
            )
            for node in found
            if node["state"] == "ALIVE"
        ]


def free_of(total: Mapping[str, float], used: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return what of `total` is free, `used` being [used, total] of some of it. Pure."""
    return {name: count - (used[name][0] if name in used else 0.0) for name, count in total.items()}


def version_problem(theirs: tuple[str, str | None], ray: str, python: str = HERE) -> str | None:
    """Return what is wrong with a cluster's (Ray, Python) for a client with `ray` and `python`. Pure."""
    there, python_there = theirs
    if _pair(there) < OLDEST_RAY:
        return (
            f"Ray {there} runs there, which is too old; {OLDEST_RAY[0]}.{OLDEST_RAY[1]} or newer is needed, best "
            f"{ray} as here; renew the cluster's image"
        )
    remedy = "use the same here and there, or say --any-version"
    if _pair(there) != _pair(ray):
        return f"Ray {there} runs there, and Ray {ray} here; {remedy}"
    if python_there and _pair(python_there) != _pair(python):
        return f"Python {python_there} runs there, and Python {python} here; {remedy}"
    return None


def room_problem(nodes: Sequence[Node], config: RunConfig) -> tuple[str | None, str | None]:
    """Return why the workers never find room on `nodes`, and why they do not now; None where they do. Pure."""
    each, need = resources(config), config.min_workers
    share = ", ".join(f"{count:g} {name}" for name, count in each.items())
    wanted = f"{need} worker{'s' * (need > 1)} with {share} each"
    has = ", ".join(f"{sum(node.total.get(name, 0) for node in nodes):g} {name}" for name in each)
    if (fit := places([node.total for node in nodes], each)) < need:
        return (
            f"cluster.workers={need}: {wanted} are wanted, and the cluster ({len(nodes)} nodes, {has}) has room "
            f"for {fit}; lower cluster.workers, add nodes, or set cluster.wait_for_nodes=true if an autoscaler "
            "will"
        ), None
    if (now := places([node.free for node in nodes], each)) < need:
        return None, (
            f"{wanted} are wanted, and there is room for {now} now: others use the cluster; the run waits "
            f"for them up to cluster.start_timeout_s={config.cluster.start_timeout_s:g} s"
        )
    return None, None


def places(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Return how many workers that need `each` fit on nodes that have so much. Pure."""
    return sum(
        min(math.floor(node.get(name, 0) / count + 1e-9) for name, count in each.items() if count)
        for node in nodes
    )


def are_here(nodes: Sequence[Node]) -> bool:
    """Tell whether all nodes are this machine (a forwarded port of a cluster elsewhere is not)."""
    return bool(nodes) and all(_is_own(node.ip) for node in nodes)


def _is_own(ip: str) -> bool:
    with socket.socket(
        socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM
    ) as probe:
        try:
            probe.bind((ip, 0))
        except OSError:
            return False
    return True


def _pair(version: str) -> tuple[int, int]:
    numbers = [
        int("".join(filter(str.isdigit, part)) or 0) for part in f"{version}.0".split(".")[:2]
    ]
    return numbers[0], numbers[1]


def _why(error: Exception) -> str:
    text = str(error)
    return (
        "connection refused"
        if "refused" in text
        else "no answer in time"
        if "timed out" in text.lower()
        else "no such host"
        if "resolve" in text or "Name or service" in text
        else type(error).__name__
    )
