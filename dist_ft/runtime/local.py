"""A run in this process: alone without Ray and DeepSpeed, or as one rank that torchrun (or the like) started."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn

from dist_ft.config.schema import RunConfig
from dist_ft.core.world import World
from dist_ft.runtime.bootstrap import network_check
from dist_ft.training.console import Console
from dist_ft.training.result import Result
from dist_ft.training.run_context import RunContext

in_group = threading.Event()
"""Set once this process has been in a process group; see `leave`."""


def leave(code: int) -> NoReturn:
    """End this process with `code`, at once if it was in a process group.

    Threads of gloo may let go of the last tensors while the interpreter is taken down, which aborts the process
    (https://github.com/pytorch/pytorch/pull/179291): a run that went well would end with SIGABRT.
    """
    if in_group.is_set():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(config: RunConfig, context: RunContext | None = None) -> Result:
    """Run `config` here and return its result; the first SIGINT or SIGTERM saves and stops (Interrupted)."""
    from dist_ft.runtime.bootstrap import training_run

    world = World.from_environment()
    context = context or RunContext()
    with _process_group(config, world), stop_on_signal(context.console) as should_stop:
        stop_requested = context.should_stop
        return training_run.run(
            config, world, replace(context, should_stop=lambda: should_stop() or stop_requested())
        )


@contextlib.contextmanager
def _process_group(config: RunConfig, world: World) -> Iterator[None]:
    """Join the other ranks; DeepSpeed wants a group even for a world of one."""
    if config.max_workers == 0 and world.num_ranks == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    in_group.set()
    use_gpu = config.cluster.gpus_per_worker > 0
    if use_gpu:
        torch.cuda.set_device(world.rank_of_node)
    if "MASTER_ADDR" not in os.environ:
        for name, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }.items():
            os.environ[name] = value
    ours = not dist.is_initialized()
    if ours:
        network_check.prepare(config)
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            timeout=timedelta(seconds=config.cluster.collective_timeout_s),
        )
    try:
        yield
    finally:
        if ours:
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def stop_on_signal(console: Console) -> Iterator[Callable[[], bool]]:
    """Yield a question: was this process asked to stop? A second signal acts as if nobody listened."""
    wanted = threading.Event()
    previous: dict[int, Any] = {}
    said: list[threading.Thread] = []

    def handle(number: int, _frame: Any) -> None:
        signal.signal(number, previous[number])
        wanted.set()
        text = f"{signal.Signals(number).name}: saving after this step, then stopping (again: stop at once)"
        said.append(threading.Thread(target=console.say, args=(text,), daemon=True))
        said[-1].start()  # this thread may be in the middle of writing a line

    if threading.current_thread() is threading.main_thread():
        previous = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
    try:
        yield wanted.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for thread in said:
            thread.join(1)
        console.close()
