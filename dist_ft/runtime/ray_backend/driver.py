"""Trains on Ray workers; together with `worker_group` the only module that does.

The driver connects to a cluster or starts its own, has Ray Train place the workers, prints the
workers' output and errors on this terminal, and forwards stop requests from this terminal to the
workers. Each worker supervises a training process (`elastic.supervisor`). The supervisors recover
from a failed process without Ray; Ray replaces a lost worker or node. The state of a run is always
read from its storage, never from Ray's memory.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dist_ft.checkpoint.attempt_records import read_attempts
from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import allow_task
from dist_ft.core import logs
from dist_ft.core.errors import DistFtError, StorageError, WorkerError
from dist_ft.core.output import redact_output
from dist_ft.core.world import World
from dist_ft.runtime.bootstrap.rendezvous import loopback_address
from dist_ft.runtime.elastic.coordinator import Coordinator, print_lines
from dist_ft.runtime.elastic.node_failures import NodeFailure
from dist_ft.runtime.elastic.supervisor import (
    NodeLeftOutError,
    RendezvousTimeoutError,
    Supervisor,
    WorkerContext,
)
from dist_ft.runtime.local import stop_on_signal
from dist_ft.runtime.ray_backend import implicit_uploads, local_cluster
from dist_ft.runtime.ray_backend.gpu_watch import GpuWatch
from dist_ft.runtime.ray_backend.health import HealthWatch
from dist_ft.runtime.ray_backend.left_out_nodes import NodeExclusion, earlier_failures
from dist_ft.runtime.ray_backend.metrics import RunGauges
from dist_ft.runtime.ray_backend.node_watch import NodeWatch
from dist_ft.runtime.ray_backend.placement import (
    error_line,
    explain_ray_failure,
    gpu_index,
    reason_to_stop_waiting,
    require_resources,
)
from dist_ft.runtime.ray_backend.worker_group import (
    NAMESPACE,
    POLL_S,
    ActorClient,
    WorkerSettings,
    checkpoint_reporter,
    create_trainer,
)
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import Console
from dist_ft.training.notify.monitor import RunMonitor, monitor_run
from dist_ft.training.result import Result

log = logging.getLogger("dist_ft.ray")
MAX_ATTEMPTS = 200
"""Earlier attempts whose failures of nodes are looked at."""
ELASTIC_START_S = 5.0
"""How long an elastic run waits for the workers of one attempt to start: a lost node may still
be counted as free, and the next attempt asks for fewer workers."""


def run(config: RunConfig) -> Result:
    """Run `config` on Ray workers and return its result; send the notices of `log.notify`.

    Raises:
        DistFtError: the run ended without a result; the text is one clear line.
    """
    logs.setup_logging(level=config.log.level)
    filesystem.configure(config.storage.options)
    with monitor_run(config) as monitor:
        result = _run(config, monitor)
        monitor.report_result(result)
        return result


def _run(config: RunConfig, monitor: RunMonitor) -> Result:
    with connected(config) as ray:
        require_resources(ray, config)
        name = f"coordinator-{os.getpid()}-{time.time_ns()}"

        # The actor lives as long as this reference to it.
        limits = (config.cluster.max_failures, config.cluster.exclude_node_after)
        actor = _start_coordinator(ray, name, *limits)
        coordinator = ActorClient(actor)

        try:
            trainer = create_trainer(config, name, _worker)
            watches = _Watches(
                HealthWatch(monitor),
                NodeWatch(ray),
                _node_exclusion(ray, config, coordinator),
                GpuWatch(ray, config),
            )
            failure = _fit(config, coordinator, trainer, watches)

            # While Ray is connected: the actor ends with the connection.
            outcome = coordinator.outcome()
        except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError) as error:
            raise WorkerError(
                "the coordinator process of this run was lost (perhaps killed because memory ran "
                "out); saved checkpoints are kept; run the same command to resume"
            ) from error

        # The coordinator's outcome counts before Ray's error, which may be only its consequence.
        # Raised here: Ray's logs are kept where there is an error.
        if isinstance(outcome, DistFtError):
            raise outcome
        if outcome is not None:
            return outcome
        raise explain_ray_failure(failure, config, local_cluster.logs_folder(ray))


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[Any]:
    """Connect to the cluster of the config or the environment, or start a temporary one."""
    _set_ray_variables(config)
    import ray

    # A caller's own connection stays as it is, and open.
    if ray.is_initialized():
        yield ray
        return

    is_verbose = config.log.level == "debug"
    _connect(ray, config.cluster.address or os.environ.get("RAY_ADDRESS"), is_verbose)

    notices: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not is_verbose:
        notices = _short_ray_notices()
    with notices, local_cluster.shut_down_at_end(ray):
        yield ray


def _set_ray_variables(config: RunConfig) -> None:
    """Set what Ray reads when it is imported."""
    implicit_uploads.forbid()

    # The behavior of later Ray versions, without the notice that earlier ones print about it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

    # Ray may wait for a node that was lost; an elastic run then tries with fewer workers.
    start_timeout_s = config.cluster.start_timeout_s
    if config.min_workers < config.max_workers:
        start_timeout_s = min(start_timeout_s, ELASTIC_START_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout_s)

    # Ray's default is 5 s, which is much of a short notice.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")

    # Relative paths mean the same in a worker as here.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"


def _connect(ray: Any, address: str | None, is_verbose: bool) -> None:
    options: dict[str, Any] = {
        "log_to_driver": is_verbose,
        "namespace": NAMESPACE,
        "logging_level": logging.INFO if is_verbose else logging.ERROR,
    }
    try:
        if address:
            ray.init(address=address, **options)
        else:
            local_cluster.start(ray, **options)
    except Exception as error:  # Ray raises that class itself where a node does not start in time
        raise WorkerError(
            f"cluster.address={address}: cannot connect to Ray ({error_line(error, 0)}); check "
            "that a cluster with this Ray version runs there, or leave cluster.address "
            "empty to start one"
        ) from error


@contextlib.contextmanager
def _short_ray_notices() -> Iterator[None]:
    """Log Ray's notice of a lost node as one line, without the node's state and last log.

    This uses no public part of Ray; with a Ray that lacks that part, notices are printed in full.
    """
    logged: set[str] = set()

    def log_first_lines(batch: dict[str, Any]) -> None:
        # Ray repeats a notice; it is logged once.
        first_lines = {str(text).strip().split("\n")[0][:200] for text in batch["lines"]}
        for line in first_lines - logged:
            logged.add(line)
            log.warning("Ray: %s", line)

    dispatcher: Any = None
    with contextlib.suppress(Exception):
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        dispatcher.remove_handler("ray_print_logs")
        dispatcher.add_handler(__name__, log_first_lines)

    try:
        yield
    finally:
        if dispatcher is not None:
            dispatcher.remove_handler(__name__)


@dataclass(frozen=True)
class _Watches:
    """What the driver looks at while the workers train."""

    health: HealthWatch
    nodes: NodeWatch
    exclusion: NodeExclusion
    gpus: GpuWatch

    def check(self, config: RunConfig, coordinator: ActorClient) -> None:
        """Look once."""
        self.gpus.check(coordinator.rank_0_silent_s() is not None)
        self.health.check(coordinator.health())
        if config.cluster.exclude_node_after:
            failures = coordinator.take_node_failures()
            self.exclusion.check(failures, coordinator.rank_0_silent_s())
        if config.min_workers < config.max_workers:
            self.nodes.check()


def _node_exclusion(ray: Any, config: RunConfig, coordinator: ActorClient) -> NodeExclusion:
    """Return what decides on nodes that failed, and also before this start."""
    earlier: list[NodeFailure] = []
    if config.cluster.exclude_node_after:
        # Only a help: with storage that fails, the workers report it.
        with contextlib.suppress(StorageError):
            earlier = earlier_failures(read_attempts(Store(config.run_url), MAX_ATTEMPTS))
    return NodeExclusion(ray, config, coordinator.leave_out, earlier)


def _start_coordinator(ray: Any, name: str, max_failures: int, exclude_node_after: int = 0) -> Any:
    """Start the coordinator on this node, so that it survives the loss of any other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A soft affinity has no effect on an actor without CPUs: Ray puts it anywhere.
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class = ray.remote(num_cpus=0)(Coordinator).options(
        name=name, namespace=NAMESPACE, scheduling_strategy=this_node
    )
    actor = actor_class.remote(max_failures, exclude_node_after)

    # The first call waits until the actor runs, and raises here if it cannot start.
    ray.get(actor.outcome.remote())

    return actor


def _fit(
    config: RunConfig, coordinator: ActorClient, trainer: Any, watches: _Watches
) -> BaseException | None:
    """Run the trainer in a thread and forward lines and signals; return what it raised.

    Ray's own limit on failed starts cannot replace `reason_to_stop_waiting`: it counts over the
    whole run, and each lost node may cost one.

    Raises:
        WorkerError, Interrupted: waiting for workers is pointless.
    """
    failures: list[BaseException] = []

    def fit(_coordinator: ActorClient) -> None:
        # Holds a reference: workers that start after this driver gave up learn so from the
        # coordinator.
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    console, started_at = Console(), time.monotonic()

    # In a thread, because `fit` does not return before the run ends, and signals arrive here. A
    # daemon: Ray Train cannot be interrupted, and must not keep a driver that gave up from ending.
    thread = threading.Thread(target=fit, args=(coordinator,), name="ray-train", daemon=True)
    with stop_on_signal(console) as should_stop:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if should_stop():
                coordinator.request_stop()
            print_lines(console, coordinator.take_lines())
            watches.check(config, coordinator)

            error = reason_to_stop_waiting(
                config,
                time.monotonic() - started_at,
                coordinator.rank_0_silent_s(),
                should_stop(),
            )

            # A run that has just ended needs no workers: its result counts, not the error.
            if error is not None and thread.is_alive() and coordinator.outcome() is None:
                coordinator.end_run(error)
                raise error

        # Lines that arrived after the last look.
        print_lines(console, coordinator.take_lines())

    return failures[0] if failures else None


def _worker(settings: WorkerSettings) -> None:
    """Supervise a training process until the run is over; each Ray Train worker runs this."""
    import ray

    redact_output()
    # Relative paths of the config start at the driver's folder, if this node has it too.
    if os.path.isdir(settings["folder"]):
        os.chdir(settings["folder"])
    os.environ.update(settings["failpoints"])
    config = RunConfig.model_validate(settings["config"])
    allow_task(config.task.name)  # the driver allowed it

    context = _worker_context(ray, settings["coordinator"])
    coordinator = ActorClient(ray.get_actor(settings["coordinator"], namespace=NAMESPACE))

    try:
        supervisor = Supervisor(
            config,
            context,
            coordinator,
            checkpoint_reporter(),
            RunGauges(config.run.name).set_values,
        )
        supervisor.run()
    except ray.exceptions.ActorDiedError:
        return  # the coordinator has ended, and so has the driver
    except (RendezvousTimeoutError, NodeLeftOutError):
        raise  # not the end of the run: Ray Train places all workers anew
    except Exception as error:
        coordinator.end_run(
            WorkerError(
                f"worker {context.world.rank}: its supervisor failed "
                f"({type(error).__name__}: {error}); see the Ray logs in "
                f"{local_cluster.logs_folder(ray)}"
            ),
            context.group,
        )
        raise


def _rendezvous_address(ray: Any, world: World) -> str:
    """Return the address of this node at which the training processes meet."""
    # Workers of one node need no other machine to reach them.
    address: str | None = None
    if world.ranks_per_node == world.num_ranks:
        address = loopback_address()
    return address or str(ray.util.get_node_ip_address())


def _worker_context(ray: Any, coordinator_name: str) -> WorkerContext:
    train_context = importlib.import_module("ray.train").get_context()
    node_id = ray.get_runtime_context().get_node_id()
    world = World(
        rank=train_context.get_world_rank(),
        num_ranks=train_context.get_world_size(),
        rank_of_node=train_context.get_local_rank(),
        ranks_per_node=train_context.get_local_world_size(),
    )
    placement_group = ray.util.get_current_placement_group()  # Ray Train creates one for each group
    if placement_group is None:
        raise AssertionError("workers of Ray Train belong to a placement group")

    return WorkerContext(
        group=placement_group.id.hex(),
        world=world,
        node=f"{socket.gethostname()}/{node_id[:8]}",
        host=_rendezvous_address(ray, world),
        device=gpu_index(ray.get_gpu_ids(), world.rank_of_node),
        spare_name=f"{coordinator_name}/{node_id}",
    )
