"""What Ray Train is asked for: the trainer of a run, what lives in its controller, and the way to the relay.

Beside `ray_train`, which runs it, the only module that uses Ray Train. Decides nothing: `placing` and `preemption` do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from dist_ft.config.checks.cluster import NODE_ID
from dist_ft.config.schema import RunConfig
from dist_ft.core import fault_injection
from dist_ft.runtime.elastic.preemption import Saves
from dist_ft.runtime.ray_backend.node_watch import count_anew
from dist_ft.runtime.ray_backend.placement import LOST_S, by_node, has_labels, resources, rooms
from dist_ft.storage import filesystem

POLL_S = 0.5
NAMESPACE = "dist_ft"
SNAPSHOT = "checkpoint_manager_snapshot.json"
CLEANER = "PlacementGroupCleanerCallback"
"""Ray Train's watch over its own controller. It asks whichever Ray it finds on the machine: another one, perhaps
somebody else's, knows of no such controller, and the workers of a sound run are ended. Not needed: what a run holds is
freed with its driver."""


def trainer(config: RunConfig, relay_name: str, work: Callable[[dict[str, Any]], None]) -> Any:
    """Return the Ray trainer of a run, whose workers do `work`.

    Its experiment folder is the run's own: Ray accepts our checkpoints there.
    """
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class _Shared(Backend):
        share_cuda_visible_devices = (
            True  # the training processes of a node reach each other's GPUs
        )

    class _SharedConfig(BackendConfig):
        backend_cls = _Shared

    class _Trainer(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            return [
                one for one in super()._create_default_callbacks() if type(one).__name__ != CLEANER
            ]

    cluster = config.cluster
    store = filesystem.Store(config.run_url)
    store.remove(SNAPSHOT)  # Ray's memory of an earlier start; storage is the truth
    arrow_fs, path = filesystem.arrow_filesystem(filesystem.Store(config.run.storage).url)
    local = filesystem.is_local(config.run.storage)
    num_workers: Any = (
        cluster.workers
        if isinstance(cluster.workers, int)
        else (config.min_workers, config.max_workers)
    )
    return _Trainer(  # not a TorchTrainer: its workers would import torch, which the processes do
        work,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "relay": relay_name,
            "folder": os.getcwd(),
            "failpoints": fault_injection.environment(),
        },  # a cluster has its own environment
        backend_config=_SharedConfig(),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            elastic_resize_monitor_interval_s=cluster.resize_interval_s,  # type: ignore[call-arg]  # mypy sees v1
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources(config),
            placement_strategy=cluster.placement,
            label_selector=cluster.labels or None,
        ),
        run_config=RayRunConfig(
            name=config.run.name,
            storage_path=path,
            storage_filesystem=None if local else arrow_fs,
            failure_config=FailureConfig(
                max_failures=-1
            ),  # counted by the relay, which knows of progress
            checkpoint_config=CheckpointConfig(),
            callbacks=[_callback(relay_name, config)],
        ),
    )


def _callback(relay_name: str, config: RunConfig) -> Any:
    """Return what lives in Ray Train's controller: it has the run save when that knows that workers will end.

    When they have failed, it sees to it that new ones are not waited for on a node that is lost. With
    cluster.workers_per_node it says which worker goes to which node.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.controller import state as states

    def relay() -> Called:
        import ray

        return Called(ray.get_actor(relay_name, namespace=NAMESPACE))

    class _Callback(ControllerCallback, WorkerGroupCallback):
        saves = Saves(relay)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, states.PreemptingState):
                self.saves.nodes_go(current_state.preemption_info, time.time())
            elif isinstance(current_state, states.ResizingState):
                self.saves.before_resize()

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
            import ray

            count_anew(ray)

        def before_worker_group_start(self, worker_group_context: Any) -> None:
            if config.cluster.workers_per_node:
                pins = _pinned(config, worker_group_context.num_workers)
                object.__setattr__(
                    worker_group_context, "label_selector", pins
                )  # a frozen dataclass, not a closed one

    return _Callback()


def _pinned(config: RunConfig, num_workers: int) -> list[dict[str, str]]:
    """Return the label selector of each worker: nodes that have room for cluster.workers_per_node, waited for."""
    import ray
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    until = time.monotonic() + config.cluster.start_timeout_s
    while True:
        free = ray._private.state.available_resources_per_node()
        nodes = {
            node["NodeID"]: rooms(free.get(node["NodeID"], {}), resources(config))
            for node in ray.nodes()
            if node["Alive"] and has_labels(node.get("Labels") or {}, config.cluster.labels)
        }
        places = by_node(nodes, num_workers, config.cluster.workers_per_node)
        if places is not None:
            return [{**config.cluster.labels, NODE_ID: place} for place in places]
        if time.monotonic() > until:
            raise WorkerGroupStartupTimeoutError(num_workers)
        time.sleep(POLL_S)


class Called:
    """The relay: its methods are called and waited for; lines (`put`) are sent on and not waited for."""

    def __init__(self, actor: Any) -> None:
        import ray

        self._ray, self._actor = ray, actor

    def put(self, kind: str, text: str) -> None:
        """Send a line on."""
        self._actor.put.remote(kind, text)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            until = time.monotonic() + LOST_S
            while True:
                try:
                    return self._ray.get(getattr(self._actor, name).remote(*values))
                except (
                    self._ray.exceptions.ActorUnavailableError
                ):  # the way there is cut, perhaps for a moment
                    if time.monotonic() > until:
                        raise
                    time.sleep(POLL_S)

        return call


def reporter(config: RunConfig) -> Callable[[str, dict[str, float]], None]:
    """Return the hook that tells Ray of a checkpoint that already lies in storage."""

    def committed(url: str, metrics: dict[str, float]) -> None:
        from ray.train import Checkpoint, CheckpointUploadMode, report

        arrow_fs, path = filesystem.arrow_filesystem(url)
        checkpoint = Checkpoint(path, None if filesystem.is_local(url) else arrow_fs)
        report(
            metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
        )

    return committed
