"""A run on Ray Train workers. With `ray_group` the only module that trains by Ray.

The driver connects to a cluster or starts one of its own, asks Ray Train for workers, and relays: progress lines and
errors from the workers to this terminal, a request to stop from this terminal to the workers. A worker looks after a
process that trains (`supervisor`); that a process failed is mended without Ray, that a worker or its node was lost by
Ray. Where the run stands is always read from its storage, never from Ray's memory.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.core import logs
from dist_ft.core.errors import DistFtError, WorkerError
from dist_ft.core.world import World
from dist_ft.runtime.elastic.coordinator import Relay, show
from dist_ft.runtime.elastic.supervisor import RendezvousTimeoutError, Place, Supervisor
from dist_ft.runtime.local import stop_on_signal
from dist_ft.runtime.ray_backend.metrics import Exported
from dist_ft.runtime.ray_backend.node_watch import NodeWatch
from dist_ft.runtime.ray_backend.placement import (
    device,
    explain,
    given_up,
    line_of,
    require_resources,
)
from dist_ft.runtime.ray_backend.worker_group import NAMESPACE, POLL_S, Called, reporter
from dist_ft.runtime.ray_backend.worker_group import trainer as _trainer
from dist_ft.storage import filesystem
from dist_ft.training.console import Console
from dist_ft.training.result import Result

log = logging.getLogger("dist_ft.ray")
OBJECT_STORE_BYTES = 128 * 2**20
ELASTIC_START_S = 5.0
"""For a place, which an elastic run asks for where one is free: where a lost node is still counted, it asks again."""


def run(config: RunConfig) -> Result:
    """Run `config` on Ray workers and return its result; raises DistFtError with one clear line."""
    logs.setup_logging(level=config.log.level)
    filesystem.configure(config.storage.options)
    with connected(config) as ray:
        require_resources(ray, config)
        name = f"relay-{os.getpid()}-{time.time_ns()}"
        actor = _start_relay(
            ray, name, config.cluster.max_failures
        )  # it lives as long as this refers to it
        relay = Called(actor)
        try:
            failure = _fit(ray, config, relay, _trainer(config, name, _worker))
            outcome = relay.outcome()
        except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError) as error:
            raise WorkerError(
                "the process that joins the workers with this one was lost (killed for want of memory?); "
                "what was committed is kept; the same command goes on from there"
            ) from error
    if isinstance(outcome, DistFtError):
        raise outcome
    if outcome is not None:
        return outcome
    raise explain(failure, config)


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[Any]:
    """Connect to the cluster the config or the environment names, or start one that dies with this process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    elastic = (
        config.min_workers < config.max_workers
    )  # Ray may wait for a node that was lost: it then asks for fewer
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(
        min(config.cluster.start_timeout_s, ELASTIC_START_S if elastic else math.inf)
    )
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths mean the same in a worker as here
    import ray

    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    verbose = config.log.level == "debug"
    common: dict[str, Any] = {
        "log_to_driver": verbose,
        "namespace": NAMESPACE,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if ray.is_initialized():
        yield ray
        return
    try:
        if address:
            ray.init(address=address, **common)
        else:  # address="local": never a stale cluster of another run
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **common,
            )
    except Exception as error:  # Ray raises that itself where a node does not come up in time
        raise WorkerError(
            f"cluster.address={address}: can not connect to Ray ({line_of(error, 0)}); check "
            "that a cluster runs there with this Ray version, or leave cluster.address empty to start an "
            "own one"
        ) from error
    with contextlib.nullcontext() if verbose else _short_notices():
        try:
            yield ray
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _short_notices() -> Iterator[None]:
    """Have what Ray tells of a lost node be a line each, not the node's state and last log besides.

    No public part of Ray: with one that has no such part, all of it is shown.
    """
    told: set[str] = set()

    def tell(batch: dict[str, Any]) -> None:
        for line in {str(text).strip().split("\n")[0][:200] for text in batch["lines"]} - told:
            told.add(line)
            log.warning("Ray: %s", line)

    dispatcher: Any = None
    with contextlib.suppress(Exception):
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        dispatcher.remove_handler("ray_print_logs")
        dispatcher.add_handler(__name__, tell)
    try:
        yield
    finally:
        if dispatcher is not None:
            dispatcher.remove_handler(__name__)


def _start_relay(ray: Any, name: str, max_failures: int) -> Any:
    """Start the relay on this node: the loss of another must not take it away."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(  # a soft one means nothing to an actor without CPUs: Ray puts it anywhere
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(num_cpus=0)(Relay).options(
        name=name, namespace=NAMESPACE, scheduling_strategy=here
    )
    relay = actor.remote(max_failures)
    ray.get(relay.outcome.remote())
    return relay


def _fit(ray: Any, config: RunConfig, relay: Called, trainer: Any) -> BaseException | None:
    """Run the trainer in a thread while this one relays lines and signals; return what it raised.

    Raises WorkerError or Interrupted when there is no use in waiting for workers any longer (`_given_up`). Ray's own
    limit on failed starts would not do: it counts over the whole run, and each lost node may cost one.
    """
    failure: list[BaseException] = []

    def fit(
        _relay: Called,
    ) -> None:  # holds the relay: workers that start after we gave up learn from it that we did
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    console, began, watch = Console(), time.monotonic(), NodeWatch(ray)
    thread = threading.Thread(target=fit, args=(relay,), name="ray-train", daemon=True)
    with stop_on_signal(console) as stopping:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if stopping():
                relay.stop()
            show(console, relay.take())
            if config.min_workers < config.max_workers:
                watch.look()
            error = given_up(config, time.monotonic() - began, relay.silent_s(), stopping())
            if error is not None and thread.is_alive() and relay.outcome() is None:
                relay.end(error)
                raise error
        show(console, relay.take())
    return failure[0] if failure else None


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs: it looks after a process that trains, until the run is over."""
    import ray

    if os.path.isdir(settings["folder"]):
        os.chdir(settings["folder"])
    os.environ.update(settings["failpoints"])
    train = importlib.import_module("ray.train")
    config = RunConfig.model_validate(settings["config"])
    context, runtime = train.get_context(), ray.get_runtime_context()
    world = World(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_rank(),
        context.get_local_world_size(),
    )
    placed = ray.util.get_current_placement_group()  # Ray Train makes one for each set of workers
    if placed is None:
        raise AssertionError("workers of Ray Train lie in a placement group")
    place = Place(
        placed.id.hex(),
        world,
        f"{socket.gethostname()}/{runtime.get_node_id()[:8]}",
        ray.util.get_node_ip_address(),
        device(ray.get_gpu_ids(), world.rank_of_node),
        f"{settings['relay']}/{runtime.get_node_id()}",
    )
    relay = Called(ray.get_actor(settings["relay"], namespace=NAMESPACE))
    try:
        Supervisor(config, place, relay, reporter(config), Exported(config.run.name).add).run()
    except ray.exceptions.ActorDiedError:
        return  # the relay is gone, and with it the driver
    except RendezvousTimeoutError:
        raise
    except Exception as error:
        relay.end(
            WorkerError(
                f"worker {world.rank}: its supervisor failed ({type(error).__name__}: {error}); see the "
                "Ray logs in /tmp/ray"
            ),
            place.group,
        )
        raise
