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

ENDED = "trial.json"
"""File of a trial's run that says that it came to its end, or why it failed."""


@dataclass(frozen=True)
class Trial:
    """One trial, as far as it is known.

    Attributes:
        number: of the trial: its run is <name>-t<number>.
        values: of the fields that are searched.
        state: running, done, stopped (early), failed.
        reports: (step, best value so far) of each evaluation after step 0.
        seconds: it ran for, over all starts.
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
        """The best value of checkpoint.best_by; None before an evaluation."""
        return self.reports[-1][1] if self.reports else None

    @property
    def step(self) -> int:
        """The last step that was evaluated."""
        return self.reports[-1][0] if self.reports else 0


def run_trial(config: RunConfig, report: Callable[[int, float], None]) -> None:
    """Run a trial in this process, or go on with it; `report` hears (step, best value so far) of each evaluation.

    Evaluations up to the newest checkpoint, of starts before, are reported first.
    """
    from dist_ft.runtime import local
    from dist_ft.training.callbacks import Callback, CallbackList
    from dist_ft.training.run_context import RunContext

    metric = config.checkpoint.best_by
    filesystem.configure(config.storage.options)
    reached: list[float] = []

    def told(step: int, metrics: Mapping[str, float]) -> None:
        reached.append(metrics[metric])
        if step:  # what was there before learning is no result
            report(step, min(reached, key=lambda value: best.sort_key(metric, value)))

    class ReportEvaluation(Callback):
        def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
            told(step, metrics)

    store = Store(config.run_url)
    names = discovery.list_committed(store)
    step = (parse_folder(names[0]) or (0, 0))[0] if names else -1
    for line in read_metrics(store, step) if names else ():
        if line["kind"] == "evaluation" and line["step"] <= step and line.get(metric) is not None:
            told(int(line["step"]), line)
    try:
        result = local.run(config, RunContext(callbacks=CallbackList([ReportEvaluation()])))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
            type(error).__name__
        ]
        store.write(
            ENDED, json.dumps({"error": redact(lines[-1].removeprefix("- "))[:400]}).encode()
        )
        raise
    store.write(ENDED, json.dumps({"step": result.step}).encode())
