"""The stages of a sequence, run one after the other, and how much of each the model keeps.

What is done is kept beside the runs, in <run.storage>/<name>: the config of each stage that began, the scores of each
model on each stage's held-out data, and what follows from them. Guarantees: cut off anywhere, the same call goes on
where it stopped, and what is complete is not done again; a stage that is complete can not be another any more. Scores
are taken in this process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from dist_ft.config import renames
from dist_ft.config.identity import changes
from dist_ft.config.load import load_stored_mapping, to_mapping
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.task import LABELLED
from dist_ft.config.stages import Stages, scored
from dist_ft.core import fault_injection
from dist_ft.core.errors import ConfigError
from dist_ft.inference.evaluate import evaluate_models
from dist_ft.runtime.bootstrap.labels import labels_in
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.result import Result
from dist_ft.workflows import stages_report

STATE = "stages.json"
"""What began, in order: [{name, config, done}]."""
SCORES = "scores"
"""Folder of scores: <stage learned>.<stage scored>.json."""
MAY_CHANGE = ("cluster", "zero", "log", "storage", "checkpoint", "anomaly")
"""Sections that do not change what a complete stage has learned."""


def run(
    stages: Stages, train: Callable[[RunConfig], Result], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run all stages from where they stand to their end; return the report (`staging_report.gather`).

    Args:
        stages: what `load_stages` gave.
        train: runs a config to its end, or goes on with it.
        say: where a person is told.

    Raises:
        ConfigError: a stage that began is another now, or is at another place.
    """
    filesystem.configure(stages.stages[0].config.storage.options)
    store, report = Store(stages.url), {}
    state = _state(store)
    require_same(stages, state)
    for number, stage in enumerate(stages.stages):
        if number < len(state) and state[number]["done"]:
            say(f"stage {stage.name} is complete: {stage.config.run_url}")
        else:
            del state[number:]
            state.append({"name": stage.name, "config": to_mapping(stage.config), "done": False})
            _keep(store, state)
            say(f"stage {stage.name}, {number + 1} of {len(stages.stages)}")
            train(stage.config)
            fault_injection.hit("stages.trained")
            state[number]["done"] = True
            _keep(store, state)
        report = _report(stages, store, number)
        stages_report.keep(store, report)
        say(stages_report.as_text(report))
    return report


def require_same(stages: Stages, state: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError, one line, if what began is not what the file says now."""
    names = [stage.name for stage in stages.stages]
    begun = [str(kept["name"]) for kept in state]
    if names[: len(begun)] != begun:
        raise ConfigError(
            [
                f"stages: {', '.join(begun)} began in this order, and the file has {', '.join(names)}; "
                "stages may be added at the end; restore their order, or choose another name for the whole"
            ],
            f"stages {stages.name!r}",
        )
    for stage, kept in zip(stages.stages, state, strict=False):
        if not kept["done"]:
            continue  # the run itself says what may change when it goes on
        is_kept, free = changes(load_stored_mapping(kept["config"], f"stages {stages.name!r}"), stage.config)
        found = [*is_kept, *(one for one in free if one.path.split(".")[0] not in MAY_CHANGE)]
        if found:
            more = f" (and {len(found) - 1} more fields)" if len(found) > 1 else ""
            raise ConfigError(
                [
                    f"{found[0].path}={found[0].new}: stage {stage.name} is complete and was made with "
                    f"{found[0].old}{more}; a complete stage can not change; restore it, or choose another "
                    "name for the whole"
                ],
                f"stages {stages.name!r}",
            )


def _report(stages: Stages, store: Store, last: int) -> dict[str, Any]:
    """Return the report after stage `last`, scoring what has no score yet."""
    names = [stage.name for stage in stages.stages]
    found = [[_score(stages, store, i, j) for j in range(len(names))] for i in range(last + 1)]
    return stages_report.gather(stages, found)


def _score(stages: Stages, store: Store, learned: int, on: int) -> dict[str, Any] | None:
    """Return the metrics of the model after stage `learned` on the held-out data of stage `on`, taken once.

    None where the data has labels the model's head has not.
    """
    run, config = stages.stages[learned].config, stages.stages[on].config
    labels = _labels(run)
    asked = scored(config, run, stages.checkpoint, labels)
    path = f"{SCORES}/{stages.stages[learned].name}.{stages.stages[on].name}.json"
    old_names = renames.RUN.restore(to_mapping(asked))  # stored scores have a hash of them
    of = hashlib.sha256(
        json.dumps(
            [old_names[name] for name in ("model", "task", "data", "evaluation", "batch")],
            sort_keys=True,
        ).encode()
    ).hexdigest()
    if store.exists(path):
        kept = json.loads(store.read(path))
        if kept["of"] == of:
            return kept["metrics"]
    metrics: dict[str, Any] | None = None
    if not labels or labels_in(config, config.evaluation.data) <= set(labels):
        (metrics,) = evaluate_models(asked, [asked.model.path]).values()
    store.write(path, json.dumps({"of": of, "metrics": metrics}, ensure_ascii=False).encode())
    return metrics


def _labels(run: RunConfig) -> list[str]:
    """Return the labels of a run's head, in order; none where its task has none."""
    if run.task.name not in LABELLED:
        return []
    path = "model/config.json"
    found = json.loads(Store(run.run_url).read(path))["id2label"]
    return [label for _, label in sorted(found.items(), key=lambda one: int(one[0]))]


def _state(store: Store) -> list[dict[str, Any]]:
    return json.loads(store.read(STATE))["stages"] if store.exists(STATE) else []


def _keep(store: Store, state: Sequence[dict[str, Any]]) -> None:
    store.write(STATE, json.dumps({"stages": list(state)}, ensure_ascii=False, indent=1).encode())
