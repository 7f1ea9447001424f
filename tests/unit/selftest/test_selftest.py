"""What a selftest runs and makes of it: pure parts; and that its report names no node."""

from __future__ import annotations

import json
from dataclasses import replace

from dist_ft.cli.drill import ALONE
from dist_ft.config.load import load_config
from dist_ft.runtime.ray_backend.metrics import gauge_name
from dist_ft.selftest import checks, selftest
from dist_ft.selftest.checks import CHECKS, Finding, judge, judge_network, plan
from dist_ft.selftest.drill_scenarios import STEPS, Evidence, Line, config_of
from dist_ft.selftest.report import to_markdown

LOSSES = tuple((step, 6.0 / step) for step in range(1, STEPS + 1))
RAN = Evidence((0,), losses=LOSSES, num_attempts=1)
KILLED = replace(RAN, lines=(Line(1, "WARNING failpoint train.step: kill"),), num_attempts=2)


def moved(by: float) -> tuple[tuple[int, float], ...]:
    return (*LOSSES[:-1], (STEPS, LOSSES[-1][1] + by))


def test_each_check_runs_what_it_needs_and_every_config_is_sound():
    assert [one.name for one in plan(2, CHECKS)] == [
        "plain",
        "zero-1",
        "zero-2",
        "zero-3",
        "killed",
        "resized",
    ]
    assert [one.name for one in plan(2, ("collective",))] == ["zero-3"]
    for workers in (1, 2, 8):
        base = load_config(ALONE, [f"cluster.workers={workers}", "zero.stage=2"])
        found = {one.name: config_of(base, "/runs", one) for one in plan(workers, CHECKS)}
        assert found["plain"].max_workers == 0 and [
            found[f"zero-{stage}"].zero.stage for stage in (1, 2, 3)
        ] == [1, 2, 3]
        assert len({one.num_lanes for one in found.values()}) == 1, "the same steps for all"
        resized = checks.resized(plan(workers, CHECKS)[-1], workers)
        assert config_of(base, "/runs", resized).max_workers == workers - 1
        for size in (checks.CPU_SIZE, *checks.GPU_SIZES):
            assert (
                config_of(base, "/runs", checks.speed(base, "/runs", size)).model.dtype
                == size.dtype
            )


def test_parity_and_resume_are_held_against_the_right_run():
    planned = plan(2, CHECKS)
    ran = {
        "plain": RAN,
        "zero-1": replace(RAN, losses=moved(9e-6)),
        "zero-2": replace(RAN, losses=moved(2e-5)),
        "zero-3": RAN,
        "killed": replace(KILLED, losses=moved(1e-15)),
    }
    assert judge("zero-1", 2, ran, planned).verdict == "held"
    bad = judge("zero-2", 2, ran, planned)
    assert bad.verdict == "FAILED" and bad.problems == (
        "losses differ by up to 2.00e-05 from those of plain; at most 1e-05 is right",
    )
    assert judge("killed", 2, {**ran, "killed": KILLED}, planned).verdict == "held"
    assert judge("killed", 2, ran, planned).verdict == "FAILED", "the last bit counts"
    assert judge("resized", 2, ran, planned).verdict == "not run"
    assert judge("zero-1", 2, {**ran, "zero-1": Evidence((1,))}, planned).verdict == "FAILED"


NETWORK = {
    "backend": "gloo",
    "world_size": 2,
    "nodes": ["secret-a", "secret-b"],
    "machines": [],
    "seconds": 1.0,
    "sums": [{"num_bytes": 2**22, "seconds": 0.01, "mb_s": 400.0}],
    "links": [{"one": 0, "other": 1, "mb_s": 9.0}],
    "slow": ["nodes secret-a and secret-b: 9 MB/s each way"],
}


def test_what_the_network_check_kept_is_judged_and_told_without_names():
    assert [one.verdict for one in judge_network(NETWORK)] == ["held", "FAILED"]
    assert (
        judge_network(None)[0].verdict == "FAILED"
        and judge_network({**NETWORK, "sums": []})[0].verdict == "not run"
    )
    assert "secret" not in json.dumps(selftest._nameless(NETWORK))


def test_the_report_as_text_and_json():
    machine = {
        "gpus": [],
        "cpus": 2,
        "cpus_usable": 2,
        "memory_gib": 8.0,
        "os": "Linux",
        "python": "3.11",
        "versions": {"torch": "2"},
    }
    findings = (
        Finding("parity", "zero-1", "held", "equal", {"largest_difference": 0.0}),
        Finding("resume", "killed", "FAILED", "killed", problems=("exit codes 1, 0 expected",)),
    )
    report = selftest.Report(
        "now",
        2,
        "CPU, gloo",
        findings,
        (machine,),
        None,
        {"zero": {"stage": 3}},
        {"killed": ("a | b",)},
        9.0,
        "/k",
    )
    assert not report.held and json.loads(selftest.as_json(report))["kept"] is None
    text = to_markdown(report)
    assert (
        "# dist-ft selftest: something FAILED" in text
        and "| resume | killed | FAILED | killed; exit codes 1, 0 expected |" in text
    )
    assert (
        "- node 0: no GPU used; 2 of 2 cores" in text
        and "| torch | 2 |" in text
        and "## Last lines of killed" in text
    )
    assert "killed FAILED: exit codes 1, 0 expected" in selftest.describe(report)


def test_the_model_for_speed_fits_the_smallest_gpu():
    gpus = [{"gpus": [{"name": "x", "memory_gib": size} for size in (80.0, 24.0)]}]
    assert checks.size_for([], 2) == checks.CPU_SIZE
    assert (
        checks.size_for(gpus, 8) == checks.GPU_SIZES[0]
        and checks.size_for(gpus, 1) == checks.GPU_SIZES[0]
    )
    assert checks.size_for([{"gpus": [{"name": "x", "memory_gib": 8.0}]}], 1) == checks.GPU_SIZES[2]


def test_speed_is_judged_by_its_metrics_for_it_commits_nothing():
    scenario = checks.speed(load_config(ALONE, ["cluster.workers=2"]), "/runs", checks.CPU_SIZE)
    ran = Evidence((0,), ledger="has no checkpoint yet")
    lines = [
        {
            "kind": "train",
            "step": step,
            "loss": 5.0 - step / 10,
            "tokens_per_s": 100.0 * step,
            "step_s": 1.0,
            "data_wait_s": 0.0,
        }
        for step in range(1, STEPS + 1)
    ]
    found = checks.judge_speed(scenario, ran, lines, checks.CPU_SIZE, [], 2)
    assert found.verdict == "held" and found.figures["tokens_per_s"] == 100.0 * (
        STEPS * 3 / 4 + 0.5
    )
    assert found.figures["tokens_per_s_a_worker"] == found.figures["tokens_per_s"] / 2
    for wrong, steps in ((ran, lines[:-1]), (ran, []), (Evidence((1,)), lines), (ran, lines[::-1])):
        assert (
            checks.judge_speed(scenario, wrong, steps, checks.CPU_SIZE, [], 2).verdict == "FAILED"
        )
    rising = [{**line, "loss": 1.0} for line in lines]
    assert (
        "did not fall"
        in checks.judge_speed(scenario, ran, rising, checks.CPU_SIZE, [], 2).problems[0]
    )


def test_names_of_gauges():
    assert [gauge_name("train", "loss"), gauge_name("evaluation", "f1/macro")] == [
        "dist_ft_loss",
        "dist_ft_evaluation_f1_macro",
    ]
