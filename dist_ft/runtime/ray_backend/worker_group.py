"""Builds the Ray trainer of a run, its controller callback, and the coordinator's client.

Together with `driver`, which runs the trainer, the only module that uses Ray Train. It decides
nothing: `placement` and `preemption` do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypedDict

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.cluster import NODE_ID_LABEL
from dist_ft.core import fault_injection
from dist_ft.runtime.elastic.messages import LineKind
from dist_ft.runtime.elastic.preemption import PreemptionSaver
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
    return _trainer_class()(
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


def _trainer_class() -> type[Any]:
    """Return Ray's trainer without its watch over the controller.

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

    return _Trainer


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
    Ray from waiting for new workers on a lost node. With cluster.workers_per_node it chooses each
    worker's node.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.controller import state as states

    def get_coordinator() -> ActorClient:
        import ray

        return ActorClient(ray.get_actor(coordinator_name, namespace=NAMESPACE))

    class _Callback(ControllerCallback, WorkerGroupCallback):
        saver = PreemptionSaver(get_coordinator)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, states.PreemptingState):
                self.saver.on_preemption(current_state.preemption_info, time.time())
            elif isinstance(current_state, states.ResizingState):
                self.saver.save_before_resize()

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
            import ray

            # Before the decision: it requests workers for the nodes that Ray believes to be free.
            recount_nodes(ray)

        def before_worker_group_start(self, worker_group_context: Any) -> None:
            if config.cluster.workers_per_node:
                selectors = _node_selectors(config, worker_group_context.num_workers)
                # A frozen dataclass, but not one with slots.
                object.__setattr__(worker_group_context, "label_selector", selectors)

    return _Callback()


def _node_selectors(config: RunConfig, num_workers: int) -> list[dict[str, str]]:
    """Wait for nodes with room for cluster.workers_per_node; return each worker's selector."""
    import ray
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    until = time.monotonic() + config.cluster.start_timeout_s
    while True:
        # What is free now: workers of this run that are about to end may still hold resources,
        # so this waits.
        free = ray._private.state.available_resources_per_node()
        capacities = {}
        for node in ray.nodes():
            if node["Alive"] and has_labels(node.get("Labels") or {}, config.cluster.labels):
                free_here = free.get(node["NodeID"], {})
                capacities[node["NodeID"]] = num_workers_that_fit(
                    free_here, worker_resources(config)
                )

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
