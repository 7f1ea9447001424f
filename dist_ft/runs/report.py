"""The report of a run as JSON values: curves, metrics, tables, errors, configuration.

Reads what lies in the run's storage, whoever wrote it. Needs no model and no GPU (only
`attributions` does). `render_report` writes it as Markdown and HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from dist_ft.checkpoint import discovery
from dist_ft.config import renames
from dist_ft.config.load import STORED
from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.core.redaction import redact_values
from dist_ft.metrics import best
from dist_ft.runs import catalog, time_accounting
from dist_ft.runs.run_facts import facts
from dist_ft.storage.filesystem import Store
from dist_ft.training.evaluation import FOLDER, read_evaluation
from dist_ft.training.metrics_log import read_metrics


class BestEvaluation(TypedDict):
    """The best evaluation of a run, by the metric checkpoint.best_by."""

    step: int
    value: float
    metric: str


class EvaluationTables(TypedDict, total=False):
    """Tables of an evaluation, as far as its task has them.

    Attributes:
        by_label: {label: {metric: value}}.
        by_tag: {tag: {metric: value}}.
        labels: names of the rows and columns of `confusion`.
        confusion: counts by label (row) and prediction (column).
    """

    by_label: dict[str, dict[str, float]]
    by_tag: dict[str, dict[str, float]]
    labels: list[str]
    confusion: list[list[int]]


class Report(TypedDict):
    """All content of a report, as JSON values.

    Attributes:
        name: name of the run.
        storage: URL of its folder.
        config: its resolved config, as YAML.
        task: name of its task.
        model: path of its initial model.
        steps: last training step.
        train: metrics of each training step.
        evaluations: metrics of each evaluation.
        best: the best evaluation; None without evaluations.
        tables: metrics by label, and the confusion matrix with its labels.
        examples: the most confident errors of the latest evaluation.
        examples_step: step of that evaluation.
        attributions: method and step of token attributions; None if they were not computed.
        facts: {title: value} of the run.
        attempts: one line for each attempt.
        time: one line for each part of the wall time.
        checkpoints: names of the committed checkpoints, latest first.
    """

    name: str
    storage: str
    config: str
    task: str
    model: str
    steps: int
    train: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    best: BestEvaluation | None
    tables: EvaluationTables
    examples: list[dict[str, Any]]
    examples_step: int | None
    attributions: Any
    facts: dict[str, str]
    attempts: list[str]
    time: list[str]
    checkpoints: list[str]


class Evaluation(NamedTuple):
    """The stored details of an evaluation that has more than numbers, and its step."""

    step: int | None
    details: dict[str, Any]


def gather(url: str) -> Report:
    """Return the report of the run in the folder `url`.

    Raises:
        DataError: the folder holds no run, or the run has made no step yet.
    """
    import yaml

    store = catalog.open_run(url)
    lines = read_metrics(store)
    if not lines:
        raise DataError(f"{store.redacted_url()}: no metrics yet. Let the run make its first step.")

    # The text itself is shown, and so are values of the mapping. A redacted text may be no YAML.
    text = store.read(STORED).decode()
    config = renames.RUN.migrate(redact_values(yaml.safe_load(text)))
    train = [_numbers(line) for line in lines if line["kind"] == "train"]
    evaluations = [_numbers(line) for line in lines if line["kind"] == "evaluation"]
    latest = _latest_evaluation(store)

    return {
        "name": config["run"]["name"],
        "storage": store.redacted_url(),
        "config": redact(text),
        "task": (config.get("task") or {}).get("name", "causal_lm"),
        "model": redact(str(config["model"]["path"])),
        "steps": int(train[-1]["step"]) if train else 0,
        "train": train,
        "evaluations": evaluations,
        "best": _best(config, evaluations),
        "tables": _tables(latest.details),
        "examples": latest.details.get("examples", []),
        "examples_step": latest.step,
        "attributions": None,
        "facts": facts(store),
        "attempts": catalog.attempts(store),
        "time": list(time_accounting.lines(store)),
        "checkpoints": discovery.list_committed(store),
    }


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    # NaN and infinity are null in the file, and are left out of curves and tables.
    return {name: value for name, value in line.items() if isinstance(value, int | float)}


def _best(
    config: Mapping[str, Any], evaluations: Sequence[Mapping[str, float]]
) -> BestEvaluation | None:
    """Return the best evaluation by checkpoint.best_by."""
    # By the config's own choice, not by the loss: it is what keep_best and export --best use.
    metric = (config.get("checkpoint") or {}).get("best_by", "loss")
    values = [(int(line["step"]), line[metric]) for line in evaluations if metric in line]
    if not values:
        return None

    step, value = best.find_best(metric, values)
    return {"step": step, "value": value, "metric": metric}


def _latest_evaluation(store: Store) -> Evaluation:
    names = store.list(FOLDER)
    if not names:
        return Evaluation(None, {})

    # Steps are padded with zeros, so the last name is that of the latest step.
    latest = max(names)
    step = int(latest.removeprefix("step-").removesuffix(".json"))
    return Evaluation(step, read_evaluation(store, step))


def _tables(details: Mapping[str, Any]) -> EvaluationTables:
    """Return the tables of an evaluation: metrics by label, and the confusion matrix."""
    tables: EvaluationTables = {}
    if details.get("by_label"):
        tables["by_label"] = details["by_label"]
    if details.get("by_tag"):
        tables["by_tag"] = details["by_tag"]

    # The rows and columns of the matrix are in the order of the labels in by_label.
    if "confusion" in details:
        tables["labels"] = list(details["by_label"])
        tables["confusion"] = details["confusion"]

    return tables
