"""A drill: short runs with faults on the user's own cluster and storage.

Each run is the command `dist-ft train`, as a person would start it. Everything is stored in a new
folder below `run.storage`, which is removed at the end if all scenarios passed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, Interrupted
from dist_ft.core.logs import redact
from dist_ft.runtime.preflight import check_run
from dist_ft.selftest import materials
from dist_ft.selftest.drill_scenarios import (
    RunOutcome,
    Scenario,
    StepLoss,
    find_expected_output,
    find_problems,
    measure_times,
    num_lanes,
    scenario_config,
    scenarios,
)
from dist_ft.selftest.run_command import run_scenario
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import format_table


@dataclass(frozen=True)
class Finding:
    """The result of one scenario.

    Attributes:
        name: the scenario's.
        description: what was done to the run.
        problems: what went wrong; empty: it passed.
        times: measured seconds (`measure_times`).
        result: what was observed if it passed.
    """

    name: str
    description: str
    problems: tuple[str, ...]
    times: dict[str, float] = field(default_factory=dict)
    result: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong."""
        return not self.problems


@dataclass(frozen=True)
class Report:
    """The result of a drill; `folder_url` is the URL of its folder, "" if that was removed."""

    num_workers: int
    findings: tuple[Finding, ...]
    folder_url: str

    @property
    def passed(self) -> bool:
        """Whether all scenarios passed."""
        return all(finding.passed for finding in self.findings)


def run(
    config: RunConfig,
    only: Sequence[str] = (),
    keep: bool = False,
    report_line: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run a drill on the cluster and storage of `config`.

    Args:
        config: a run's config; its cluster, storage and zero sections are used.
        only: names of the scenarios to run after the run without faults; default: all.
        keep: keep the folder even if all scenarios passed.
        report_line: called with each line of progress.

    Raises:
        ConfigError: `dist-ft check` finds a problem. Raised before anything starts.
        Interrupted: SIGINT.
    """
    # before the first `Store`: the drill itself writes to the run's storage
    filesystem.configure(config.storage.options)
    parent = Store(config.run.storage)

    # the process id: two drills that start in the same second get two folders
    name = f"drill-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        findings = _run_all(config, parent.child(name), only, report_line)
    except BaseException as error:
        # also on Ctrl-C. A folder of a drill that did not run to its end helps nobody.
        if not keep:
            parent.remove(name)

        if isinstance(error, KeyboardInterrupt):
            fate = "its folder is kept" if keep else "its folder was removed"
            raise Interrupted(f"the drill was stopped; {fate}") from error
        raise

    report = Report(config.min_workers, tuple(findings), parent.child(name).redacted_url())
    if keep or not report.passed:
        return report

    parent.remove(name)
    return Report(config.min_workers, tuple(findings), "")


def _run_all(
    config: RunConfig, store: Store, only: Sequence[str], report_line: Callable[[str], None]
) -> list[Finding]:
    reference, *others = scenarios(config.min_workers)
    selected = [scenario for scenario in others if not only or scenario.name in only]

    # before the check, which opens model and data
    materials.write_materials(store, num_lanes(config.min_workers))
    problems = check_run.check(scenario_config(config, store.url, reference))
    if problems:
        raise ConfigError(problems, "drill")

    findings: list[Finding] = []
    expected_losses: tuple[StepLoss, ...] = ()
    for scenario in (reference, *selected):
        report_line(f"{scenario.name}: {scenario.description} ...")
        outcome = run_scenario(scenario_config(config, store.url, scenario), scenario, store)
        # the first run is the one without faults
        expected_losses = expected_losses or outcome.losses

        finding = _check(scenario, outcome, expected_losses)
        findings.append(finding)
        report_line("  passed" if finding.passed else f"  FAILED: {'; '.join(finding.problems)}")

        if not findings[0].passed:
            break  # there is nothing to compare with
    return findings


def _check(
    scenario: Scenario, outcome: RunOutcome, expected_losses: tuple[StepLoss, ...]
) -> Finding:
    problems = find_problems(scenario, outcome, expected_losses)
    result = "" if problems else _summarize(scenario, outcome)
    return Finding(
        scenario.name,
        scenario.description,
        tuple(map(redact, problems)),
        measure_times(scenario, outcome),
        result,
    )


def _summarize(scenario: Scenario, outcome: RunOutcome) -> str:
    """Return what a run showed that passed."""
    facts = [f"{len(outcome.losses)} steps"]
    if scenario.failpoint:
        facts.append("losses equal to the last bit")

    facts.append("every sample counted once")

    plural = "" if outcome.num_attempts == 1 else "s"
    sections = [
        find_expected_output(scenario, outcome.lines),
        ", ".join(facts),
        f"{outcome.num_checkpoints} checkpoints intact",
        f"{outcome.num_attempts} attempt{plural}",
    ]
    return "; ".join(filter(None, sections))


def as_json(report: Report) -> str:
    """Return a report as JSON: passed, num_workers, folder_url, and a finding for each scenario."""
    # `passed` is a property, which asdict does not include
    findings = [{"passed": finding.passed, **asdict(finding)} for finding in report.findings]
    document = {"passed": report.passed, **asdict(report), "findings": findings}
    return json.dumps(document, indent=1) + "\n"


def describe(report: Report) -> str:
    """Return the table for the terminal, and details of the scenarios that failed."""
    rows = []
    for finding in report.findings:
        passed = "yes" if finding.passed else "NO"
        result = finding.result or "see below"
        rows.append((finding.name, passed, _format_times(finding), result))
    title = f"drill on {_workers_text(report.num_workers)}"
    lines = [format_table(title, rows, ("scenario", "passed", "time", "result"))]

    # the folder is kept if a scenario failed, so its URL is known here
    for finding in report.findings:
        if not finding.passed:
            lines.append(f"{finding.name} ({finding.description}) failed:")
            for problem in finding.problems:
                lines.append(f"  - {problem}")
            output = f"{report.folder_url}/{finding.name}.log"
            lines.append(f"  its output: {output}; its run: {report.folder_url}/{finding.name}")
    if report.folder_url:
        lines.append(f"folder: {report.folder_url}")
    return "\n".join(lines)


def _workers_text(num_workers: int) -> str:
    if num_workers == 0:
        return "one process"
    plural = "s" if num_workers > 1 else ""
    return f"{num_workers} Ray worker{plural}"


def _format_times(finding: Finding) -> str:
    formats = {
        "detected_s": "detected after {:.1f} s",
        "saved_s": "saved after {:.1f} s",
        "resumed_s": "first new step after {:.1f} s",
    }

    times = finding.times
    texts = []
    for name, text in formats.items():
        if name in times:
            texts.append(text.format(times[name]))

    # the run without faults has only the time of its saves to show
    if not texts and "save_stall_s" in times:
        texts.append(f"a save stops training for {1000 * times['save_stall_s']:.0f} ms")
    return "; ".join(texts)
