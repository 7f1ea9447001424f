"""What a drill calls held, what it measured, and what it asks of the config: pure parts; and a command that never ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_ft.cli.drill import ALONE
from dist_ft.config.load import load_config
from dist_ft.selftest.drill import Finding, Report, describe
from dist_ft.selftest.drill_scenarios import (
    AGAIN,
    AT,
    EVERY,
    NAMES,
    SPARES_S,
    STEPS,
    WINDOW_S,
    Evidence,
    Line,
    config_of,
    heard_of,
    problems,
    scenarios,
    times,
)

LOSSES = tuple((step, 6.0 / step) for step in range(1, STEPS + 1))
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


def lines(*said: tuple[float, str]) -> tuple[Line, ...]:
    return tuple(Line(at, text) for at, text in said)


def scenario(name: str, workers: int = 2):
    return next(one for one in scenarios(workers) if one.name == name)


DEATH = Evidence(
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


def test_what_is_as_it_should_be_held():
    assert (
        problems(scenario("reference"), Evidence((0,), losses=LOSSES, num_attempts=1), LOSSES) == []
    )
    assert problems(scenario("death"), DEATH, LOSSES) == []
    alone = replace(DEATH, codes=(-9, 0))
    assert problems(scenario("death", 0), alone, LOSSES) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codes": (None,)}, "it had not come to its end in time (its limit stands in its output)"),
        ({"codes": (1,)}, "exit codes 1, 0 expected"),
        ({"lines": ()}, "it was not disturbed: the place was not reached"),
        ({"num_attempts": 1}, "there was no second attempt"),
        (
            {"losses": LOSSES[:-1]},
            f"metrics hold {STEPS - 1} steps, the last {STEPS - 1}; 1 to {STEPS} are needed",
        ),
        ({"losses": ()}, f"metrics hold 0 steps, the last none; 1 to {STEPS} are needed"),
        (
            {"losses": (*LOSSES[:20], *LOSSES[19:])},
            f"metrics hold {STEPS + 1} steps, the last {STEPS}; 1 to {STEPS} are needed",
        ),
        (
            {"losses": (*LOSSES[:19], (20, 0.3 + 2e-16), *LOSSES[20:])},
            "step 20: loss 0.3000000000000002, 0.3 in the undisturbed run",
        ),
        ({"ledger": "2 lost"}, "ledger: 2 lost"),
        ({"damaged": ("step-5: altered",)}, "checkpoint step-5: altered"),
    ],
)
def test_everything_else_did_not(changes, said):
    assert problems(scenario("death"), replace(DEATH, **changes), LOSSES) == [said]


def test_a_scenario_must_be_heard_of():
    quiet = replace(DEATH, num_attempts=1)
    assert problems(scenario("storage"), quiet, LOSSES) == [
        r"it did not say 'no checkpoint at step \\d+, training goes on'"
    ]
    loud = replace(
        quiet,
        lines=(*quiet.lines, Line(11, "WARNING no checkpoint at step 10, training goes on: x")),
    )
    assert problems(scenario("storage"), loud, LOSSES) == []


def test_times_are_those_of_the_next_attempt():
    assert times(scenario("death", 0), DEATH) == {"back_s": 3.5}
    rested = replace(
        DEATH,
        lines=tuple(
            Line(line.at_s + SPARES_S * (i > 2), line.text) for i, line in enumerate(DEATH.lines)
        ),
    )
    assert times(scenario("death"), rested) == {"back_s": 3.5}
    assert times(scenario("death"), replace(DEATH, lines=DEATH.lines[:3])) == {}
    assert times(scenario("reference"), replace(DEATH, lines=(), stall_s=0.01)) == {"stall_s": 0.01}
    assert heard_of(
        scenario("hang"), lines((1, "x"), (2, "rank 0 made no progress for 15 s (c"))
    ) == ("made no progress for 15 s")
    hang = replace(
        DEATH,
        lines=(
            *DEATH.lines[:3],
            Line(25, "ERROR rank 0 made no progress for 15 s"),
            *DEATH.lines[3:],
        ),
    )
    assert times(scenario("hang"), hang) == {"noticed_s": 15.0, "back_s": 3.5}
    stop = lines(
        (10, "WARNING failpoint train.step: sleep5"),
        (16, "dist-ft: stopped at step 27 of 40"),
        (20, AGAIN),
        (27, "start (attempt 2)"),
        (28, "step 28/40"),
    )
    assert times(scenario("preemption"), replace(DEATH, lines=stop)) == {
        "left_s": 6 - WINDOW_S,
        "back_s": 8.0,
    }


@pytest.mark.parametrize("workers", [0, 1, 2, 16])
def test_scenarios_fit_the_workers(workers):
    every = scenarios(workers)
    assert [one.name for one in every] == list(NAMES)
    victims = {one.failpoint.split("@")[1].split("!")[0] for one in every[1:3]}
    assert victims == {str(max(0, workers - 1))}
    assert ("!stop" in every[2].failpoint) == (workers > 1), (
        "a process alone can not notice that it is stopped"
    )
    assert [one.first_code for one in every] == (
        [0, -9, 75, 130, 0] if workers == 0 else [0, 0, 0, 130, 0]
    )


def test_a_place_is_not_reached_twice():
    """From the oldest checkpoint that can be the newest sound one at step AT, fewer than AT steps are left."""
    oldest = (AT - 1) // EVERY * EVERY - EVERY
    assert STEPS - oldest < AT <= STEPS


def test_the_config_is_the_users_cluster_and_storage_and_nothing_of_their_data():
    for one in scenarios(3):
        found = config_of(load_config(DOCUMENT), "s3://b/runs/drill-1", one)
        assert (
            found.cluster.workers == 3 and found.cluster.address == "auto" and found.zero.stage == 2
        )
        assert found.model.dtype == "bfloat16" and found.data.cache_dir == "/mnt/cache"
        assert found.storage.options == DOCUMENT["storage"]["options"]
        assert found.run_url == f"s3://b/runs/drill-1/{one.name}"
        assert found.model.path == "s3://b/runs/drill-1/model" and "secret" not in str(found)
        assert found.num_lanes % 2 == 1 and found.num_lanes > 3
        assert found.cluster.progress_timeout_s == (15 if one.name == "hang" else 600)


@pytest.mark.parametrize("workers", ["0", "2", "1024", "4..64"])
def test_without_a_config_any_number_of_workers_fits(workers):
    found = config_of(
        load_config(ALONE, [f"cluster.workers={workers}"]), "/runs/drill-1", scenario("reference")
    )
    assert found.cluster.workers == int(workers.split("..")[0]) and found.model.dtype == "float32"


def test_the_table_tells_details_only_of_what_did_not_hold():
    good = Finding("death", "killed", (), {"back_s": 3.44}, "40 steps")
    said = describe(Report(2, (good,), ""))
    assert (
        "drill on 2 Ray workers" in said
        and "first new step after 3.4 s" in said
        and "see below" not in said
    )
    bad = Finding("hang", "stopped", ("there was no second attempt",), {}, "")
    report = Report(0, (good, bad), "/runs/drill-1")
    assert not report.held
    assert describe(report).splitlines()[-4:] == [
        "hang (stopped) did not hold:",
        "  - there was no second attempt",
        "  its output: /runs/drill-1/hang.log; its run: /runs/drill-1/hang",
        "kept: /runs/drill-1",
    ]
