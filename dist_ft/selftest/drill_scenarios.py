"""What a drill does to a run, and when a run has held. Pure: no process, no storage.

Every scenario is a run of its own of the same small config. Held means: it came to its end in the way it should, within
its time; every loss equals the undisturbed run's to the last bit; the ledger has every sample once; every checkpoint
is what was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_ft.config.load import load_config
from dist_ft.config.schema import RunConfig
from dist_ft.runtime.bootstrap.watchdog import EXIT_CODE as HUNG

STEPS, EVERY, AT = 24, 4, 17
"""Steps of a run, between checkpoints, and the passing of a step at which it is disturbed: from the checkpoint it then
goes on from to the end there are fewer, so that a process of the next attempt does not pass it."""
WINDOW_S, SPARES_S = 5, 15
"""So long a worker rests before the drill's SIGTERM is obeyed (so small a run may else be over before it is heard), and
before it is killed (in a longer run the spare processes are ready by then)."""
HANG_S, PATIENT_S = 15.0, 600.0
"""cluster.progress_timeout_s where a worker hangs, and where none does."""
AGAIN = "drill: the same command again"
NAMES = ("reference", "death", "hang", "preemption", "storage")


@dataclass(frozen=True)
class Scenario:
    """One run of a drill.

    Attributes:
        name: also the run's.
        what: what is done to it, for people.
        failpoint: where it is disturbed; "": nowhere.
        changes: fields of the config by section.
        rest_s: seconds a worker rests at the failpoint before it is disturbed; they are not counted.
        terminate: send SIGTERM to the command once the failpoint is reached.
        first_code: exit code its first command must have; where that is not 0, the same command is given again.
        restarts: whether a further attempt must have been made.
        said: pattern its output must hold.
    """

    name: str
    what: str
    failpoint: str = ""
    changes: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    rest_s: float = 0
    terminate: bool = False
    first_code: int = 0
    restarts: bool = False
    said: str = ""


def scenarios(workers: int) -> list[Scenario]:
    """Return all scenarios for so many workers (0: one process); the undisturbed run is the first."""
    last, alone = max(workers, 1) - 1, workers == 0
    # a single process that is stopped from outside has nobody to notice it: there, a call does not return
    stopped, hang = (
        ("sleep", "a call does not return")
        if workers <= 1
        else ("stop", "the process of the last worker is stopped (SIGSTOP)")
    )
    died = "the process" if alone else "the process of the last worker"
    return [
        Scenario("reference", "nothing is done to it"),
        Scenario(
            "death",
            f"{died} is killed (kill -9)",
            f"train.step:{AT}@{last}" + ("" if alone else f"!sleep{SPARES_S}+kill"),
            rest_s=0 if alone else SPARES_S,
            first_code=-9 if alone else 0,
            restarts=True,
        ),
        Scenario(
            "hang",
            hang,
            f"train.step:{AT}@{last}!{stopped}",
            {"cluster": {"progress_timeout_s": HANG_S}},
            first_code=HUNG if alone else 0,
            restarts=True,
            said=r"made no progress for \d+ s|: hang \(",
        ),
        Scenario(
            "preemption",
            "SIGTERM to the command, which is then given again",
            f"train.step:{AT}@0!sleep{WINDOW_S}",
            rest_s=WINDOW_S,
            terminate=True,
            first_code=130,
            restarts=True,
            said=r"stopped at step \d+",
        ),
        Scenario(
            "storage",
            "storage fails in the middle of a save",
            "checkpoint.before_file:2@0!storage",
            said=r"no checkpoint at step \d+, training goes on",
        ),
    ]


def config_of(base: RunConfig, place: str, scenario: Scenario) -> RunConfig:
    """Return a scenario's config: cluster, storage, zero and number format of `base`, the model and data at `place`.

    Of an elastic range the fewest workers are taken: the last bit is promised for a fixed number.
    """
    workers = base.min_workers
    document: dict[str, dict[str, Any]] = {
        "run": {"name": scenario.name, "storage": place, "seed": 1},
        "model": {
            "path": f"{place}/model",
            "dtype": base.model.dtype,
            "attention": "eager",  # the same bits each time
            "activation_checkpointing": base.model.activation_checkpointing,
        },
        "data": {
            "train": f"{place}/data/*.jsonl",
            "format": "instruction",
            "overlong": "truncate",
            "block_mib": 0.004,
            "shuffle_blocks": 2,
            "cache_dir": base.data.cache_dir,
        },
        "batch": {"global_batch": lanes(workers), "sequence_length": 64},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": STEPS},
        "zero": base.zero.model_dump(mode="json"),
        "cluster": {
            **base.cluster.model_dump(mode="json"),
            "workers": workers,
            "max_failures": 3,
            "progress_timeout_s": PATIENT_S,
        },
        "checkpoint": {"every_steps": EVERY, "keep_last": 3},
        "log": {"tensorboard": False},
        "storage": base.storage.model_dump(mode="json"),
    }
    for section, fields in scenario.changes.items():
        document[section].update(fields)
    return load_config(document)


def lanes(workers: int) -> int:
    """Return the lanes of a drill: an odd number, so that workers have unequal shares."""
    return max(5, 2 * workers + 1)


@dataclass(frozen=True)
class Line:
    """A line a command said, and when: seconds since the scenario began."""

    at_s: float
    text: str


@dataclass(frozen=True)
class Evidence:
    """What a scenario left behind.

    Attributes:
        codes: exit code of each command; None: it had not come to its end in time.
        lines: what they said.
        losses: (step, loss) as the run's metrics have them.
        ledger: what is wrong with its ledger; "" if nothing.
        damaged: what is wrong with its checkpoints; empty if nothing.
        num_checkpoints, num_attempts: that the run has.
        stall_s: mean time training stood still for a save; None: not known.
    """

    codes: tuple[int | None, ...]
    lines: tuple[Line, ...] = ()
    losses: tuple[tuple[int, float | None], ...] = ()
    ledger: str = ""
    damaged: tuple[str, ...] = ()
    num_checkpoints: int = 0
    num_attempts: int = 0
    stall_s: float | None = None


def problems(
    scenario: Scenario, found: Evidence, wanted: Sequence[tuple[int, float | None]]
) -> list[str]:
    """Return a line for everything that did not hold; `wanted`: the losses of the undisturbed run."""
    said = (
        []
        if None not in found.codes
        else ["it had not come to its end in time (its limit stands in its output)"]
    )
    expected = (scenario.first_code,) if scenario.first_code == 0 else (scenario.first_code, 0)
    if not said and found.codes != expected:
        said.append(f"exit codes {_list(found.codes)}, {_list(expected)} expected")
    if scenario.failpoint and injected(found.lines) is None:
        said.append("it was not disturbed: the place was not reached")
    elif scenario.said and not heard_of(scenario, found.lines):
        said.append(f"it did not say {scenario.said!r}")
    if scenario.restarts and found.num_attempts < 2:
        said.append("there was no second attempt")
    said += losses_differ(found.losses, wanted)
    if found.ledger:
        said.append(f"ledger: {found.ledger}")
    return said + [f"checkpoint {text}" for text in found.damaged]


def heard_of(scenario: Scenario, lines: Sequence[Line]) -> str:
    """Return what a scenario must say, as it said it; "" if it did not, or need not."""
    found = (re.search(scenario.said, line.text) for line in lines if scenario.said)
    return next((match.group(0) for match in found if match), "")


def losses_differ(
    found: Sequence[tuple[int, float | None]], wanted: Sequence[tuple[int, float | None]]
) -> list[str]:
    """Return a line that says where losses are not those that were wanted, every step once; none if they are."""
    steps = [step for step, _ in found]
    if steps != list(range(1, STEPS + 1)):
        return [
            f"metrics hold {len(steps)} steps, the last {steps[-1] if steps else 'none'}; 1 to {STEPS} are needed"
        ]
    first = next(
        (
            (step, loss, other)
            for (step, loss), (_, other) in zip(found, wanted, strict=True)
            if loss != other
        ),
        None,
    )
    return (
        [] if first is None else ["step {}: loss {!r}, {!r} in the undisturbed run".format(*first)]
    )


def injected(lines: Sequence[Line]) -> int | None:
    """Return the index of the line that tells of the failpoint; None: it was not reached."""
    return next((i for i, line in enumerate(lines) if "failpoint " in line.text), None)


def times(scenario: Scenario, found: Evidence) -> dict[str, float]:
    """Return the seconds that were measured, as a person at the terminal sees them.

    From the disturbance, `noticed_s`: until a hang is told; `left_s`: until a run that was asked to stop is
    saved; `back_s`: until a new step of the next attempt is told, after a preemption counted
    from the command that is given again. And `stall_s`: training stands still for a save, on average.
    """
    measured = {} if found.stall_s is None else {"stall_s": found.stall_s}
    begin = injected(found.lines)
    if begin is None:
        return measured
    at_s, rest = found.lines[begin].at_s + scenario.rest_s, found.lines[begin + 1 :]
    if scenario.name == "hang":
        measured |= _first("noticed_s", at_s, rest, scenario.said)
    if scenario.terminate:
        measured |= _first("left_s", at_s, rest, "stopped at step")
        at_s = next((line.at_s for line in rest if line.text == AGAIN), at_s)
    again = next(
        (i for i, line in enumerate(rest) if re.search(r"\(attempt \d+\)", line.text)), None
    )
    if scenario.restarts and again is not None:
        measured |= _first("back_s", at_s, rest[again:], r"^step ")
    return measured


def _first(name: str, since_s: float, lines: Sequence[Line], pattern: str) -> dict[str, float]:
    found = next((line.at_s - since_s for line in lines if re.search(pattern, line.text)), None)
    return {} if found is None else {name: found}


def _list(codes: Sequence[int | None]) -> str:
    return ", ".join(map(str, codes))
