"""A drill: short runs on the user's own cluster and storage, disturbed one way after the other, and held to account.

Each run is a rehearsal (`rehearsal`): the command `dist-ft train`, as a person would start it. Everything lies in one
new folder below `run.storage`, removed at the end if all held.
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
from dist_ft.selftest import materials, run_command
from dist_ft.selftest.drill_scenarios import (
    Evidence,
    Scenario,
    config_of,
    heard_of,
    lanes,
    problems,
    scenarios,
    times,
)
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import table


@dataclass(frozen=True)
class Finding:
    """How one scenario went: what did not hold (nothing: it held), seconds measured, what was seen where it held."""

    name: str
    what: str
    problems: tuple[str, ...]
    times: dict[str, float] = field(default_factory=dict)
    seen: str = ""

    @property
    def held(self) -> bool:
        """Whether it held."""
        return not self.problems


@dataclass(frozen=True)
class Report:
    """How a drill went; `kept` is the URL of its folder, "" if that was removed."""

    workers: int
    findings: tuple[Finding, ...]
    kept: str

    @property
    def held(self) -> bool:
        """Whether everything held."""
        return all(finding.held for finding in self.findings)


def run(
    config: RunConfig,
    only: Sequence[str] = (),
    keep: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Report:
    """Drill on the cluster and storage of `config`: the undisturbed run, then all scenarios or `only` those named.

    Raises ConfigError, as `dist-ft check` would, before anything is started.
    """
    filesystem.configure(config.storage.options)
    parent, name = (
        Store(config.run.storage),
        f"drill-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
    )
    place = parent.child(name)
    first, *others = scenarios(config.min_workers)
    found: list[Finding] = []
    try:
        materials.make(place, lanes(config.min_workers))
        wrong = check_run.check(config_of(config, place.url, first))
        if wrong:
            raise ConfigError(wrong, "drill")
        wanted: tuple[tuple[int, float | None], ...] = ()
        for scenario in (first, *(one for one in others if not only or one.name in only)):
            tell(f"{scenario.name}: {scenario.what} ...")
            evidence = run_command.play(config_of(config, place.url, scenario), scenario, place)
            wanted = wanted or evidence.losses
            found.append(_judge(scenario, evidence, wanted))
            tell("  held" if found[-1].held else f"  did NOT hold: {'; '.join(found[-1].problems)}")
            if not found[0].held:
                break  # nothing to compare with
    except BaseException as error:
        if not keep:
            parent.remove(name)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                "the drill was stopped; "
                + ("its folder is kept" if keep else "its folder is removed")
            ) from error
        raise
    kept = keep or not all(finding.held for finding in found)
    if not kept:
        parent.remove(name)
    return Report(config.min_workers, tuple(found), place.shown() if kept else "")


def _judge(
    scenario: Scenario, evidence: Evidence, wanted: tuple[tuple[int, float | None], ...]
) -> Finding:
    wrong, attempts = problems(scenario, evidence, wanted), evidence.num_attempts
    heard = [f"{text}; " for text in (heard_of(scenario, evidence.lines),) if text]
    equal = "losses equal to the last bit, " if scenario.failpoint else ""
    seen = (
        ""
        if wrong
        else "".join(heard)
        + (
            f"{len(evidence.losses)} steps, {equal}every sample once; {evidence.num_checkpoints} checkpoints "
            f"sound; {attempts} attempt{'s' if attempts != 1 else ''}"
        )
    )
    return Finding(
        scenario.name, scenario.what, tuple(map(redact, wrong)), times(scenario, evidence), seen
    )


def as_json(report: Report) -> str:
    """Return a report as JSON: held, workers, kept, and a finding a scenario."""
    findings = [{"held": one.held, **asdict(one)} for one in report.findings]
    return (
        json.dumps({"held": report.held, **asdict(report), "findings": findings}, indent=1) + "\n"
    )


def describe(report: Report) -> str:
    """Return the table a person reads, and details of what did not hold."""
    rows = [
        (one.name, "yes" if one.held else "NO", _times(one), one.seen or "see below")
        for one in report.findings
    ]
    workers = report.workers
    where = f"{workers} Ray worker{'s' if workers > 1 else ''}" if workers else "one process"
    said = [table(f"drill on {where}", rows, ("scenario", "held", "time", "what was seen"))]
    for one in report.findings:
        if not one.held:
            said += [
                f"{one.name} ({one.what}) did not hold:",
                *(f"  - {text}" for text in one.problems),
                f"  its output: {report.kept}/{one.name}.log; its run: {report.kept}/{one.name}",
            ]
    if report.kept:
        said.append(f"kept: {report.kept}")
    return "\n".join(said)


def _times(finding: Finding) -> str:
    meanings = {
        "noticed_s": "noticed after {:.1f} s",
        "left_s": "saved after {:.1f} s",
        "back_s": "first new step after {:.1f} s",
    }
    said = [
        text.format(finding.times[key]) for key, text in meanings.items() if key in finding.times
    ]
    if not said and "stall_s" in finding.times:
        said.append(f"a save stops training for {1000 * finding.times['stall_s']:.0f} ms")
    return "; ".join(said)
