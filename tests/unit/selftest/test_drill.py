"""When a scenario passes, what is measured, and the configs of a drill: the pure parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_ft.cli.selftest import DEFAULT_CONFIG
from dist_ft.config.load import load_config
from dist_ft.selftest.drill import Finding, Report, describe
from dist_ft.selftest.drill_scenarios import (
    CHECKPOINT_INTERVAL,
    FAULT_STEP,
    NAMES,
    NUM_STEPS,
    RERUN_LINE,
    SIGTERM_PAUSE_S,
    SPARE_PAUSE_S,
    RunOutcome,
    TimedLine,
    find_expected_output,
    find_problems,
    measure_times,
    scenario_config,
    scenarios,
)

LOSSES = tuple((step, 6.0 / step) for step in range(1, NUM_STEPS + 1))
DOCUMENT = {
    "run": {"name": "mine", "storage": "s3://b/runs"},
    "model": {"path": "org/big", "dtype": "bfloat16"},
    "data": {"train": "s3://b/secret/*.jsonl", "cache_dir": "/mnt/cache"},
    "batch": {"global_batch": 64, "sequence_length": 4096},
    "schedule": {"epochs": 1},
    "zero": {"stage": 2},
    "cluster": {"workers": [3, 8], "address": "auto"},
    "checkpoint": {"every_steps": 100},
    "storage": {"options": {"s3": {"endpoint_url": "http://h:1"}}},
}


def lines(*items: tuple[float, str]) -> tuple[TimedLine, ...]:
    return tuple(TimedLine(at, text) for at, text in items)


def scenario(name: str, workers: int = 2):
    return next(one for one in scenarios(workers) if one.name == name)


DEATH = RunOutcome(
    (0,),
    lines(
        (1, "step 26/40 loss"),
        (10.0, "[rank 1] WARNING failpoint train.step: kill"),
        (10.1, "step 27/40 loss"),
        (12, "start  step 25 of 40 (attempt 2)"),
        (13.5, "step 26/40 loss"),
    ),
    LOSSES,
    num_checkpoints=3,
    num_attempts=2,
)


def test_sound_runs_pass():
    assert (
        find_problems(
            scenario("reference"), RunOutcome((0,), losses=LOSSES, num_attempts=1), LOSSES
        )
        == []
    )
    assert find_problems(scenario("death"), DEATH, LOSSES) == []
    alone = replace(DEATH, exit_codes=(-9, 0))
    assert find_problems(scenario("death", 0), alone, LOSSES) == []


@pytest.mark.parametrize(
    ("changes", "expected_problem"),
    [
        ({"exit_codes": (None,)}, "it did not end in time (its output names the limit)"),
        ({"exit_codes": (1,)}, "exit codes 1; expected 0"),
        ({"lines": ()}, "the fault was not injected: its step was not reached"),
        ({"num_attempts": 1}, "there was no second attempt"),
        (
            {"losses": LOSSES[:-1]},
            f"the metrics hold {NUM_STEPS - 1} steps, the last is {NUM_STEPS - 1}; "
            f"expected steps 1 to {NUM_STEPS}",
        ),
        (
            {"losses": ()},
            f"the metrics hold 0 steps, the last is none; expected steps 1 to {NUM_STEPS}",
        ),
        (
            {"losses": (*LOSSES[:20], *LOSSES[19:])},
            f"the metrics hold {NUM_STEPS + 1} steps, the last is {NUM_STEPS}; "
            f"expected steps 1 to {NUM_STEPS}",
        ),
        (
            {"losses": (*LOSSES[:19], (20, 0.3 + 2e-16), *LOSSES[20:])},
            "step 20: loss 0.3000000000000002, but 0.3 in the run without faults",
        ),
        ({"ledger_problem": "2 lost"}, "ledger: 2 lost"),
        ({"damaged_checkpoints": ("step-5: altered",)}, "checkpoint step-5: altered"),
    ],
)
def test_problem_is_found(changes, expected_problem):
    assert find_problems(scenario("death"), replace(DEATH, **changes), LOSSES) == [expected_problem]


def test_expected_output_is_required():
    quiet = replace(DEATH, num_attempts=1)
    assert find_problems(scenario("storage"), quiet, LOSSES) == [
        r"no line of its output matches 'no checkpoint at step \\d+, training continues'"
    ]
    loud = replace(
        quiet,
        lines=(
            *quiet.lines,
            TimedLine(11, "WARNING no checkpoint at step 10, training continues: x"),
        ),
    )
    assert find_problems(scenario("storage"), loud, LOSSES) == []


def test_times_are_measured_to_the_next_attempt():
    assert measure_times(scenario("death", 0), DEATH) == {"resumed_s": 3.5}
    rested = replace(
        DEATH,
        lines=tuple(
            TimedLine(line.at_s + SPARE_PAUSE_S * (i > 2), line.text)
            for i, line in enumerate(DEATH.lines)
        ),
    )
    assert measure_times(scenario("death"), rested) == {"resumed_s": 3.5}
    assert measure_times(scenario("death"), replace(DEATH, lines=DEATH.lines[:3])) == {}
    assert measure_times(scenario("reference"), replace(DEATH, lines=(), save_stall_s=0.01)) == {
        "save_stall_s": 0.01
    }
    assert find_expected_output(
        scenario("hang"), lines((1, "x"), (2, "rank 0 made no progress for 15 s (c"))
    ) == ("made no progress for 15 s")
    hang = replace(
        DEATH,
        lines=(
            *DEATH.lines[:3],
            TimedLine(25, "ERROR rank 0 made no progress for 15 s"),
            *DEATH.lines[3:],
        ),
    )
    assert measure_times(scenario("hang"), hang) == {"detected_s": 15.0, "resumed_s": 3.5}
    stop = lines(
        (10, "WARNING failpoint train.step: sleep5"),
        (16, "dist-ft: stopped at step 27 of 40"),
        (20, RERUN_LINE),
        (27, "start (attempt 2)"),
        (28, "step 28/40"),
    )
    assert measure_times(scenario("preemption"), replace(DEATH, lines=stop)) == {
        "saved_s": 6 - SIGTERM_PAUSE_S,
        "resumed_s": 8.0,
    }


@pytest.mark.parametrize("workers", [0, 1, 2, 16])
def test_scenarios_fit_the_number_of_workers(workers):
    all_scenarios = scenarios(workers)
    assert [one.name for one in all_scenarios] == list(NAMES)
    victims = {one.failpoint.split("@")[1].split("!")[0] for one in all_scenarios[1:3]}
    assert victims == {str(max(0, workers - 1))}
    assert ("!stop" in all_scenarios[2].failpoint) == (workers > 1), (
        "a process alone cannot notice that it is stopped"
    )
    assert [one.first_exit_code for one in all_scenarios] == (
        [0, -9, 75, 130, 0] if workers == 0 else [0, 0, 0, 130, 0]
    )


def test_fault_is_not_injected_twice():
    """After the oldest checkpoint that a run may resume from, fewer than FAULT_STEP steps are left."""
    oldest = (FAULT_STEP - 1) // CHECKPOINT_INTERVAL * CHECKPOINT_INTERVAL - CHECKPOINT_INTERVAL
    assert NUM_STEPS - oldest < FAULT_STEP <= NUM_STEPS


def test_config_uses_the_users_cluster_and_storage_but_not_their_data():
    for one in scenarios(3):
        config = scenario_config(load_config(DOCUMENT), "s3://b/runs/drill-1", one)
        assert (
            config.cluster.workers == 3
            and config.cluster.address == "auto"
            and config.zero.stage == 2
        )
        assert config.model.dtype == "bfloat16" and config.data.cache_dir == "/mnt/cache"
        assert config.storage.options == DOCUMENT["storage"]["options"]
        assert config.run_url == f"s3://b/runs/drill-1/{one.name}"
        assert config.model.path == "s3://b/runs/drill-1/model" and "secret" not in str(config)
        assert config.num_lanes % 2 == 1 and config.num_lanes > 3
        assert config.cluster.progress_timeout_s == (15 if one.name == "hang" else 600)


@pytest.mark.parametrize("workers", ["0", "2", "1024", "4..64"])
def test_default_config_fits_any_number_of_workers(workers):
    found = scenario_config(
        load_config(DEFAULT_CONFIG, [f"cluster.workers={workers}"]),
        "/runs/drill-1",
        scenario("reference"),
    )
    assert found.cluster.workers == int(workers.split("..")[0]) and found.model.dtype == "float32"


def test_table_has_details_of_failed_scenarios_only():
    good = Finding("death", "killed", (), {"resumed_s": 3.44}, "40 steps")
    text = describe(Report(2, (good,), ""))
    assert (
        "drill on 2 Ray workers" in text
        and "first new step after 3.4 s" in text
        and "see below" not in text
    )
    bad = Finding("hang", "stopped", ("there was no second attempt",), {}, "")
    report = Report(0, (good, bad), "/runs/drill-1")
    assert not report.passed
    assert describe(report).splitlines()[-4:] == [
        "hang (stopped) failed:",
        "  - there was no second attempt",
        "  its output: /runs/drill-1/hang.log; its run: /runs/drill-1/hang",
        "folder: /runs/drill-1",
    ]
