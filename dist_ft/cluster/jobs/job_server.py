"""The job server of a Ray cluster (its dashboard) over HTTP: its jobs, versions and nodes.

Guarantees: every request has a time limit; an error is one line that names the address and the
remedy; the token (`ray_token`) is never shown. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict
from urllib.parse import quote, urlsplit

from dist_ft.cluster.jobs.ray_token import TOKEN_HELP, find_token
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, WorkerError
from dist_ft.core.json_documents import decode_json
from dist_ft.core.logs import redact
from dist_ft.core.secret_forms import url_spans
from dist_ft.runtime.ray_backend.placement import worker_resources

DEFAULT_URL = "http://127.0.0.1:8265"
REQUEST_TIMEOUT_S = 30.0
OLDEST_RAY = (2, 60)
"""The minimum version of Ray, as in pyproject.toml."""
OWN_PYTHON = ".".join(map(str, sys.version_info[:2]))


class UnreachableError(WorkerError):
    """No server answers at the address, perhaps for a moment."""


class UnknownJobError(WorkerError):
    """The cluster has no job of this name."""


class JobInfo(TypedDict, total=False):
    """A job as the server describes it.

    Attributes:
        submission_id: the job's name.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        driver_exit_code: exit code of its command (negative: signal); None while it runs.
        message: why it did not start.
        entrypoint: its shell command.
        metadata: metadata as submitted.
        runtime_env: runtime environment as submitted.
        start_time: milliseconds since the epoch.
    """

    submission_id: str
    status: str
    driver_exit_code: int | None
    message: str | None
    entrypoint: str
    metadata: dict[str, str] | None
    runtime_env: dict[str, Any] | None
    start_time: int | None


class Versions(NamedTuple):
    """Versions on a cluster; `python` is None if it is not known."""

    ray: str
    python: str | None


@dataclass(frozen=True)
class Node:
    """A live node: its address, its resources (Ray's names: CPU, GPU, ...), the free ones."""

    ip: str
    total: Mapping[str, float]
    free: Mapping[str, float]


class CapacityCheck(NamedTuple):
    """Whether a run's workers fit on a cluster.

    Attributes:
        problem: why they never do; None: they do.
        wait_notice: why the run will wait for resources first; None: it will not.
    """

    problem: str | None = None
    wait_notice: str | None = None


def resolve_url(address: str | None) -> str:
    """Return the job server's URL: `address`, else of the environment, else of this machine.

    Raises:
        ConfigError: it is not the URL of a job server.
    """
    # RAY_ADDRESS is also where `ray.init` connects: then it is HOST:6379, which is no job server
    default = DEFAULT_URL
    ray_address = os.environ.get("RAY_ADDRESS", "")
    if ray_address.startswith("http"):
        default = ray_address
    url = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or default).rstrip("/")

    # Other users of this machine see the arguments of a command; and it is sent to Ray's logs.
    if address and (any(url_spans(address)) or "@" in address):
        raise ConfigError(
            [
                "--address: holds a user name, password or token. Allowed: http://HOST:8265 (or "
                f"https://...) without one. {TOKEN_HELP}"
            ],
            "submit",
        )

    # `parts.port` raises ValueError for what is not a port number
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url

    raise ConfigError(
        [
            f"--address={redact(url)}: not the URL of a job server. Use http://HOST:8265 (or "
            "https://...) of the cluster's head, not Ray's own port (6379) and not ray://."
        ],
        "submit",
    )


class Server:
    """A job server.

    Attributes:
        url: its URL.
        display_url: the URL without credentials.
        headers: HTTP headers with the token.
    """

    def __init__(self, url: str) -> None:
        """Use the URL from `resolve_url`; nothing is requested yet."""
        self.url = url
        self.display_url = redact(url)
        self.headers: dict[str, str] = {}

        token = find_token()
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def request(self, path: str, method: str = "GET") -> Any:
        """Return the JSON answer.

        Raises:
            UnreachableError: no server answers.
            UnknownJobError: there is no such job.
            WorkerError: the token is refused, or this is no job server.
        """
        import requests

        try:
            answer = requests.request(
                method, self.url + path, headers=self.headers, timeout=REQUEST_TIMEOUT_S
            )
        except (requests.RequestException, ValueError) as error:
            # ValueError: a token or a URL that HTTP cannot carry
            raise UnreachableError(
                f"--address={self.display_url}: no job server of Ray answers there "
                f"({_connection_problem(error)}). Check that the cluster runs, its port (8265) and "
                "a port-forward if you use one, or start a cluster here: ./launch/cluster.sh start"
            ) from error

        self._require_access(answer.status_code)
        # on any other path, 404 means that this is no job server
        if answer.status_code == 404 and path.startswith("/api/jobs/"):
            name = path.split("/")[3]
            raise UnknownJobError(
                f"{name}: no such job at {self.display_url}. See dist-ft jobs list."
            )

        try:
            answer.raise_for_status()
            return decode_json(answer.content)
        except (requests.RequestException, ValueError) as error:
            # ValueError: a web page in place of JSON
            raise WorkerError(
                f"--address={self.display_url}: answers {answer.status_code} to {path}, as no job "
                "server of Ray does. Check the address, and that Ray 2.60 or newer runs there."
            ) from error

    def _require_access(self, status_code: int) -> None:
        if status_code in (401, 403):
            problem = "it requires a token, and none was found"
            if self.headers:
                problem = "the token was rejected: it belongs to another cluster or is outdated"
            raise WorkerError(f"--address={self.display_url}: {problem}. {TOKEN_HELP}")

        if status_code in (502, 503, 504):
            raise UnreachableError(
                f"--address={self.display_url}: the proxy in front of the job server answers "
                f"{status_code}. Wait until the cluster is up."
            )

    def jobs(self) -> list[JobInfo]:
        """Return all submitted jobs that the cluster knows."""
        # the list also has drivers that connected by themselves; they have no submission id
        return [job for job in self.request("/api/jobs/") if job.get("submission_id")]

    def job(self, name: str) -> JobInfo:
        """Return one job; raises UnknownJobError."""
        job: JobInfo = self.request(f"/api/jobs/{quote(name, safe='')}")
        return job

    def log(self, name: str) -> str:
        """Return a job's complete log so far."""
        return self.request(f"/api/jobs/{quote(name, safe='')}/logs").get("logs") or ""

    def stop(self, name: str) -> None:
        """Send a stop signal to the job's processes."""
        self.request(f"/api/jobs/{quote(name, safe='')}/stop", "POST")

    def versions(self) -> Versions:
        """Return the versions of Ray and Python there."""
        ray = str(self.request("/api/version").get("ray_version", "0"))
        if _major_minor(ray) < OLDEST_RAY:
            return Versions(ray, None)  # an old Ray does not report more

        metadata = self.request("/api/v0/cluster_metadata")["data"]
        return Versions(ray, metadata.get("pythonVersion"))

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive."""
        # without a limit, the state API returns 100 nodes
        states = self.request("/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        usage = self._usage_by_node()

        nodes = []
        for state in states:
            if state["state"] == "ALIVE":
                total = state["resources_total"]
                free = free_resources(total, usage.get(state["node_id"], {}))
                nodes.append(Node(state["node_ip"], total, free))

        return nodes

    def _usage_by_node(self) -> Any:
        """Return {node id: {resource: [used, total]}}, or {} if that is not known."""
        # Not a public API: if its answer has another form, all resources count as free.
        with contextlib.suppress(WorkerError, KeyError, TypeError, AttributeError):
            status = self.request("/api/cluster_status")["data"]["clusterStatus"]
            return status["loadMetricsReport"]["usageByNode"] or {}
        return {}


def free_resources(
    total: Mapping[str, float], usage: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Return how much of `total` is free; `usage` is [used, total] of some of the resources."""
    free = {}
    for name, count in total.items():
        used = 0.0
        if name in usage:
            used = usage[name][0]
        free[name] = count - used
    return free


def find_version_problem(
    cluster: Versions | tuple[str, str | None], ray: str, python: str = OWN_PYTHON
) -> str | None:
    """Return what is wrong with a cluster's versions for a client with these, or None."""
    cluster_ray, cluster_python = cluster
    if _major_minor(cluster_ray) < OLDEST_RAY:
        return (
            f"Ray {cluster_ray} runs there, which is too old. Ray {OLDEST_RAY[0]}.{OLDEST_RAY[1]} "
            f"or newer is needed, best {ray} as here. Update the cluster's image."
        )

    remedy = "Use the same version in both places, or pass --any-version."
    if _major_minor(cluster_ray) != _major_minor(ray):
        return f"Ray {cluster_ray} runs there, and Ray {ray} here. {remedy}"
    if cluster_python and _major_minor(cluster_python) != _major_minor(python):
        return f"Python {cluster_python} runs there, and Python {python} here. {remedy}"
    return None


def check_capacity(nodes: Sequence[Node], config: RunConfig) -> CapacityCheck:
    """Return whether the run's workers fit on `nodes`, and whether they do now."""
    # an elastic run starts with the fewest workers
    num_workers = config.min_workers
    per_worker = worker_resources(config)
    share = ", ".join(f"{count:g} {name}" for name, count in per_worker.items())
    plural = "s" if num_workers > 1 else ""
    needed = f"{num_workers} worker{plural} with {share} each"

    num_fit = count_workers_that_fit([node.total for node in nodes], per_worker)
    if num_fit < num_workers:
        totals = []
        for name in per_worker:
            total = sum(node.total.get(name, 0) for node in nodes)
            totals.append(f"{total:g} {name}")
        return CapacityCheck(
            problem=(
                f"cluster.workers={num_workers}: {needed} are needed, and the cluster "
                f"({len(nodes)} nodes, {', '.join(totals)}) has room for {num_fit}. Lower "
                "cluster.workers, add nodes, or set cluster.wait_for_nodes=true if an autoscaler "
                "adds them."
            )
        )

    # the cluster is large enough, but other jobs may use it at the moment
    num_fit_now = count_workers_that_fit([node.free for node in nodes], per_worker)
    if num_fit_now < num_workers:
        timeout = f"cluster.start_timeout_s={config.cluster.start_timeout_s:g}"
        return CapacityCheck(
            wait_notice=(
                f"{needed} are needed, and there is room for {num_fit_now} now, because others use "
                f"the cluster; the run waits for them up to {timeout} s"
            )
        )
    return CapacityCheck()


def count_workers_that_fit(
    nodes: Sequence[Mapping[str, float]], per_worker: Mapping[str, float]
) -> int:
    """Return how many workers that reserve `per_worker` fit on nodes with these resources."""
    num_workers = 0
    for node in nodes:
        num_by_resource = []
        for name, count in per_worker.items():
            if count:
                # 0.3 CPUs hold three workers of 0.1, but 0.3 / 0.1 is below 3 in floating point
                num_by_resource.append(math.floor(node.get(name, 0) / count + 1e-9))

        # the scarcest resource decides; what is left on one node does not help another
        num_workers += min(num_by_resource)
    return num_workers


def are_all_local(nodes: Sequence[Node]) -> bool:
    """Return whether all nodes are this machine (those behind a forwarded port are not)."""
    return bool(nodes) and all(_is_own_address(node.ip) for node in nodes)


def _is_own_address(ip: str) -> bool:
    # The system only binds a socket to an address of this machine. Nothing is sent.
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET

    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((ip, 0))
        except OSError:
            return False
    return True


def _major_minor(version: str) -> tuple[int, int]:
    # "3" and "3.0rc1" are versions too; what has no digits counts as 0, which is too old
    numbers = []
    for part in f"{version}.0".split(".")[:2]:
        digits = "".join(filter(str.isdigit, part))
        numbers.append(int(digits or 0))

    return numbers[0], numbers[1]


def _connection_problem(error: Exception) -> str:
    # requests gives the cause of a failed connection in its text only
    text = str(error)
    if "refused" in text:
        return "connection refused"
    if "timed out" in text.lower():
        return "no answer in time"
    if "resolve" in text or "Name or service" in text:
        return "no such host"
    return type(error).__name__
