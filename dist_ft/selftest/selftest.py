"""A selftest: is what dist_ft promises true on this machine, or this cluster? In minutes, with a report to send back.

Runs are rehearsals (`rehearsal`): the command `dist-ft train` with real Ray workers, on GPUs with nccl, without with
gloo. Everything lies in one new folder below `run.storage`, removed at the end if all held. Reports name no node.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_ft.config.load import load_config
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, DistFtError, Interrupted
from dist_ft.core.logs import redact
from dist_ft.runtime import machine
from dist_ft.runtime.bootstrap.network_check import FILE as NETWORK
from dist_ft.runtime.preflight import check_run
from dist_ft.selftest import checks, materials, run_command
from dist_ft.selftest.checks import CHECKS, SPEED, Finding
from dist_ft.selftest.drill_scenarios import Evidence, Scenario, config_of, lanes
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import format_table
from dist_ft.training.metrics_log import read_metrics

TAIL = 30
"""Lines of a run's output that the report has of a run that failed."""


@dataclass(frozen=True)
class Report:
    """How a selftest went; `kept` is the URL of its folder, "" if that was removed."""

    made_at: str
    workers: int
    device: str
    findings: tuple[Finding, ...]
    machines: tuple[dict[str, Any], ...]
    network: dict[str, Any] | None
    settings: dict[str, Any]
    tails: dict[str, tuple[str, ...]]
    seconds: float
    kept: str

    @property
    def held(self) -> bool:
        """Whether everything that was run held."""
        return all(finding.verdict != "FAILED" for finding in self.findings)


def detect(document: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Return the config of a selftest of this machine: a worker a GPU; without GPUs two workers with gloo."""
    import torch

    gpus = torch.cuda.device_count()
    cluster = (
        {"workers": gpus, "gpus_per_worker": 1} if gpus else {"workers": 2, "cpus_per_worker": 0.5}
    )
    return load_config({**document, "cluster": cluster}, overrides)


def run(
    config: RunConfig,
    only: Sequence[str] = (),
    keep: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run all checks, or `only` those named, on the cluster and storage of `config`.

    Raises ConfigError, as `dist-ft check` would, before anything is started.
    """
    if config.min_workers == 0:
        raise ConfigError(
            [
                "cluster.workers=0: there is nothing to hold one process against; Ray workers are needed; "
                "set cluster.workers to the number of GPUs"
            ],
            "selftest",
        )
    filesystem.configure(config.storage.options)
    parent, name = (
        Store(config.run.storage),
        f"selftest-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
    )
    place, wanted = (
        parent.child(name),
        tuple(check for check in CHECKS if not only or check in only),
    )
    try:
        materials.make(place, lanes(config.min_workers))
        wrong = check_run.check(
            config_of(config, place.url, checks.plan(config.min_workers, wanted)[-1])
        )
        if wrong:
            raise ConfigError(wrong, "selftest")
        report = _Selftest(config, place, wanted, tell).run()
    except BaseException as error:
        if not keep:
            parent.remove(name)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                "the selftest was stopped; "
                + ("its folder is kept" if keep else "its folder is removed")
            ) from error
        raise
    if keep or not report.held:
        return Report(**{**vars(report), "kept": place.redacted_url()})
    parent.remove(name)
    return report


class _Selftest:
    def __init__(
        self, config: RunConfig, place: Store, wanted: Sequence[str], tell: Callable[[str], None]
    ) -> None:
        self._config = config
        self._place = place
        self._wanted = wanted
        self._tell = tell
        self._workers = config.min_workers
        self._ran: dict[str, Evidence] = {}

    def run(self) -> Report:
        begun, planned = time.monotonic(), checks.plan(self._workers, self._wanted)
        for scenario in planned:
            if scenario.name in ("killed", "resized") and self._ran["zero-3"].codes != (0,):
                continue  # nothing to compare with
            self._play(
                scenario,
                checks.resized(scenario, self._workers) if scenario.name == "resized" else None,
            )
        network = self._network()
        machines = tuple(network["machines"]) if network else (machine.describe(self._on_gpus),)
        names = [one.name for one in planned if one.name != "plain"]
        findings = [
            checks.judge(name, self._workers, self._ran, planned)
            for name in names
            if not (name == "zero-3" and "parity" not in self._wanted)
        ]
        if "collective" in self._wanted:
            findings += checks.judge_network(network)
        if "throughput" in self._wanted:
            findings.append(self._speed(machines))
        findings.sort(key=lambda finding: CHECKS.index(finding.check))
        failed = {
            finding.name if finding.name in self._ran else "zero-3"
            for finding in findings
            if finding.verdict == "FAILED"
        } | {name for name, found in self._ran.items() if found.codes[-1] != 0}
        tails = {
            name: tuple(redact(line.text) for line in self._ran[name].lines[-TAIL:])
            for name in sorted(failed)
            if name in self._ran
        }
        return Report(
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            self._workers,
            "GPU, nccl" if self._on_gpus else "CPU, gloo",
            tuple(map(_redacted, findings)),
            machines,
            _nameless(network),
            _settings(self._config),
            tails,
            round(time.monotonic() - begun, 1),
            "",
        )

    @property
    def _on_gpus(self) -> bool:
        return self._config.cluster.gpus_per_worker > 0

    def _play(self, scenario: Scenario, again: Scenario | None = None) -> Evidence:
        self._tell(f"{scenario.name}: {scenario.what} ...")
        begun, url = time.monotonic(), self._place.url
        config = config_of(self._config, url, scenario)
        found = run_command.play(
            config, scenario, self._place, config_of(self._config, url, again) if again else None
        )
        self._ran[scenario.name] = found
        codes = ", ".join("no end" if code is None else str(code) for code in found.codes)
        self._tell(
            f"  {len(found.losses)} steps, exit code {codes}, {time.monotonic() - begun:.0f} s"
        )
        return found

    def _network(self) -> dict[str, Any] | None:
        """Return what the network check of the run zero-3 kept, if it did."""
        store = self._place.child("zero-3")
        try:
            found: dict[str, Any] | None = (
                json.loads(store.read(NETWORK)) if store.exists(NETWORK) else None
            )
        except (ValueError, DistFtError):
            return None
        return found

    def _speed(self, machines: Sequence[Mapping[str, Any]]) -> Finding:
        """Run the speed run and return what it shows."""
        size = checks.size_for(machines, self._workers)
        scenario = checks.speed(self._config, self._place.url, size)
        materials.make_model(self._place, f"{SPEED}-model", size)
        batch = scenario.changes["batch"]
        materials.make_texts(self._place, 4 * batch["global_batch"] * batch["sequence_length"])
        found = self._play(scenario)
        try:
            lines = read_metrics(self._place.child(SPEED))
        except DistFtError:
            lines = []
        return checks.judge_speed(scenario, found, lines, size, machines, self._workers)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return what of the config matters to who reads the report: how it was placed and sharded; no address, no path."""
    cluster = config.cluster.model_dump(
        mode="json", exclude={"address", "network_interface"}, exclude_defaults=True
    )
    return {"cluster": cluster, "zero": config.zero.model_dump(mode="json", exclude={"nvme_path"})}


def _redacted(finding: Finding) -> Finding:
    return Finding(**{**vars(finding), "problems": tuple(map(redact, finding.problems))})


def _nameless(network: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the network check found, nodes by number."""
    if network is None:
        return None
    slow = list(network["slow"])
    for number, name in enumerate(network["nodes"]):
        slow = [line.replace(name, str(number)) for line in slow]
    kept = {key: value for key, value in network.items() if key not in ("machines", "nodes")}
    return {**kept, "num_nodes": len(network["nodes"]), "slow": slow}


def as_json(report: Report) -> str:
    """Return a report as JSON."""
    return json.dumps({"held": report.held, **asdict(report), "kept": None}, indent=1) + "\n"


def describe(report: Report) -> str:
    """Return the table a person at the terminal reads."""
    rows = [(one.name, one.verdict, one.seen or "; ".join(one.problems)) for one in report.findings]
    title = f"selftest on {report.workers} Ray worker{'s' if report.workers > 1 else ''} ({report.device})"
    said = [format_table(title, rows, ("check", "verdict", "what was seen"))]
    said += [f"{one.name} FAILED: {line}" for one in report.findings for line in one.problems]
    return "\n".join([*said, f"kept: {report.kept}"] if report.kept else said)
