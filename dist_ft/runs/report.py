"""The report of a run as JSON values: curves, metrics, tables, errors, configuration.

Reads what lies in the run's storage, whoever wrote it. Needs no model and no GPU (only
`attributions` does). `render_report` writes it as Markdown and HTML.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from dist_ft.checkpoint import discovery
from dist_ft.config.load import STORED, parse_stored_text, read_stored_text
from dist_ft.core.errors import DataError, DocumentError, StorageError
from dist_ft.core.json_documents import interpreting
from dist_ft.core.logs import redact
from dist_ft.core.redaction import redact_values
from dist_ft.metrics import best
from dist_ft.runs import catalog, time_accounting
from dist_ft.runs.run_facts import facts
from dist_ft.storage.filesystem import Store
from dist_ft.training.evaluation import FOLDER, STORED_EVALUATION, read_evaluation
from dist_ft.training.metrics_log import read_metrics

log = logging.getLogger("dist_ft.runs")
MAX_NUMBER = 1e300
"""Larger numbers, which no run writes, are left out: sums and plots of them would overflow."""


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
    """Tables and errors of an evaluation that has more than numbers, and its step."""

    step: int | None
    tables: EvaluationTables
    examples: list[dict[str, Any]]


def gather(url: str) -> Report:
    """Return the report of the run in the folder `url`.

    Raises:
        DataError: the folder holds no run, or the run has made no step yet.
    """
    store = catalog.open_run(url)
    lines = read_metrics(store)
    if not lines:
        raise DataError(f"{store.redacted_url()}: no metrics yet. Let the run make its first step.")

    # The text itself is shown, and so are values of the mapping. A redacted text may be no YAML.
    text = read_stored_text(store)
    config = redact_values(parse_stored_text(text, store.redacted_url(STORED)))
    train = [_numbers(line) for line in lines if line.get("kind") == "train"]
    evaluations = [_numbers(line) for line in lines if line.get("kind") == "evaluation"]
    latest = _latest_evaluation(store)

    with interpreting(store.redacted_url(STORED)):
        name = str(config["run"]["name"])
        model = str(config["model"]["path"])
        task = str((config.get("task") or {}).get("name", "causal_lm"))
        best_evaluation = _best(config, evaluations)

    return {
        "name": name,
        "storage": store.redacted_url(),
        "config": redact(text),
        "task": task,
        "model": redact(model),
        "steps": int(train[-1]["step"]) if train else 0,
        "train": train,
        "evaluations": evaluations,
        "best": best_evaluation,
        "tables": latest.tables,
        "examples": latest.examples,
        "examples_step": latest.step,
        "attributions": None,
        "facts": facts(store),
        "attempts": catalog.attempts(store),
        "time": list(time_accounting.lines(store)),
        "checkpoints": discovery.list_committed(store),
    }


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    # NaN and infinity are null in the file, and are left out of curves and tables.
    return {name: value for name, value in line.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    # Python reads numbers that no float can hold, and NaN, which is no JSON.
    return isinstance(value, int | float) and abs(value) <= MAX_NUMBER


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
    steps = []
    for name in store.list(FOLDER):
        match = STORED_EVALUATION.fullmatch(name)
        if match:
            steps.append(int(match[1]))

    # An evaluation is an extra: a damaged file must not hide all else that the run has stored.
    for step in sorted(steps, reverse=True):
        try:
            details = read_evaluation(store, step)
            with interpreting(store.redacted_url(f"{FOLDER}/step-{step:09d}.json")):
                return Evaluation(step, _tables(details), _examples(details))
        except (DocumentError, StorageError) as error:
            log.warning("the evaluation at step %d is left out: %s", step, error)

    return Evaluation(None, {}, [])


def _tables(details: Mapping[str, Any]) -> EvaluationTables:
    """Return the tables of an evaluation: metrics by label, and the confusion matrix.

    Errors that `interpreting` reports are raised for another form: the file may be damaged.
    """
    tables: EvaluationTables = {}
    if details.get("by_label"):
        tables["by_label"] = _table(details["by_label"])
    if details.get("by_tag"):
        tables["by_tag"] = _table(details["by_tag"])

    # The rows and columns of the matrix are in the order of the labels in by_label.
    if "confusion" in details:
        labels = list(details["by_label"])
        matrix = [[int(count) for count in row] for row in details["confusion"]]
        if any(len(row) != len(labels) for row in [labels, *matrix]) or len(matrix) != len(labels):
            raise ValueError(f"confusion is no {len(labels)} by {len(labels)} matrix")
        tables["labels"] = labels
        tables["confusion"] = matrix

    return tables


def _table(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return a table of numbers, without values that are none."""
    return {label: _numbers(row) for label, row in values.items()}


def _examples(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stored errors, with texts and numbers as what they are shown as."""
    examples = []
    for stored in details.get("examples") or ():
        example = dict(stored)
        for field in ("text", "expected", "predicted"):
            example[field] = str(example[field])

        example["sample"] = int(example["sample"])
        example["score"] = float(example["score"])
        examples.append(example)
    return examples
