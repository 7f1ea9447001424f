"""Runs `dist-ft train` as a person would start it, with or without a fault, until it ends.

Drill and self-test share it. Each run is a process of its own; the command passes the failpoint on
to its workers. Guarantee: no command outlives its time limit or the interruption of this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_ft.config.load import resolved_yaml
from dist_ft.config.schema import RunConfig
from dist_ft.core import scratch
from dist_ft.core.errors import DistFtError
from dist_ft.core.logs import redact
from dist_ft.runs import catalog, ledger_audit, time_accounting
from dist_ft.selftest.drill_scenarios import (
    RERUN_LINE,
    RunOutcome,
    Scenario,
    StepLoss,
    TimedLine,
)
from dist_ft.storage.filesystem import Store
from dist_ft.training.metrics_log import read_metrics

COMMAND_LIMIT_S = 600.0
"""Time limit of a command, in addition to cluster.start_timeout_s."""
STOP_S = 30.0
"""How long a command may take to end after SIGTERM."""


def run_scenario(
    config: RunConfig, scenario: Scenario, store: Store, rerun_config: RunConfig | None = None
) -> RunOutcome:
    """Run a scenario to its end and return its outcome.

    Its output is stored as `<name>.log` in `store`.

    Args:
        config: config of the run.
        scenario: the scenario.
        store: folder of all runs.
        rerun_config: config of the second command, if the scenario has one; default: `config`.
    """
    started_at = time.monotonic()
    lines: list[TimedLine] = []
    exit_codes: list[int | None] = []
    limit_s = COMMAND_LIMIT_S + config.cluster.start_timeout_s
    with scratch.folder("rehearsal") as folder:
        variables = {"DIST_FT_FAILPOINT": scenario.failpoint} if scenario.failpoint else {}
        command = _train_command(config, folder)

        exit_codes.append(
            run_command(command, variables, limit_s, started_at, lines, scenario.send_sigterm)
        )

        # run again only what ended as planned: another end is a problem, which a rerun would hide
        if exit_codes[0] == scenario.first_exit_code != 0:
            lines.append(TimedLine(time.monotonic() - started_at, RERUN_LINE))
            command = _train_command(rerun_config or config, folder)
            # without the failpoint, or the second command would fail at the same step
            exit_codes.append(run_command(command, {}, limit_s, started_at, lines))

    text = "".join(f"{line.at_s:8.2f} {redact(line.text)}\n" for line in lines)
    store.write(f"{scenario.name}.log", text.encode())
    return _read_outcome(config.run_url, exit_codes, lines)


def _train_command(config: RunConfig, folder: Path) -> list[str]:
    path = folder / f"{config.run.name}.yaml"
    path.write_text(resolved_yaml(config))
    return [sys.executable, "-m", "dist_ft.cli", "train", str(path), "--skip-check"]


def run_command(
    command: Sequence[str],
    variables: dict[str, str],
    limit_s: float,
    started_at: float,
    lines: list[TimedLine],
    send_sigterm: bool = False,
) -> int | None:
    """Run `command` to its end and append its output to `lines`.

    Args:
        command: what to run.
        variables: environment variables in addition to this process's own, except its failpoints.
        limit_s: seconds until the command is killed.
        started_at: time on the monotonic clock that lines count from.
        lines: the output is appended here.
        send_sigterm: send SIGTERM when the output mentions a failpoint.

    Returns:
        The exit code, or None if the command had to be killed.
    """
    environment = {"OMP_NUM_THREADS": "1"}
    for key, value in os.environ.items():
        if not key.startswith("DIST_FT_FAILPOINT"):
            environment[key] = value
    environment.update(variables)

    # in a session of its own, so that all processes it starts can be killed together
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )

    def read_output() -> None:
        # Ends when the last process that inherited the pipe has closed it.
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(TimedLine(time.monotonic() - started_at, line.rstrip("\n")))
            # the failpoint pauses the worker, so the signal arrives in the middle of a step
            if send_sigterm and "failpoint " in line:
                process.terminate()

    reader = threading.Thread(target=read_output, name="rehearsal", daemon=True)
    reader.start()

    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
        text = f"the command did not end within {limit_s:.0f} s and is killed"
        lines.append(TimedLine(time.monotonic() - started_at, text))
    finally:
        # also on Ctrl-C: an interrupted drill leaves no run behind
        _stop(process)

    # Limited: a process that outlived its command may hold the pipe open.
    reader.join(STOP_S)
    return code


def _stop(process: subprocess.Popen[Any]) -> None:
    """End a command that still runs: first as a person would, then with everything it started."""
    if process.poll() is not None:
        return

    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)

    # the whole process group, as Ray and spare processes may not end with the command
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_outcome(
    url: str, exit_codes: Sequence[int | None], lines: Sequence[TimedLine]
) -> RunOutcome:
    """Read the storage of a run that has ended; an unreadable file is part of the outcome."""
    store = Store(url)
    try:
        losses = []
        for line in read_metrics(store):
            if line["kind"] == "train":
                losses.append(StepLoss(line["step"], line["loss"]))

        # every byte: a damaged checkpoint is found though no attempt restored it
        checkpoints = list(catalog.verify(url))
        attempt_times = time_accounting.read_attempt_times(store).attempts
        audit = ledger_audit.audit(url)
    except (DistFtError, KeyError) as error:
        # a run that ended early may have written nothing
        problem = f"the files of the run cannot be read ({error})"
        return RunOutcome(tuple(exit_codes), tuple(lines), ledger_problem=problem)

    return RunOutcome(
        exit_codes=tuple(exit_codes),
        lines=tuple(lines),
        losses=tuple(losses),
        ledger_problem="" if audit.is_sound else ledger_audit.describe(audit),
        damaged_checkpoints=tuple(f"{name}: {problem}" for name, problem in checkpoints if problem),
        num_checkpoints=len(checkpoints),
        num_attempts=len(catalog.attempts(store)),
        save_stall_s=time_accounting.mean_save_stall_s(attempt_times),
    )
