"""The runs and checks of a self-test: the pure parts; and that its report names no node."""

from __future__ import annotations

import json
from dataclasses import replace

from dist_ft.cli.selftest import DEFAULT_CONFIG
from dist_ft.config.load import load_config
from dist_ft.runtime.ray_backend.metrics import gauge_name
from dist_ft.selftest import checks, selftest
from dist_ft.selftest.checks import CHECKS, Finding, check_losses, check_network, plan_runs
from dist_ft.selftest.drill_scenarios import NUM_STEPS, RunOutcome, TimedLine, scenario_config
from dist_ft.selftest.report import to_markdown

LOSSES = tuple((step, 6.0 / step) for step in range(1, NUM_STEPS + 1))
RAN = RunOutcome((0,), losses=LOSSES, num_attempts=1)
KILLED = replace(RAN, lines=(TimedLine(1, "WARNING failpoint train.step: kill"),), num_attempts=2)


def with_last_loss_changed(by: float) -> tuple[tuple[int, float], ...]:
    return (*LOSSES[:-1], (NUM_STEPS, LOSSES[-1][1] + by))


def test_checks_run_what_they_need_and_all_configs_are_valid():
    assert [one.name for one in plan_runs(2, CHECKS)] == [
        "plain",
        "zero-1",
        "zero-2",
        "zero-3",
        "killed",
        "resized",
    ]
    assert [one.name for one in plan_runs(2, ("collective",))] == ["zero-3"]
    for workers in (1, 2, 8):
        base = load_config(DEFAULT_CONFIG, [f"cluster.workers={workers}", "zero.stage=2"])
        found = {
            one.name: scenario_config(base, "/runs", one) for one in plan_runs(workers, CHECKS)
        }
        assert found["plain"].max_workers == 0 and [
            found[f"zero-{stage}"].zero.stage for stage in (1, 2, 3)
        ] == [1, 2, 3]
        assert len({one.num_lanes for one in found.values()}) == 1, "the same steps in all runs"
        resized = checks.resized_scenario(plan_runs(workers, CHECKS)[-1], workers)
        assert scenario_config(base, "/runs", resized).max_workers == workers - 1
        for size in (checks.CPU_MODEL, *checks.GPU_MODELS):
            assert (
                scenario_config(
                    base, "/runs", checks.speed_scenario(base, "/runs", size)
                ).model.dtype
                == size.dtype
            )


def test_parity_and_resume_compare_with_the_right_run():
    planned = plan_runs(2, CHECKS)
    ran = {
        "plain": RAN,
        "zero-1": replace(RAN, losses=with_last_loss_changed(9e-6)),
        "zero-2": replace(RAN, losses=with_last_loss_changed(2e-5)),
        "zero-3": RAN,
        "killed": replace(KILLED, losses=with_last_loss_changed(1e-15)),
    }
    assert check_losses("zero-1", ran, planned).verdict == "passed"
    bad = check_losses("zero-2", ran, planned)
    assert bad.verdict == "FAILED" and bad.problems == (
        "losses differ by up to 2.00e-05 from those of plain; at most 1e-05 is allowed",
    )
    assert check_losses("killed", {**ran, "killed": KILLED}, planned).verdict == "passed"
    assert check_losses("killed", ran, planned).verdict == "FAILED", "it must be bit-equal"
    assert check_losses("resized", ran, planned).verdict == "not run"
    assert check_losses("zero-1", {**ran, "zero-1": RunOutcome((1,))}, planned).verdict == "FAILED"


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


def test_network_findings_name_no_node():
    assert [one.verdict for one in check_network(NETWORK)] == ["passed", "FAILED"]
    assert (
        check_network(None)[0].verdict == "FAILED"
        and check_network({**NETWORK, "sums": []})[0].verdict == "not run"
    )
    assert "secret" not in json.dumps(selftest._anonymize(NETWORK))


def test_a_node_name_that_starts_another_one_is_not_taken_for_it():
    lines = ["node node-10 is slow to 2 of 2 other nodes", "nodes node-1 and node-10: 9 MB/s"]
    network = {**NETWORK, "nodes": ["node-1", "node-10", "0"], "slow": [*lines, "node 0 is slow"]}
    anonymous = selftest._anonymize(network)
    assert anonymous is not None and anonymous["slow"] == [
        "node 1 is slow to 2 of 2 other nodes",
        "nodes 0 and 1: 9 MB/s",
        "node 2 is slow",
    ]


def test_report_as_markdown_and_json():
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
        Finding("parity", "zero-1", "passed", "equal", {"largest_difference": 0.0}),
        Finding("resume", "killed", "FAILED", "killed", problems=("exit codes 1; expected 0",)),
    )
    report = selftest.Report(
        "now",
        2,
        "CPU, gloo",
        findings,
        (machine,),
        None,
        {"cluster": {}, "zero": {"stage": 3}},
        {"killed": ("a | b",)},
        9.0,
        "/k",
    )
    assert not report.passed and json.loads(selftest.as_json(report))["folder_url"] is None
    text = to_markdown(report)
    assert (
        "# dist-ft selftest: some checks FAILED" in text
        and "| resume | killed | FAILED | killed; exit codes 1; expected 0 |" in text
    )
    assert (
        "- node 0: no GPU used; 2 of 2 cores" in text
        and "| torch | 2 |" in text
        and "## Last lines of killed" in text
    )
    assert "killed FAILED: exit codes 1; expected 0" in selftest.describe(report)


def test_speed_model_fits_the_smallest_gpu():
    gpus = [{"gpus": [{"name": "x", "memory_gib": size} for size in (80.0, 24.0)]}]
    assert checks.choose_speed_model([], 2) == checks.CPU_MODEL
    assert (
        checks.choose_speed_model(gpus, 8) == checks.GPU_MODELS[0]
        and checks.choose_speed_model(gpus, 1) == checks.GPU_MODELS[0]
    )
    assert (
        checks.choose_speed_model([{"gpus": [{"name": "x", "memory_gib": 8.0}]}], 1)
        == checks.GPU_MODELS[2]
    )


def test_speed_is_computed_from_metrics():
    scenario = checks.speed_scenario(
        load_config(DEFAULT_CONFIG, ["cluster.workers=2"]), "/runs", checks.CPU_MODEL
    )
    ran = RunOutcome((0,), ledger_problem="has no checkpoint yet")
    lines = [
        {
            "kind": "train",
            "step": step,
            "loss": 5.0 - step / 10,
            "tokens_per_s": 100.0 * step,
            "step_s": 1.0,
            "data_wait_s": 0.0,
        }
        for step in range(1, NUM_STEPS + 1)
    ]
    found = checks.check_speed(scenario, ran, lines, checks.CPU_MODEL, [], 2)
    assert found.verdict == "passed" and found.figures["tokens_per_s"] == 100.0 * (
        NUM_STEPS * 3 / 4 + 0.5
    )
    assert found.figures["tokens_per_s_per_worker"] == found.figures["tokens_per_s"] / 2
    for wrong, steps in (
        (ran, lines[:-1]),
        (ran, []),
        (RunOutcome((1,)), lines),
        (ran, lines[::-1]),
    ):
        assert (
            checks.check_speed(scenario, wrong, steps, checks.CPU_MODEL, [], 2).verdict == "FAILED"
        )
    rising = [{**line, "loss": 1.0} for line in lines]
    assert (
        "did not fall"
        in checks.check_speed(scenario, ran, rising, checks.CPU_MODEL, [], 2).problems[0]
    )


def test_gauge_names():
    assert [gauge_name("train", "loss"), gauge_name("evaluation", "f1/macro")] == [
        "dist_ft_loss",
        "dist_ft_evaluation_f1_macro",
    ]
