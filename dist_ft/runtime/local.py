"""A run in this process: alone without Ray and DeepSpeed, or as one rank of torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn

from dist_ft.config.schema import RunConfig
from dist_ft.core import logs
from dist_ft.core.errors import ConfigError
from dist_ft.core.private_folders import keep_compiled_code_private
from dist_ft.core.world import World
from dist_ft.runtime.bootstrap import collective_timeouts, devices, network_check, rendezvous
from dist_ft.storage import filesystem
from dist_ft.training.console import Console
from dist_ft.training.notify.monitor import MonitorCallback, monitor_run
from dist_ft.training.result import Result
from dist_ft.training.run_context import RunContext

log = logging.getLogger("dist_ft.run")

joined_process_group = threading.Event()
"""Set once this process has been in a process group; see `exit_process`."""


def exit_process(code: int) -> NoReturn:
    """End this process with `code`; at once if it was in a process group.

    Threads of gloo may release the last tensors while the interpreter is taken down, which aborts
    the process (https://github.com/pytorch/pytorch/pull/179291): a successful run would end with
    SIGABRT.
    """
    if joined_process_group.is_set():
        # `os._exit` skips what the interpreter does at its end, so write out the rest here.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(config: RunConfig, context: RunContext | None = None) -> Result:
    """Run `config` here and return its result.

    The first SIGINT or SIGTERM saves and stops (Interrupted).
    """
    from dist_ft.runtime.bootstrap import training_run

    keep_compiled_code_private()
    world = World.from_environment()
    context = context or RunContext()
    with _process_group(config, world), stop_on_signal(context.console) as got_signal:
        stop_requested = context.should_stop
        context = replace(context, should_stop=lambda: got_signal() or stop_requested())

        return training_run.run(config, world, context)


def run_with_notices(config: RunConfig, context: RunContext) -> Result:
    """Run `config` here as `run` does, and send the notices of `log.notify` (rank 0 only)."""
    if World.from_environment().rank != 0:
        return run(config, context)

    logs.setup_logging(level=config.log.level)
    filesystem.configure(config.storage.options)
    with monitor_run(config) as monitor:
        context = replace(context, on_hang=monitor.report_hang)
        result = run(config, context.with_callback(MonitorCallback(monitor)))
        monitor.report_result(result)
        return result


@contextlib.contextmanager
def _process_group(config: RunConfig, world: World) -> Iterator[None]:
    """Join the other ranks; DeepSpeed needs a process group even for one rank.

    Raises:
        ConfigError: there are other ranks, but no address to meet them.
    """
    use_gpu = config.cluster.gpus_per_worker > 0
    if use_gpu:
        devices.require_device(world.rank_of_node)
    if config.max_workers == 0 and world.num_ranks == 1:
        _warn_of_idle_gpus(config, world)
        yield
        return

    import torch
    import torch.distributed as dist

    # A caller that has a process group of its own keeps it.
    is_owner = not dist.is_initialized()
    if is_owner and world.num_ranks > 1:
        _require_address(world)

    joined_process_group.set()
    if use_gpu:
        # Before the group exists: NCCL uses the current device, by default GPU 0 on every rank.
        torch.cuda.set_device(world.rank_of_node)

    with rendezvous.restored_environment():
        # Started by hand and not by torchrun: a world of one that meets itself on this machine.
        if "MASTER_ADDR" not in os.environ:
            rendezvous.meet_alone()

        with contextlib.ExitStack() as stack:
            if is_owner:
                # The backends read the variables of network interfaces only here.
                network_check.configure_interfaces(config)
                rendezvous.stay_on_loopback()
                timeout = stack.enter_context(collective_timeouts.apply(config.cluster))
                _init_process_group("nccl" if use_gpu else "gloo", timeout)
                stack.callback(dist.destroy_process_group)

            yield


def _warn_of_idle_gpus(config: RunConfig, world: World) -> None:
    # The driver of Ray workers looks at all nodes.
    idle = devices.idle_here(config, world.ranks_per_node)
    if idle:
        log.warning("%s", idle)


def _init_process_group(backend: str, timeout: timedelta) -> None:
    """Create the process group of the ranks that the environment describes."""
    import torch.distributed as dist

    store = rendezvous.open_store(timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
        return

    dist.init_process_group(
        backend,
        timeout=timeout,
        store=store,
        rank=0,
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _require_address(world: World) -> None:
    """Raise ConfigError without an address of rank 0: each process would train on its own."""
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            [
                f"MASTER_ADDR: not set, although WORLD_SIZE={world.num_ranks}. The processes of a "
                "run need the address of rank 0 in MASTER_ADDR and MASTER_PORT. Start them with "
                "torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE to run alone."
            ],
            "environment",
        )


@contextlib.contextmanager
def stop_on_signal(console: Console) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether this process got SIGINT or SIGTERM.

    A second signal has the effect it has without this.
    """
    received = threading.Event()
    previous: dict[int, Any] = {}
    printers: list[threading.Thread] = []

    def handle(number: int, _frame: Any) -> None:
        # The old handler is back at once, so that a second signal interrupts a save that hangs.
        signal.signal(number, previous[number])
        received.set()

        name = signal.Signals(number).name
        text = f"{name}: saving after this step, then stopping (again: stop at once)"
        # in a thread of its own, for this one may be in the middle of writing a line
        printer = threading.Thread(target=console.print, args=(text,), daemon=True)
        printers.append(printer)
        printer.start()

    # Python sets signal handlers in the main thread only; elsewhere the caller handles signals.
    if threading.current_thread() is threading.main_thread():
        for handled in (signal.SIGINT, signal.SIGTERM):
            previous[handled] = signal.signal(handled, handle)

    try:
        yield received.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

        # With a limit: a terminal that does not take output must not keep the run from ending.
        for printer in printers:
            printer.join(1)
        console.close()
