"""A drill: short runs on the user's own cluster and storage, disturbed one way after the other, and held to account.

Each run is the command `dist-ft train` in a process of its own, as a person would start it; what it is disturbed with
is a failpoint that the command hands to its workers. Everything lies in one new folder below `run.storage`, removed at
the end if all held. Guarantees: no command outlives its time or this process's interruption.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_ft import storage
from dist_ft.config.load import resolved_yaml
from dist_ft.config.schema import RunConfig
from dist_ft.errors import ConfigError, DistFtError, Interrupted
from dist_ft.logs import redact
from dist_ft.runtime import accounts, audit, drill_material, preflight, runs
from dist_ft.runtime.drill_scenarios import (
    AGAIN,
    Evidence,
    Line,
    Scenario,
    config_of,
    heard_of,
    lanes,
    problems,
    scenarios,
    times,
)
from dist_ft.storage import Store
from dist_ft.train.console import table
from dist_ft.train.metrics import read_metrics

LIMIT_S = 600.0
"""Seconds a command may take, besides what workers may take to start."""
LEAVE_S = 30.0


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


def run(config: RunConfig, only: Sequence[str] = (), keep: bool = False,
        tell: Callable[[str], None] = lambda text: None) -> Report:
    """Drill on the cluster and storage of `config`: the undisturbed run, then all scenarios or `only` those named.

    Raises ConfigError, as `dist-ft check` would, before anything is started.
    """
    storage.configure(config.storage.options)
    parent, name = Store(config.run.storage), f"drill-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    place = parent.child(name)
    first, *others = scenarios(config.min_workers)
    found: list[Finding] = []
    try:
        drill_material.make(place, lanes(config.min_workers))
        wrong = preflight.check(config_of(config, place.url, first))
        if wrong:
            raise ConfigError(wrong, "drill")
        wanted: tuple[tuple[int, float | None], ...] = ()
        for scenario in (first, *(one for one in others if not only or one.name in only)):
            tell(f"{scenario.name}: {scenario.what} ...")
            evidence = _play(config_of(config, place.url, scenario), scenario, place)
            wanted = wanted or evidence.losses
            found.append(_judge(scenario, evidence, wanted))
            tell("  held" if found[-1].held else f"  did NOT hold: {'; '.join(found[-1].problems)}")
            if not found[0].held:
                break  # nothing to compare with
    except BaseException as error:
        if not keep:
            parent.remove(name)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("the drill was stopped; " + ("its folder is kept" if keep else "its folder is removed")
                              ) from error
        raise
    kept = keep or not all(finding.held for finding in found)
    if not kept:
        parent.remove(name)
    return Report(config.min_workers, tuple(found), place.shown() if kept else "")


def _judge(scenario: Scenario, evidence: Evidence, wanted: tuple[tuple[int, float | None], ...]) -> Finding:
    wrong, attempts = problems(scenario, evidence, wanted), evidence.num_attempts
    heard = [f"{text}; " for text in (heard_of(scenario, evidence.lines),) if text]
    equal = "losses equal to the last bit, " if scenario.failpoint else ""
    seen = "" if wrong else "".join(heard) + (
        f"{len(evidence.losses)} steps, {equal}every sample once; {evidence.num_checkpoints} checkpoints "
        f"sound; {attempts} attempt{'s' if attempts != 1 else ''}")
    return Finding(scenario.name, scenario.what, tuple(map(redact, wrong)), times(scenario, evidence), seen)


def _play(config: RunConfig, scenario: Scenario, place: Store) -> Evidence:
    """Run a scenario to its end and return what it left behind."""
    begun, lines, codes = time.monotonic(), list[Line](), list[int | None]()
    limit_s = LIMIT_S + config.cluster.start_timeout_s
    with tempfile.TemporaryDirectory(prefix="dist_ft-drill-") as folder:
        path = Path(folder) / f"{scenario.name}.yaml"
        path.write_text(resolved_yaml(config))
        command = [sys.executable, "-m", "dist_ft.cli", "train", str(path), "--skip-check"]
        disturbed = {"DIST_FT_FAILPOINT": scenario.failpoint} if scenario.failpoint else {}
        codes.append(follow(command, disturbed, limit_s, begun, lines, scenario.terminate))
        if codes[0] == scenario.first_code != 0:
            lines.append(Line(time.monotonic() - begun, AGAIN))
            codes.append(follow(command, {}, limit_s, begun, lines))
    place.write(f"{scenario.name}.log", "".join(f"{line.at_s:8.2f} {redact(line.text)}\n" for line in lines).encode())
    return _evidence(config.run_url, codes, lines)


def follow(command: Sequence[str], environment: dict[str, str], limit_s: float, begun: float, lines: list[Line],
           terminate: bool = False) -> int | None:
    """Run `command` to its end, adding what it says to `lines`; return its exit code, None if it had to be ended.

    Args:
        command: what to run.
        environment: variables besides this process's own; failpoints of this process's own are not passed on.
        limit_s: seconds until it is ended.
        begun: the steady clock's time that lines count from.
        lines: what it says is added here.
        terminate: send it SIGTERM when it tells of a failpoint.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith("DIST_FT_FAILPOINT")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               env={"OMP_NUM_THREADS": "1", **own, **environment}, start_new_session=True)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(Line(time.monotonic() - begun, line.rstrip("\n")))
            if terminate and "failpoint " in line:
                process.terminate()

    reader = threading.Thread(target=read, name="drill", daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
        lines.append(Line(time.monotonic() - begun, f"drill: no end within {limit_s:.0f} s; it is ended"))
    finally:
        _end(process)
    reader.join(LEAVE_S)
    return code


def _end(process: subprocess.Popen[Any]) -> None:
    """End a command that still runs: first as a person would, then with all it has started."""
    if process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LEAVE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _evidence(url: str, codes: Sequence[int | None], lines: Sequence[Line]) -> Evidence:
    """Return what lies in the storage of a run that has ended; what can not be read is evidence too."""
    store = Store(url)
    try:
        losses = tuple((line["step"], line["loss"]) for line in read_metrics(store) if line["kind"] == "train")
        checked = list(runs.verify(url))
        times_kept, _ = accounts.accounts(store)
        counted = audit.audit(url)
    except (DistFtError, KeyError) as error:
        return Evidence(tuple(codes), tuple(lines), ledger=f"what the run left can not be read ({error})")
    return Evidence(tuple(codes), tuple(lines), losses, "" if counted.is_sound else audit.describe(counted),
                    tuple(f"{name}: {wrong}" for name, wrong in checked if wrong), len(checked),
                    len(runs.attempts(store)), accounts.stall_s(times_kept))


def as_json(report: Report) -> str:
    """Return a report as JSON: held, workers, kept, and a finding a scenario."""
    findings = [{"held": one.held, **asdict(one)} for one in report.findings]
    return json.dumps({"held": report.held, **asdict(report), "findings": findings}, indent=1) + "\n"


def describe(report: Report) -> str:
    """Return the table a person reads, and details of what did not hold."""
    rows = [(one.name, "yes" if one.held else "NO", _times(one), one.seen or "see below") for one in report.findings]
    workers = report.workers
    where = f"{workers} Ray worker{'s' if workers > 1 else ''}" if workers else "one process"
    said = [table(f"drill on {where}", rows, ("scenario", "held", "time", "what was seen"))]
    for one in report.findings:
        if not one.held:
            said += [f"{one.name} ({one.what}) did not hold:", *(f"  - {text}" for text in one.problems),
                     f"  its output: {report.kept}/{one.name}.log; its run: {report.kept}/{one.name}"]
    if report.kept:
        said.append(f"kept: {report.kept}")
    return "\n".join(said)


def _times(finding: Finding) -> str:
    meanings = {"noticed_s": "noticed after {:.1f} s", "left_s": "saved after {:.1f} s",
                "back_s": "first new step after {:.1f} s"}
    said = [text.format(finding.times[key]) for key, text in meanings.items() if key in finding.times]
    if not said and "stall_s" in finding.times:
        said.append(f"a save stops training for {1000 * finding.times['stall_s']:.0f} ms")
    return "; ".join(said)
