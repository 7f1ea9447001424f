"""What of a config needs the index, so that its data cannot be streamed."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import task_class


def index_reasons(config: RunConfig) -> list[str]:
    """Return a line for each setting that needs all rows before step 1: what it is, what to set."""
    data = config.data
    reasons = []
    if config.schedule.steps is None:
        reasons.append("schedule.epochs: a stream has no last step of its own. Set schedule.steps")
    if config.evaluation.every_epochs:
        reasons.append(
            f"evaluation.every_epochs={config.evaluation.every_epochs}: no step of a stream ends "
            "an epoch of all lanes. Set evaluation.every_steps"
        )
    if not data.shuffle:
        reasons.append("data.shuffle=false: lanes read different blocks. Set data.shuffle=true")
    if data.overlong == "error":
        reasons.append(
            "data.overlong=error: a long sample would be found late. Set truncate, drop or split"
        )
    if data.bad_rows == "error":
        reasons.append("data.bad_rows=error: a bad row would be found late. Set skip")
    if task_class(config.task.name).has_labels and not config.task.labels:
        reasons.append("task.labels: not set, so that all rows must be read for them. List them")
    return reasons


def _streamed(config: RunConfig) -> Iterator[str]:
    if config.data.order == "streamed":
        for reason in index_reasons(config):
            yield f"data.order=streamed: cannot be used with {reason}, or data.order=indexed."


CHECKS = (_streamed,)
