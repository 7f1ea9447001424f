"""Builds the Ray trainer of a run, its controller callback, and the coordinator's client.

Together with `driver`, which runs the trainer, the only module that uses Ray Train. It decides
nothing: `placement` and `preemption` do.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Container
from typing import Any, TypedDict

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.cluster import NODE_ID_LABEL
from dist_ft.core import fault_injection
from dist_ft.runtime.elastic.messages import LineKind
from dist_ft.runtime.elastic.preemption import PreemptionSaver
from dist_ft.runtime.ray_backend.left_out_nodes import num_possible_workers, selectors
from dist_ft.runtime.ray_backend.node_names import failed_nodes, matching_nodes
from dist_ft.runtime.ray_backend.node_watch import recount_nodes
from dist_ft.runtime.ray_backend.placement import (
    LOST_S,
    assign_nodes,
    has_labels,
    num_workers_that_fit,
    worker_resources,
)
from dist_ft.storage import filesystem

POLL_S = 0.5
NAMESPACE = "dist_ft"
RAY_STATE_FILE = "checkpoint_manager_snapshot.json"
CONTROLLER_WATCH = "PlacementGroupCleanerCallback"
"""Ray Train's watch over its own controller. It connects to whichever Ray it finds on the
machine. If that is another one, perhaps of another user, it has no such controller, and the
workers of a healthy run are ended. It is not needed: the resources of a run are freed when its
driver ends."""


class WorkerSettings(TypedDict):
    """What each Ray Train worker receives.

    Attributes:
        config: the run's config as JSON data.
        coordinator: name of the coordinator actor.
        folder: the driver's working directory.
        failpoints: environment variables of fault injection; a cluster's nodes have their own
            environment.
    """

    config: dict[str, Any]
    coordinator: str
    folder: str
    failpoints: dict[str, str]


def create_trainer(
    config: RunConfig, coordinator_name: str, worker_loop: Callable[[WorkerSettings], None]
) -> Any:
    """Return the Ray trainer of a run, whose workers run `worker_loop`.

    Its experiment folder is the run's own, because Ray accepts our checkpoints there.
    """
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig

    cluster = config.cluster
    store = filesystem.Store(config.run_url)
    store.remove(RAY_STATE_FILE)  # Ray's memory of an earlier start; storage is the truth

    # Ray appends the run's name to this path, which gives the run's own folder.
    arrow_fs, path = filesystem.arrow_filesystem(filesystem.Store(config.run.storage).url)
    is_local = filesystem.is_local(config.run.storage)

    # A pair makes Ray Train elastic; a number is a fixed size.
    num_workers: Any = cluster.workers
    if not isinstance(cluster.workers, int):
        num_workers = (config.min_workers, config.max_workers)

    settings = WorkerSettings(
        config=config.model_dump(mode="json"),
        coordinator=coordinator_name,
        folder=os.getcwd(),
        failpoints=fault_injection.environment(),
    )
    return _trainer_class(coordinator_name, config)(
        worker_loop,
        train_loop_config=settings,
        backend_config=_backend_config(),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            elastic_resize_monitor_interval_s=cluster.resize_interval_s,  # type: ignore[call-arg]  # mypy sees v1
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=worker_resources(config),
            placement_strategy=cluster.placement,
            label_selector=cluster.labels or None,
        ),
        run_config=RayRunConfig(
            name=config.run.name,
            storage_path=path,
            storage_filesystem=None if is_local else arrow_fs,
            # The coordinator counts failures, because it knows of progress.
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(),
            callbacks=[_controller_callback(coordinator_name, config)],
        ),
    )


def _trainer_class(coordinator_name: str, config: RunConfig) -> type[Any]:
    """Return Ray's trainer without its watch over the controller, and with our count of workers.

    Not a TorchTrainer: its workers would import torch, which only the training processes need.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class _Trainer(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            # By name: a Ray without this class still works.
            return [
                callback
                for callback in super()._create_default_callbacks()
                if type(callback).__name__ != CONTROLLER_WATCH
            ]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            # The policy of an elastic run; with a Ray that names it otherwise, nodes that are left
            # out count as usable, and a placement that fails is tried again.
            policy = arguments.get("scaling_policy")
            may_leave_out = config.cluster.exclude_node_after or config.cluster.avoid_nodes
            if may_leave_out and hasattr(policy, "_count_possible_workers"):
                arguments["scaling_policy"] = _elastic_policy(policy, coordinator_name, config)
            return super()._initialize_and_run_controller(**arguments)

    return _Trainer


def _elastic_policy(policy: Any, coordinator_name: str, config: RunConfig) -> Any:
    """Return Ray's elastic policy, which counts no workers on nodes that are left out."""

    class _Policy(type(policy)):  # type: ignore[misc]
        def __init__(self, scaling_config: Any) -> None:
            super().__init__(scaling_config)
            self.own_workers: Counter[str] = Counter()

        def make_decision_for_non_running_worker_group(self) -> Any:
            self.own_workers = Counter()
            return super().make_decision_for_non_running_worker_group()

        def make_decision_for_running_worker_group(
            self, worker_group_state: Any, worker_group_status: Any
        ) -> Any:
            workers = worker_group_state.workers
            self.own_workers = Counter(worker.metadata.node_id for worker in workers)
            return super().make_decision_for_running_worker_group(
                worker_group_state=worker_group_state, worker_group_status=worker_group_status
            )

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            left_out = _left_out_ids(coordinator_name, config)
            if not left_out:
                return int(super()._count_possible_workers(reserved_resources))

            per_worker = worker_resources(config)
            reserved = {
                node: num_workers_that_fit(resources, per_worker)
                for node, resources in reserved_resources.items()
            }
            free = _free_capacities(config)
            for node, count in self.own_workers.items():
                free[node] = free.get(node, 0) + count
            return num_possible_workers(reserved, free, left_out, config.max_workers)

    return _Policy(policy.scaling_config)


def _find_coordinator(name: str) -> ActorClient:
    import ray

    return ActorClient(ray.get_actor(name, namespace=NAMESPACE))


def _left_out_ids(coordinator_name: str, config: RunConfig) -> set[str]:
    """Return the ids of the nodes that get no workers now."""
    import ray

    failed: list[str] = []
    if config.cluster.exclude_node_after:
        # If the coordinator has ended, so has the run.
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            failed = _find_coordinator(coordinator_name).left_out()

    if not failed and not config.cluster.avoid_nodes:
        return set()
    nodes = ray.nodes()
    avoided = matching_nodes(nodes, frozenset(config.cluster.avoid_nodes))
    return avoided | failed_nodes(nodes, failed)


def _free_capacities(config: RunConfig) -> dict[str, int]:
    """Return how many workers fit into what is free on each node with the labels of the config."""
    import ray

    free = ray._private.state.available_resources_per_node()
    capacities = {}
    for node in ray.nodes():
        if node["Alive"] and has_labels(node.get("Labels") or {}, config.cluster.labels):
            free_here = free.get(node["NodeID"], {})
            capacities[node["NodeID"]] = num_workers_that_fit(free_here, worker_resources(config))
    return capacities


def _backend_config() -> Any:
    """Return a backend whose training processes reach each other's GPUs on their node."""
    from ray.train.backend import Backend, BackendConfig

    class _SharedGpus(Backend):
        # NCCL copies between GPUs of a node directly only if each process sees both.
        share_cuda_visible_devices = True

    class _SharedGpusConfig(BackendConfig):
        backend_cls = _SharedGpus

    return _SharedGpusConfig()


def _controller_callback(coordinator_name: str, config: RunConfig) -> Any:
    """Return the callback in Ray Train's controller.

    It has the run save when the controller knows that workers will end. After a failure it keeps
    Ray from waiting for new workers on a lost node, and reports which workers were lost. It keeps
    workers off the nodes that are left out; with cluster.workers_per_node it chooses each worker's
    node.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.controller import state as states

    def get_coordinator() -> ActorClient:
        return _find_coordinator(coordinator_name)

    class _Callback(ControllerCallback, WorkerGroupCallback):
        saver = PreemptionSaver(get_coordinator)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, states.PreemptingState):
                self.saver.on_preemption(current_state.preemption_info, time.time())
            elif isinstance(current_state, states.ResizingState):
                self.saver.save_before_resize()
            elif isinstance(current_state, states.RestartingState):
                _report_lost_workers(coordinator_name, current_state.training_failed_error)

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
            import ray

            # Before the decision: it requests workers for the nodes that Ray believes to be free.
            recount_nodes(ray)

        def before_worker_group_start(self, worker_group_context: Any) -> None:
            left_out = _left_out_ids(coordinator_name, config)
            num_workers = worker_group_context.num_workers
            if config.cluster.workers_per_node:
                chosen = _node_selectors(config, num_workers, left_out)
            elif left_out:
                chosen = [selectors(config, left_out)] * num_workers
            else:
                return

            # A frozen dataclass, but not one with slots.
            object.__setattr__(worker_group_context, "label_selector", chosen)

    return _Callback()


def _report_lost_workers(coordinator_name: str, error: Any) -> None:
    """Report the ranks of workers whose Ray process or node was lost."""
    import ray

    # Supervisors that end by themselves raise other errors.
    failures = getattr(error, "worker_failures", None) or {}
    died = ray.exceptions.RayActorError
    lost = [rank for rank, cause in failures.items() if isinstance(cause, died)]
    if lost:
        with contextlib.suppress(Exception):  # it only names the loss
            _find_coordinator(coordinator_name).report_lost_workers(sorted(lost))


def _node_selectors(
    config: RunConfig, num_workers: int, left_out: Container[str]
) -> list[dict[str, str]]:
    """Wait for nodes with room for cluster.workers_per_node; return each worker's selector."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    until = time.monotonic() + config.cluster.start_timeout_s
    while True:
        # What is free now: workers of this run that are about to end may still hold resources,
        # so this waits.
        free = _free_capacities(config)
        capacities = {node: count for node, count in free.items() if node not in left_out}
        nodes = assign_nodes(capacities, num_workers, config.cluster.workers_per_node)
        if nodes is not None:
            return [{**config.cluster.labels, NODE_ID_LABEL: node} for node in nodes]

        # Ray's own error, after which it plans the group again, perhaps with fewer workers.
        if time.monotonic() > until:
            raise WorkerGroupStartupTimeoutError(num_workers)
        time.sleep(POLL_S)


class ActorClient:
    """Calls the coordinator's methods and waits for results; lines are sent without waiting."""

    def __init__(self, actor: Any) -> None:
        import ray

        self._ray, self._actor = ray, actor

    def add_line(self, kind: LineKind, text: str) -> None:
        """Send a line for the driver."""
        # Without waiting: output must not hold up a supervisor, and a lost line costs little.
        self._actor.add_line.remote(kind, text)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            until = time.monotonic() + LOST_S
            while True:
                try:
                    return self._ray.get(getattr(self._actor, name).remote(*args))
                except self._ray.exceptions.ActorUnavailableError:
                    # The network is interrupted, perhaps for a moment.
                    if time.monotonic() > until:
                        raise
                    time.sleep(POLL_S)

        return call


def checkpoint_reporter() -> Callable[[str, dict[str, float]], None]:
    """Return a function that reports a checkpoint in storage to Ray, without copying it."""

    def report_checkpoint(url: str, metrics: dict[str, float]) -> None:
        from ray.train import Checkpoint, CheckpointUploadMode, report

        # Without a file system Ray takes the path as local.
        arrow_fs, path = filesystem.arrow_filesystem(url)
        checkpoint = Checkpoint(path, None if filesystem.is_local(url) else arrow_fs)

        # The checkpoint is committed already; Ray would copy it to its own folder.
        report(
            metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
        )

    return report_checkpoint
