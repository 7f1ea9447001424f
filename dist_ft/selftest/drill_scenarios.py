"""Scenarios of a drill: what is injected into a run, and when the run counts as recovered.

Pure: no process, no storage. Each scenario is its own run of the same small config. It passes if it
ends as expected and in time, every loss is bit-equal to that of the run without faults, the ledger
holds every sample once, and every checkpoint is intact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dist_ft.config.load import load_config
from dist_ft.config.schema import RunConfig
from dist_ft.runtime.bootstrap.watchdog import EXIT_CODE as HUNG

NUM_STEPS = 24
CHECKPOINT_INTERVAL = 4
FAULT_STEP = 17
"""The fault is injected when a process passes a step for this many times. After the latest
checkpoint before it fewer steps are left, so that a process of the next attempt does not reach
the fault."""
SIGTERM_PAUSE_S = 5
"""Pause of a worker before SIGTERM, so that a small run is not over before it arrives."""
SPARE_PAUSE_S = 15
"""Pause of a worker before it is killed, until the spare processes are ready."""
HANG_TIMEOUT_S = 15.0
"""cluster.progress_timeout_s of the run in which a worker hangs."""
DEFAULT_TIMEOUT_S = 600.0
"""cluster.progress_timeout_s of the other runs."""
RERUN_LINE = "drill: running the same command again"
NAMES = ("reference", "death", "hang", "preemption", "storage")


@dataclass(frozen=True)
class Scenario:
    """One run of a drill.

    Attributes:
        name: also the run's name.
        description: what is done to the run, for people.
        failpoint: where the fault is injected; "": nowhere.
        overrides: fields of the config by section.
        pause_s: seconds that a worker pauses at the failpoint before the fault; not counted in
            measured times.
        send_sigterm: send SIGTERM to the command once the failpoint is reached.
        first_exit_code: expected exit code of the first command; if it is not 0, the command is run
            again.
        expects_restart: whether the run must have a second attempt.
        expected_output: pattern that a line of the output must match; "": none.
    """

    name: str
    description: str
    failpoint: str = ""
    overrides: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    pause_s: float = 0
    send_sigterm: bool = False
    first_exit_code: int = 0
    expects_restart: bool = False
    expected_output: str = ""


class TimedLine(NamedTuple):
    """A line of a command's output, and when it was printed: seconds since the scenario started."""

    at_s: float
    text: str


class StepLoss(NamedTuple):
    """The loss of a step; None where it is not finite."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of a run of a scenario.

    Attributes:
        exit_codes: exit code of each command; None: it did not end in time.
        lines: the output of all commands.
        losses: losses in the run's metrics.
        ledger_problem: what is wrong with the ledger; "" if nothing.
        damaged_checkpoints: what is wrong with checkpoints; empty if nothing.
        num_checkpoints: that the run has.
        num_attempts: that the run has.
        save_stall_s: mean time that training stands still for a save; None: unknown.
    """

    exit_codes: tuple[int | None, ...]
    lines: tuple[TimedLine, ...] = ()
    losses: tuple[StepLoss, ...] = ()
    ledger_problem: str = ""
    damaged_checkpoints: tuple[str, ...] = ()
    num_checkpoints: int = 0
    num_attempts: int = 0
    save_stall_s: float | None = None


def scenarios(num_workers: int) -> list[Scenario]:
    """Return all scenarios, the run without faults first.

    `num_workers` 0 means one process without Ray.
    """
    last_rank = max(num_workers, 1) - 1
    is_single = num_workers == 0
    victim = "the process" if is_single else "the process of the last worker"

    # Nobody would notice that a single process is stopped from outside: there, a call does not
    # return.
    if num_workers <= 1:
        hang_action, hang_description = "sleep", "a call does not return"
    else:
        hang_action, hang_description = "stop", f"{victim} is stopped (SIGSTOP)"

    # a single process has no spare to wait for, and a failpoint kills by default
    kill_action = "" if is_single else f"!sleep{SPARE_PAUSE_S}+kill"
    return [
        Scenario("reference", "no fault"),
        Scenario(
            "death",
            f"{victim} is killed (kill -9)",
            f"train.step:{FAULT_STEP}@{last_rank}{kill_action}",
            pause_s=0 if is_single else SPARE_PAUSE_S,
            # a supervisor restarts a worker, so only a single process ends with the fault
            first_exit_code=-9 if is_single else 0,
            expects_restart=True,
        ),
        Scenario(
            "hang",
            hang_description,
            f"train.step:{FAULT_STEP}@{last_rank}!{hang_action}",
            {"cluster": {"progress_timeout_s": HANG_TIMEOUT_S}},
            first_exit_code=HUNG if is_single else 0,
            expects_restart=True,
            expected_output=r"made no progress for \d+ s|: hang \(",
        ),
        Scenario(
            "preemption",
            "the command receives SIGTERM and is run again",
            f"train.step:{FAULT_STEP}@0!sleep{SIGTERM_PAUSE_S}",
            pause_s=SIGTERM_PAUSE_S,
            send_sigterm=True,
            first_exit_code=130,
            expects_restart=True,
            expected_output=r"stopped at step \d+",
        ),
        Scenario(
            "storage",
            "storage fails in the middle of a save",
            "checkpoint.before_file:2@0!storage",
            expected_output=r"no checkpoint at step \d+, training continues",
        ),
    ]


def scenario_config(base: RunConfig, folder_url: str, scenario: Scenario) -> RunConfig:
    """Return a scenario's config, based on cluster, storage, zero and dtype of `base`.

    Model and data are in `folder_url`. Of an elastic range the smallest number of workers is used,
    because bit-equality is promised for a fixed number.
    """
    num_workers = base.min_workers
    document: dict[str, dict[str, Any]] = {
        "run": {"name": scenario.name, "storage": folder_url, "seed": 1},
        "model": {
            "path": f"{folder_url}/model",
            "dtype": base.model.dtype,
            "attention": "eager",  # the same bits each time
            "activation_checkpointing": base.model.activation_checkpointing,
        },
        "data": {
            "train": f"{folder_url}/data/*.jsonl",
            "format": "instruction",
            "overlong": "truncate",
            # blocks of a few rows: even this little data has several, whose order is shuffled
            "block_mib": 0.004,
            "shuffle_blocks": 2,
            "cache_dir": base.data.cache_dir,
        },
        "batch": {"global_batch": num_lanes(num_workers), "sequence_length": 64},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": NUM_STEPS},
        "zero": base.zero.model_dump(mode="json"),
        "cluster": {
            **base.cluster.model_dump(mode="json"),
            "workers": num_workers,
            "max_failures": 3,
            "progress_timeout_s": DEFAULT_TIMEOUT_S,
        },
        "checkpoint": {"every_steps": CHECKPOINT_INTERVAL, "keep_last": 3},
        "log": {"tensorboard": False},
        "storage": base.storage.model_dump(mode="json"),
    }

    for section, fields in scenario.overrides.items():
        document[section].update(fields)

    return load_config(document)


def num_lanes(num_workers: int) -> int:
    """Return the lanes of a drill: an odd number, so that workers have unequal shares."""
    return max(5, 2 * num_workers + 1)


def find_problems(
    scenario: Scenario, outcome: RunOutcome, expected_losses: Sequence[StepLoss]
) -> list[str]:
    """Return what is wrong with a run; `expected_losses`: of the run without faults."""
    problems = []
    expected_codes: tuple[int, ...] = (scenario.first_exit_code,)
    if scenario.first_exit_code != 0:
        expected_codes += (0,)  # of the second command

    if None in outcome.exit_codes:
        problems.append("it did not end in time (its output names the limit)")
    elif outcome.exit_codes != expected_codes:
        problems.append(f"exit codes {_join(outcome.exit_codes)}; expected {_join(expected_codes)}")

    if scenario.failpoint and fault_line_index(outcome.lines) is None:
        problems.append("the fault was not injected: its step was not reached")
    elif scenario.expected_output and not find_expected_output(scenario, outcome.lines):
        problems.append(f"no line of its output matches {scenario.expected_output!r}")

    if scenario.expects_restart and outcome.num_attempts < 2:
        problems.append("there was no second attempt")

    problems += compare_losses(outcome.losses, expected_losses)
    if outcome.ledger_problem:
        problems.append(f"ledger: {outcome.ledger_problem}")
    problems += [f"checkpoint {problem}" for problem in outcome.damaged_checkpoints]
    return problems


def find_expected_output(scenario: Scenario, lines: Sequence[TimedLine]) -> str:
    """Return the text that matches the scenario's expected output, or ""."""
    if scenario.expected_output:
        for line in lines:
            match = re.search(scenario.expected_output, line.text)
            if match:
                return match.group(0)
    return ""


def compare_losses(losses: Sequence[StepLoss], expected: Sequence[StepLoss]) -> list[str]:
    """Return a line for the first loss that differs, or for missing or repeated steps."""
    # A resumed run repeats steps, but its metrics must hold each of them once: lines of repeated
    # steps are dropped when it resumes.
    steps = [step for step, _ in losses]
    if steps != list(range(1, NUM_STEPS + 1)):
        last = steps[-1] if steps else "none"
        return [
            f"the metrics hold {len(steps)} steps, the last is {last}; "
            f"expected steps 1 to {NUM_STEPS}"
        ]

    for (step, loss), (_, expected_loss) in zip(losses, expected, strict=True):
        # To the last bit. A loss that is not finite is None in both runs.
        if loss != expected_loss:
            return [f"step {step}: loss {loss!r}, but {expected_loss!r} in the run without faults"]
    return []


def fault_line_index(lines: Sequence[TimedLine]) -> int | None:
    """Return the index of the line that reports the failpoint; None: it was not reached."""
    for index, line in enumerate(lines):
        if "failpoint " in line.text:
            return index
    return None


def measure_times(scenario: Scenario, outcome: RunOutcome) -> dict[str, float]:
    """Return measured seconds by name, as a person at the terminal sees them.

    - `detected_s`: from the fault until a hang is reported.
    - `saved_s`: from the fault until a run that received a stop request has saved.
    - `resumed_s`: from the fault (after SIGTERM: from the second command) to the first new step of
      the next attempt.
    - `save_stall_s`: mean time that training stands still for a save.
    """
    times = {}
    if outcome.save_stall_s is not None:
        times["save_stall_s"] = outcome.save_stall_s

    fault_index = fault_line_index(outcome.lines)
    if fault_index is None:
        return times

    # The failpoint logs its line before it pauses, the fault comes after the pause.
    start_s = outcome.lines[fault_index].at_s + scenario.pause_s
    lines_after = outcome.lines[fault_index + 1 :]

    if scenario.name == "hang":
        times |= _time_until(scenario.expected_output, "detected_s", start_s, lines_after)

    if scenario.send_sigterm:
        times |= _time_until("stopped at step", "saved_s", start_s, lines_after)

        # how long the first command takes to end is not part of the restart
        rerun_times = [line.at_s for line in lines_after if line.text == RERUN_LINE]
        if rerun_times:
            start_s = rerun_times[0]

    if scenario.expects_restart:
        # a step may still be logged after the fault, so the start of the next attempt comes first
        for index, line in enumerate(lines_after):
            if re.search(r"\(attempt \d+\)", line.text):
                times |= _time_until(r"^step ", "resumed_s", start_s, lines_after[index:])
                break

    return times


def _time_until(
    pattern: str, name: str, start_s: float, lines: Sequence[TimedLine]
) -> dict[str, float]:
    """Return {name: seconds until the first line that matches}, or {} without one."""
    for line in lines:
        if re.search(pattern, line.text):
            return {name: line.at_s - start_s}
    return {}


def _join(codes: Sequence[int | None]) -> str:
    return ", ".join(map(str, codes))
