"""One trial of a search: an ordinary run that reports its evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.manifest import parse_folder
from dist_ft.config.schema import RunConfig
from dist_ft.core.logs import redact
from dist_ft.metrics import best
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.metrics_log import read_metrics

RESULT_FILE = "trial.json"
"""File of a trial's run with its last step ({"step"}), or why it failed ({"error"})."""
MAX_ERROR_CHARS = 400


@dataclass(frozen=True)
class Trial:
    """What is known about a trial.

    Attributes:
        number: number of the trial; its run is <name>-t<number>.
        values: values of the searched fields.
        state: running, done, stopped (early) or failed.
        reports: (step, best value so far) of each evaluation after step 0.
        seconds: running time over all its starts.
        error: why it failed.
    """

    number: int
    values: dict[str, Any]
    state: str = "running"
    reports: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    error: str = ""

    @property
    def value(self) -> float | None:
        """The best value of checkpoint.best_by; None before the first evaluation."""
        if not self.reports:
            return None
        return self.reports[-1][1]

    @property
    def step(self) -> int:
        """The step of the last evaluation."""
        if not self.reports:
            return 0
        return self.reports[-1][0]


def run_trial(config: RunConfig, report: Callable[[int, float], None]) -> None:
    """Run or resume a trial in this process.

    Args:
        config: config of the trial.
        report: receives (step, best value so far) of each evaluation. Evaluations of earlier starts
            up to the latest checkpoint are reported first.
    """
    from dist_ft.runtime import local
    from dist_ft.training.callbacks import Callback, CallbackList
    from dist_ft.training.run_context import RunContext

    metric = config.checkpoint.best_by
    values: list[float] = []

    def report_evaluation(step: int, metrics: Mapping[str, float]) -> None:
        values.append(metrics[metric])
        if step:  # an evaluation before training is not a result
            report(step, min(values, key=lambda value: best.sort_key(metric, value)))

    class ReportEvaluation(Callback):
        def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
            report_evaluation(step, metrics)

    filesystem.configure(config.storage.options)
    store = Store(config.run_url)
    # The scheduler and the journal forgot the reports of earlier starts. What came after the latest
    # checkpoint is trained and evaluated again.
    for line in _committed_evaluations(store):
        if line.get(metric) is not None:
            report_evaluation(int(line["step"]), line)

    try:
        result = local.run(config, RunContext(callbacks=CallbackList([ReportEvaluation()])))
    except Exception as error:
        # the search reads the reason here: the event that a trial failed does not carry it
        _write_result(store, {"error": _last_line(error)})
        raise
    _write_result(store, {"step": result.step})


def _committed_evaluations(store: Store) -> list[dict[str, Any]]:
    """Return the evaluations up to the latest checkpoint of a run."""
    names = discovery.list_committed(store)
    if not names:
        return []

    parsed = parse_folder(names[0])
    latest_step = parsed[0] if parsed else 0
    evaluations = []
    for line in read_metrics(store, latest_step):
        if line["kind"] == "evaluation" and line["step"] <= latest_step:
            evaluations.append(line)
    return evaluations


def _last_line(error: Exception) -> str:
    # the last line is a problem of a list ("- ..."), or the cause at the end of a longer text
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = type(error).__name__
    if lines:
        text = lines[-1].removeprefix("- ")
    return redact(text)[:MAX_ERROR_CHARS]


def _write_result(store: Store, result: dict[str, Any]) -> None:
    store.write(RESULT_FILE, json.dumps(result).encode())
