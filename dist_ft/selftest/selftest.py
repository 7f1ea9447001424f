"""A self-test: verify that dist_ft works correctly on this machine or cluster.

Each run is the command `dist-ft train` with real Ray workers, with nccl on GPUs and gloo without.
Everything is stored in a new folder below `run.storage`, which is removed at the end if all checks
passed. Reports contain no node names.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict, cast

from dist_ft.config.load import load_config
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, DistFtError, Interrupted
from dist_ft.core.logs import redact
from dist_ft.runtime import machine
from dist_ft.runtime.bootstrap.network_check import FILE as NETWORK_FILE
from dist_ft.runtime.bootstrap.network_check import NetworkDocument, PublicNetwork
from dist_ft.runtime.machine import NodeDescription
from dist_ft.runtime.preflight import check_run
from dist_ft.selftest import checks, materials
from dist_ft.selftest.checks import CHECKS, SPEED_RUN, Finding
from dist_ft.selftest.drill_scenarios import (
    RunOutcome,
    Scenario,
    num_lanes,
    scenario_config,
)
from dist_ft.selftest.run_command import run_scenario
from dist_ft.storage import filesystem
from dist_ft.storage.documents import read_json_object
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import format_table
from dist_ft.training.metrics_log import read_metrics

TAIL_LINES = 30
"""Lines of a failed run's output in the report."""


class Settings(TypedDict):
    """The part of the config for a report: placement and sharding, no address, no path."""

    cluster: dict[str, Any]
    zero: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The result of a self-test.

    Attributes:
        created_at: UTC, ISO 8601.
        num_workers: Ray workers.
        device: device and collectives library, for people.
        findings: results of the checks.
        machines: what each node is (`machine.describe`).
        network: network.json of the run zero-3, nodes by number; None without one.
        settings: part of the config.
        log_tails: last lines of the output of failed runs, by name.
        duration_s: duration of the self-test, in seconds.
        folder_url: URL of the self-test's folder; "" if it was removed.
    """

    created_at: str
    num_workers: int
    device: str
    findings: tuple[Finding, ...]
    machines: tuple[NodeDescription, ...]
    network: PublicNetwork | None
    settings: Settings
    log_tails: dict[str, tuple[str, ...]]
    duration_s: float
    folder_url: str

    @property
    def passed(self) -> bool:
        """Whether every check that ran passed."""
        return all(finding.verdict != "FAILED" for finding in self.findings)


def detect_config(document: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Return the config for this machine: a worker per GPU, or two workers on the CPU."""
    import torch

    # half a core each, so that Ray can place two workers on a machine with one
    num_gpus = torch.cuda.device_count()
    cluster: dict[str, float] = {"workers": 2, "cpus_per_worker": 0.5}
    if num_gpus:
        cluster = {"workers": num_gpus, "gpus_per_worker": 1}
    return load_config({**document, "cluster": cluster}, overrides)


def run(
    config: RunConfig,
    only: Sequence[str] = (),
    keep: bool = False,
    report_line: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run a self-test on the cluster and storage of `config`.

    Args:
        config: a run's config; its cluster, storage and zero sections are used.
        only: names of the checks to run; default: all.
        keep: keep the folder even if all checks passed.
        report_line: called with each line of progress.

    Raises:
        ConfigError: `dist-ft check` finds a problem. Raised before anything starts.
        Interrupted: SIGINT.
    """
    if config.min_workers == 0:
        raise ConfigError(
            [
                "cluster.workers=0: a self-test compares Ray workers with one process. At least "
                "one worker is required. Set cluster.workers to the number of GPUs."
            ],
            "selftest",
        )

    filesystem.configure(config.storage.options)
    parent = Store(config.run.storage)
    name = f"selftest-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    store = parent.child(name)
    selected = tuple(check for check in CHECKS if not only or check in only)

    try:
        materials.write_materials(store, num_lanes(config.min_workers))

        # all runs share cluster and storage, so one of them stands for all
        last_run = checks.plan_runs(config.min_workers, selected)[-1]
        problems = check_run.check(scenario_config(config, store.url, last_run))
        if problems:
            raise ConfigError(problems, "selftest")

        report = _Selftest(config, store, selected, report_line).run()
    except BaseException as error:
        if not keep:
            parent.remove(name)

        if isinstance(error, KeyboardInterrupt):
            fate = "its folder is kept" if keep else "its folder was removed"
            raise Interrupted(f"the self-test was stopped; {fate}") from error
        raise

    if keep or not report.passed:
        return replace(report, folder_url=store.redacted_url())

    parent.remove(name)
    return report


class _Selftest:
    """One self-test: runs what the selected checks need, then checks the outcomes."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        selected: Sequence[str],
        report_line: Callable[[str], None],
    ) -> None:
        self._config = config
        self._store = store
        self._selected = selected
        self._report_line = report_line
        self._num_workers = config.min_workers
        self._uses_gpus = config.cluster.gpus_per_worker > 0
        self._outcomes: dict[str, RunOutcome] = {}

    def run(self) -> Report:
        started_at = time.monotonic()
        planned = checks.plan_runs(self._num_workers, self._selected)
        for scenario in planned:
            self._run_planned(scenario)

        network = self._read_network()
        # The network check describes all nodes. Without it, the cluster is taken for this machine.
        machines: tuple[NodeDescription, ...] = (machine.describe(self._uses_gpus),)
        if network:
            machines = tuple(network["machines"])

        findings = self._check_all(planned, network, machines)
        return Report(
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            num_workers=self._num_workers,
            device="GPU, nccl" if self._uses_gpus else "CPU, gloo",
            findings=tuple(map(_redact_problems, findings)),
            machines=machines,
            network=_anonymize(network),
            settings=_settings(self._config),
            log_tails=self._log_tails(findings),
            duration_s=round(time.monotonic() - started_at, 1),
            folder_url="",
        )

    def _run_planned(self, scenario: Scenario) -> None:
        if scenario.name in ("killed", "resized") and self._outcomes["zero-3"].exit_codes != (0,):
            return  # there is nothing to compare with

        rerun = None
        if scenario.name == "resized":
            rerun = checks.resized_scenario(scenario, self._num_workers)
        self._run(scenario, rerun)

    def _run(self, scenario: Scenario, rerun: Scenario | None = None) -> RunOutcome:
        self._report_line(f"{scenario.name}: {scenario.description} ...")
        started_at = time.monotonic()
        url = self._store.url
        config = scenario_config(self._config, url, scenario)
        rerun_config = None
        if rerun:
            rerun_config = scenario_config(self._config, url, rerun)

        outcome = run_scenario(config, scenario, self._store, rerun_config)
        self._outcomes[scenario.name] = outcome

        codes = []
        for code in outcome.exit_codes:
            codes.append("killed" if code is None else str(code))
        seconds = time.monotonic() - started_at
        self._report_line(
            f"  {len(outcome.losses)} steps, exit code {', '.join(codes)}, {seconds:.0f} s"
        )
        return outcome

    def _read_network(self) -> NetworkDocument | None:
        """Return what the network check of the run zero-3 wrote, or None."""
        store = self._store.child("zero-3")
        try:
            if not store.exists(NETWORK_FILE):
                return None
            network = cast(NetworkDocument, read_json_object(store, NETWORK_FILE))
        except (ValueError, DistFtError):
            # a missing or broken file is a finding of `check_network`, not the end of the self-test
            return None
        return network

    def _check_all(
        self,
        planned: Sequence[Scenario],
        network: NetworkDocument | None,
        machines: Sequence[NodeDescription],
    ) -> list[Finding]:
        findings = []
        for scenario in planned:
            # zero-3 also runs for other checks, which need it but do not judge it
            is_reference_only = scenario.name == "zero-3" and "parity" not in self._selected
            if scenario.name != "plain" and not is_reference_only:
                findings.append(checks.check_losses(scenario.name, self._outcomes, planned))

        if "collective" in self._selected:
            findings += checks.check_network(network)
        if "throughput" in self._selected:
            findings.append(self._measure_speed(machines))

        # stable: within a check, the order of the runs remains
        return sorted(findings, key=lambda finding: CHECKS.index(finding.check))

    def _measure_speed(self, machines: Sequence[NodeDescription]) -> Finding:
        # This run comes last: the size of its model depends on the GPUs that the runs before found.
        size = checks.choose_speed_model(machines, self._num_workers)
        scenario = checks.speed_scenario(self._config, self._store.url, size)
        materials.write_model(self._store, f"{SPEED_RUN}-model", size)

        batch = scenario.overrides["batch"]
        # four steps' worth; the data is repeated after that
        num_tokens = 4 * batch["global_batch"] * batch["sequence_length"]
        materials.write_texts(self._store, num_tokens)

        outcome = self._run(scenario)
        try:
            lines = read_metrics(self._store.child(SPEED_RUN))
        except DistFtError:
            lines = []
        return checks.check_speed(scenario, outcome, lines, size, machines, self._num_workers)

    def _log_tails(self, findings: Sequence[Finding]) -> dict[str, tuple[str, ...]]:
        """Return the last lines of the runs that failed, or whose findings failed."""
        failed = {name for name, run in self._outcomes.items() if run.exit_codes[-1] != 0}
        for finding in findings:
            if finding.verdict == "FAILED":
                # Findings on the network come from the run zero-3.
                run_name = finding.name if finding.name in self._outcomes else "zero-3"
                failed.add(run_name)

        tails = {}
        # zero-3 may not have run at all
        for name in sorted(failed & self._outcomes.keys()):
            lines = self._outcomes[name].lines[-TAIL_LINES:]
            tails[name] = tuple(redact(line.text) for line in lines)
        return tails


def _settings(config: RunConfig) -> Settings:
    cluster = config.cluster.model_dump(
        mode="json", exclude={"address", "network_interface"}, exclude_defaults=True
    )
    return {"cluster": cluster, "zero": config.zero.model_dump(mode="json", exclude={"nvme_path"})}


def _redact_problems(finding: Finding) -> Finding:
    return replace(finding, problems=tuple(map(redact, finding.problems)))


def _anonymize(network: NetworkDocument | None) -> PublicNetwork | None:
    """Return what the network check found, with nodes by number."""
    if network is None:
        return None

    number_of: dict[str, int] = {}
    for number, name in enumerate(network["nodes"]):
        number_of.setdefault(name, number)

    # All names in one pass, and whole words only: node-1 is also the start of node-10, and a number
    # that was put in must not be taken for a name.
    alternatives = "|".join(map(re.escape, number_of))
    names = re.compile(rf"(?<!\S)({alternatives})(?=[\s:]|$)")

    # a report is pasted into public issues; links name nodes by number already
    slow = [names.sub(lambda match: str(number_of[match[0]]), line) for line in network["slow"]]
    return PublicNetwork(
        world_size=network["world_size"],
        sums=network["sums"],
        links=network["links"],
        slow=slow,
        seconds=network["seconds"],
        backend=network["backend"],
        num_nodes=len(network["nodes"]),
    )


def as_json(report: Report) -> str:
    """Return a report as JSON, without the URL of its folder."""
    document = {"passed": report.passed, **asdict(report), "folder_url": None}
    return json.dumps(document, indent=1) + "\n"


def describe(report: Report) -> str:
    """Return the table for the terminal, and the problems of failed checks."""
    rows = []
    for finding in report.findings:
        result = finding.result or "; ".join(finding.problems)
        rows.append((finding.name, finding.verdict, result))

    plural = "s" if report.num_workers > 1 else ""
    title = f"selftest on {report.num_workers} Ray worker{plural} ({report.device})"
    lines = [format_table(title, rows, ("check", "verdict", "result"))]

    for finding in report.findings:
        lines += [f"{finding.name} FAILED: {problem}" for problem in finding.problems]

    if report.folder_url:
        lines.append(f"folder: {report.folder_url}")
    return "\n".join(lines)
