"""Run the stages of a sequence in turn, and measure how much of each the model retains.

State lies next to the runs, in <run.storage>/<name>: the config of each started stage, the scores
of each model on each stage's held-out data, and the report. If interrupted anywhere, the same call
resumes; completed stages and scores are not computed again, and a completed stage cannot change.
Scores are computed in this process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, cast

from dist_ft.config import renames
from dist_ft.config.identity import changes
from dist_ft.config.load import load_stored_mapping, to_mapping
from dist_ft.config.schema import RunConfig
from dist_ft.config.stages import Stages, with_scoring_data
from dist_ft.config.task_facts import task_class
from dist_ft.core import fault_injection
from dist_ft.core.errors import CheckpointError, ConfigError
from dist_ft.core.json_documents import encode_json, interpreting
from dist_ft.inference.evaluate import evaluate_models
from dist_ft.runtime.bootstrap.labels import collect_labels
from dist_ft.storage import filesystem
from dist_ft.storage.documents import read_json_object
from dist_ft.storage.filesystem import Store
from dist_ft.storage.stored_json import read_stored_json
from dist_ft.training.result import Result
from dist_ft.workflows import stages_report
from dist_ft.workflows.stages_report import StagesReport

STATE = "stages.json"
MODEL_CONFIG = "model/config.json"
SCORES = "scores"
"""Folder of scores: <stage trained>.<stage scored>.json."""
OPERATIONAL_SECTIONS = ("cluster", "zero", "log", "storage", "checkpoint", "anomaly")
"""Sections that do not change the result of a completed stage."""
OPERATIONAL_FIELDS = ("run.max_hours", "run.max_cost")
"""Fields of other sections that do not change it either."""
SCORED_SECTIONS = ("model", "task", "data", "evaluation", "batch")
"""Sections that a score depends on."""


class StageState(TypedDict):
    """The stored state of a started stage: its config, and whether it is complete."""

    name: str
    config: dict[str, Any]
    done: bool


class StoredScore(TypedDict):
    """A stored score.

    Attributes:
        of: digest of the scored model, data and task.
        metrics: metrics of the task; None if the data has labels that the model's head lacks.
    """

    of: str
    metrics: dict[str, Any] | None


def run(
    stages: Stages, train: Callable[[RunConfig], Result], report_line: Callable[[str], None] = print
) -> StagesReport:
    """Run or resume all stages; return the report after the last.

    Args:
        stages: the stages, from `load_stages`.
        train: runs or resumes a config to its end.
        report_line: called with each line of progress.

    Raises:
        ConfigError: a started stage has another config or another place now.
    """
    filesystem.configure(stages.stages[0].config.storage.options)

    store = Store(stages.url)
    states = _read_states(store)
    require_same(stages, states)

    num_stages = len(stages.stages)
    for number, stage in enumerate(stages.stages):
        # Its report is written again below, in case the last call ended before that.
        if number < len(states) and states[number]["done"]:
            report_line(f"stage {stage.name} is complete: {stage.config.run_url}")
        else:
            # Its config is stored before it trains: if this call is interrupted, the next one
            # knows that the stage was started. The config of a stage that is not done may change.
            del states[number:]
            states.append({"name": stage.name, "config": to_mapping(stage.config), "done": False})
            _write_states(store, states)

            report_line(f"stage {stage.name}, {number + 1} of {num_stages}")
            train(stage.config)
            fault_injection.hit("stages.trained")

            # Killed before this line, the next call starts `train` again, and the complete run
            # ends at once.
            states[number]["done"] = True
            _write_states(store, states)

        report = _report(stages, store, number)
        stages_report.write(store, report)
        report_line(stages_report.as_text(report))
    return report


def require_same(stages: Stages, states: Sequence[StageState]) -> None:
    """Check that started stages are the first ones of the file, and completed ones are unchanged.

    Raises:
        ConfigError: one line for the first difference.
    """
    # A prefix: stages may be added at the end. Each starts from the one before, so none may be
    # inserted or removed.
    names = [stage.name for stage in stages.stages]
    started = [state["name"] for state in states]
    if names[: len(started)] != started:
        raise ConfigError(
            [
                f"stages: {', '.join(started)} were started in this order, but the file has "
                f"{', '.join(names)}. Stages may only be added at the end. Restore the order, or "
                "choose another name for the sequence."
            ],
            f"stages {stages.name!r}",
        )

    for stage, state in zip(stages.stages, states, strict=False):
        if not state["done"]:
            continue  # the run itself checks what may change when it resumes
        stored = load_stored_mapping(state["config"], f"stages {stages.name!r}")
        identity, operational = changes(stored, stage.config)
        found = list(identity)
        for change in operational:
            is_operational = change.path.split(".")[0] in OPERATIONAL_SECTIONS
            if not is_operational and change.path not in OPERATIONAL_FIELDS:
                found.append(change)
        if not found:
            continue

        first = found[0]
        more = ""
        if len(found) > 1:
            more = f" (and {len(found) - 1} more fields)"
        raise ConfigError(
            [
                f"{first.path}={first.new}: stage {stage.name} was completed with {first.old}"
                f"{more}. A completed stage cannot change. Restore it, or choose another name for "
                "the sequence."
            ],
            f"stages {stages.name!r}",
        )


def _report(stages: Stages, store: Store, last: int) -> StagesReport:
    """Return the report after stage `last`, computing scores that are missing."""
    # scored on all stages, also on those that are not trained yet
    metrics = []
    for trained in range(last + 1):
        row = []
        for held_out in range(len(stages.stages)):
            row.append(_score(stages, store, trained, held_out)["metrics"])
        metrics.append(row)
    return stages_report.gather(stages, metrics)


def _score(stages: Stages, store: Store, trained: int, held_out: int) -> StoredScore:
    """Return the score of the model after a stage on the held-out data of another.

    Computed once and stored.

    Args:
        stages: all stages.
        store: folder of the sequence.
        trained: number of the stage whose model is scored.
        held_out: number of the stage whose held-out data is used.
    """
    run = stages.stages[trained].config
    config = stages.stages[held_out].config
    labels = _head_labels(run)
    scored_config = with_scoring_data(config, run, stages.checkpoint, labels)

    path = f"{SCORES}/{stages.stages[trained].name}.{stages.stages[held_out].name}.json"
    # The config of a later stage, whose data is scored, may have changed since.
    digest = _digest(scored_config)
    if store.exists(path):
        remedy = "Remove it: the score is computed again."
        stored = cast(StoredScore, read_stored_json(store, path, dict, remedy))
        if stored.get("of") == digest:
            return stored

    # A head without a row for a label cannot predict it: no score, rather than one of 0.
    metrics: dict[str, Any] | None = None
    if not labels or collect_labels(config, config.evaluation.data) <= set(labels):
        (metrics,) = evaluate_models(scored_config, [scored_config.model.path]).values()

    score: StoredScore = {"of": digest, "metrics": metrics}
    store.write(path, encode_json(score))
    return score


def _digest(config: RunConfig) -> str:
    """Return a digest of the sections that a score depends on.

    Uses the field names of version 0.1.0, so that scores it stored stay valid.
    """
    fields = renames.RUN.restore(to_mapping(config))
    content = json.dumps([fields[name] for name in SCORED_SECTIONS], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _head_labels(run: RunConfig) -> list[str]:
    """Return the labels of a run's head, in order; [] if its task has none."""
    if not task_class(run.task.name).has_labels:
        return []

    # JSON has string keys, which would sort as "0", "1", "10", "2"
    store = Store(run.run_url)
    with interpreting(store.redacted_url(MODEL_CONFIG)):
        label_by_id = read_json_object(store, MODEL_CONFIG)["id2label"]
        return [label_by_id[number] for number in sorted(label_by_id, key=int)]


def _read_states(store: Store) -> list[StageState]:
    if not store.exists(STATE):
        return []
    remedy = "Restore it from a copy, or use another name for the stages."
    states = read_stored_json(store, STATE, dict, remedy).get("stages")
    if not isinstance(states, list):
        raise CheckpointError(
            f"{store.redacted_url(STATE)}: the file is damaged (it holds no stages). {remedy}"
        )
    return states


def _write_states(store: Store, states: Sequence[StageState]) -> None:
    store.write(STATE, encode_json({"stages": list(states)}, indent=1))
