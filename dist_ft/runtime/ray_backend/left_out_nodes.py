"""Which nodes get no workers: those that the config names, and those that failed too often.

The driver decides after each failure of a node (`NodeExclusion`) and reports the decision to the
coordinator; Ray Train's controller reads it there whenever it places workers. Guarantee: nodes that
failed are left out only as long as the others hold the smallest number of workers. Imports no Ray.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from dist_ft.checkpoint.attempt_records import AttemptRecord
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.cluster import NODE_ID_LABEL
from dist_ft.runtime.elastic.node_failures import NodeFailure, node_failures
from dist_ft.runtime.ray_backend.node_names import alive, failed_nodes, matching_nodes, node_name
from dist_ft.runtime.ray_backend.placement import (
    assign_nodes,
    has_labels,
    num_workers_that_fit,
    worker_resources,
)

log = logging.getLogger("dist_ft.ray")
WINDOW_S = 24 * 3600.0
"""Failures before this time do not count: nodes get repaired."""
RETURN_SHARE = 0.5
"""If no worker runs for this share of cluster.start_timeout_s, nodes that were left out are used
again; after all of it the driver gives up."""


def capacities_without(
    nodes: Iterable[Mapping[str, Any]], config: RunConfig, left_out: Container[str]
) -> dict[str, int]:
    """Return how many workers each node can hold that is not left out (by id)."""
    per_worker = worker_resources(config)
    capacities = {}
    for node in alive(nodes):
        is_allowed = has_labels(node.get("Labels") or {}, config.cluster.labels)
        if is_allowed and node["NodeID"] not in left_out:
            capacities[node["NodeID"]] = num_workers_that_fit(node["Resources"], per_worker)
    return capacities


def has_room(capacities: Mapping[str, int], num_workers: int, config: RunConfig) -> bool:
    """Return whether nodes with these capacities hold `num_workers` as the config places them."""
    if config.cluster.workers_per_node:
        per_node = config.cluster.workers_per_node
        return assign_nodes(capacities, num_workers, per_node) is not None

    if config.cluster.placement == "STRICT_SPREAD":
        return sum(capacity > 0 for capacity in capacities.values()) >= num_workers
    if config.cluster.placement == "STRICT_PACK":
        return max(capacities.values(), default=0) >= num_workers
    return sum(capacities.values()) >= num_workers


def choose_left_out(
    nodes: Sequence[Mapping[str, Any]],
    config: RunConfig,
    candidates: Sequence[str],
    avoided: Container[str] = (),
) -> list[str]:
    """Return which of the nodes `candidates` (ids, worst first) can be left out.

    The others must hold the smallest number of workers; `avoided` nodes hold none anyway.
    """
    capacities = capacities_without(nodes, config, avoided)
    left_out = []
    for node in candidates:
        remaining = {name: count for name, count in capacities.items() if name != node}
        if has_room(remaining, config.min_workers, config):
            left_out.append(node)
            capacities = remaining
    return left_out


def selectors(config: RunConfig, left_out: Iterable[str]) -> dict[str, str]:
    """Return Ray's label selector of every worker."""
    ids = sorted(left_out)
    if not ids or NODE_ID_LABEL in config.cluster.labels:
        return dict(config.cluster.labels)
    return {**config.cluster.labels, NODE_ID_LABEL: f"!in({', '.join(ids)})"}


def num_possible_workers(
    reserved: Mapping[str, int], free: Mapping[str, int], left_out: Container[str], most: int
) -> int:
    """Return how many workers an elastic run can have.

    Args:
        reserved: by node, how many workers fit into what Ray reserved for the run.
        free: by node, how many workers of the run are there or would fit into what is free.
        left_out: nodes that do not count. Ray reserves without regard to them, so what it reserved
            there is looked for among the free nodes.
        most: largest number of workers.
    """
    count = 0
    for node, capacity in reserved.items():
        if node not in left_out:
            count += capacity

    for node, capacity in free.items():
        if node not in left_out and node not in reserved:
            count += capacity
    return min(count, most)


class NodeExclusion:
    """Decides in the driver which nodes that failed get no more workers.

    `report` is called with the names of all nodes that are left out, whenever they change.
    """

    def __init__(
        self,
        ray: Any,
        config: RunConfig,
        report: Callable[[list[str]], None],
        earlier: Sequence[NodeFailure] = (),
    ) -> None:
        """Decide on failures before this start (`earlier`); call `check` for later ones."""
        self._ray = ray
        self._config = config
        self._report = report
        self._failures = list(earlier)
        self._left_out: list[str] = []
        self._left_out_at_s = 0.0
        self._logged: set[str] = set()
        if earlier and config.cluster.exclude_node_after:
            self._decide()

    def check(self, failures: Sequence[NodeFailure], silent_s: float | None) -> None:
        """Decide on new failures; use all nodes again if no worker ran for `silent_s`."""
        if failures and self._config.cluster.exclude_node_after:
            self._failures.extend(failures)
            self._decide()

        # The others may be busy, or lost since then.
        limit_s = RETURN_SHARE * self._config.cluster.start_timeout_s
        since_s = time.monotonic() - self._left_out_at_s
        is_waiting = silent_s is None or silent_s > limit_s
        if self._left_out and is_waiting and since_s > limit_s:
            log.warning(
                "no worker could be placed for %.0f s: %s is used again",
                since_s if silent_s is None else silent_s,
                ", ".join(self._left_out),
            )
            self._failures.clear()
            self._apply([])

    def _decide(self) -> None:
        limit = self._config.cluster.exclude_node_after
        kinds = defaultdict(list)
        for failure in self._failures:
            if time.time() - failure.at_s <= WINDOW_S:
                kinds[failure.node].append(failure.kind)

        # By id, as a host may have another name since then; the worst first.
        nodes = list(self._ray.nodes())
        candidates: dict[str, list[str]] = {}
        for name in sorted(kinds, key=lambda name: -len(kinds[name])):
            if len(kinds[name]) >= limit:
                for node in sorted(failed_nodes(nodes, [name])):
                    candidates.setdefault(node, kinds[name])

        avoided = matching_nodes(nodes, frozenset(self._config.cluster.avoid_nodes))
        left_out = choose_left_out(nodes, self._config, list(candidates), avoided)
        names = {node["NodeID"]: node_name(node) for node in nodes}
        for node, failures in candidates.items():
            self._log_once(names[node], failures, node in left_out)
        self._apply([names[node] for node in left_out])

    def _log_once(self, name: str, kinds: Sequence[str], is_left_out: bool) -> None:
        line = (
            f"node {name} failed {len(kinds)} times within a day ({', '.join(kinds)}; "
            f"cluster.exclude_node_after={self._config.cluster.exclude_node_after})"
        )
        if is_left_out:
            line += ": it is left out, and gets no more workers"
        else:
            line += (
                f", but without it there is no room for {self._config.min_workers} workers: it is "
                "used again"
            )
        if line not in self._logged:
            self._logged.add(line)
            log.warning("%s", line)

    def _apply(self, names: list[str]) -> None:
        if names != self._left_out:
            self._left_out, self._left_out_at_s = names, time.monotonic()
            self._report(names)


def earlier_failures(attempts: Iterable[AttemptRecord]) -> list[NodeFailure]:
    """Return the failures of nodes in the records of a run's attempts."""
    failures = []
    for attempt in attempts:
        if attempt.started_s is not None:
            failures.extend(node_failures(attempt.previous_end, attempt.started_s))
    return failures
