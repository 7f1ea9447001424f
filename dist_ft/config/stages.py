"""A sequence of runs that one model goes through: what the file of `dist-ft stages` holds, and the run of each stage.

Each stage is an ordinary run that begins with the result of the stage before. Of the stages before it may replay a
share. Guarantees: every mistake in the file and in any stage's config is said at once, before anything is trained.
Pure, but for reading the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dist_ft.config import renames
from dist_ft.config.document import read_document, with_field
from dist_ft.config.load import inspect_config, load_config
from dist_ft.config.schema import RunConfig, Source
from dist_ft.config.sections.section import Section
from dist_ft.config.sections.task import LABELLED, METRICS
from dist_ft.core.errors import ConfigError
from dist_ft.storage.filesystem import is_local

NAME = r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$"


class StageSection(Section):
    """One stage."""

    name: str = Field(
        pattern=NAME, description="Name of the stage; its run is named <name of the whole>-<this>."
    )
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Share of the stage's sequences that comes from the training data of all stages before, in equal parts."
        ),
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description=("Fields of this stage: section.field: value, such as data.train: more.jsonl."),
    )


class StagesSection(Section):
    """The whole file."""

    name: str = Field(pattern=NAME, description="Name of the whole, in the storage of its runs.")
    config: str = Field(
        description="Config all stages share: a YAML file, relative to this one, or a URL."
    )
    checkpoint: Literal["latest", "best"] = Field(
        "latest",
        description=(
            "Checkpoint of a stage that is evaluated and that the next stage starts from: the latest, or the best by "
            "checkpoint.best_by."
        ),
    )
    metric: str | None = Field(
        None,
        description=(
            "Metric of the matrix; none: checkpoint.best_by, or, where that is the loss, the first of the task's."
        ),
    )
    stages: tuple[StageSection, ...] = Field(min_length=1, description="The stages, in order.")


@dataclass(frozen=True)
class Stage:
    """A stage as it is run."""

    name: str
    config: RunConfig


@dataclass(frozen=True)
class Stages:
    """The stages of a file, their runs in one storage.

    Attributes:
        url: folder that holds what is kept about the whole: <run.storage>/<name>.
        metric: of the matrix.
        checkpoint: "latest" or "best": the checkpoint of each stage that is evaluated and continued from.
    """

    name: str
    url: str
    metric: str
    checkpoint: str
    stages: tuple[Stage, ...]


def load_stages(path: str, overrides: Sequence[str] = ()) -> Stages:
    """Return the stages in the YAML file `path`, `overrides` (section.field=value) set in every stage's config.

    Raises ConfigError with every problem of the file, or of the configs.
    """
    document, problems = read_document(path)
    problems += renames.STAGES.problems(document)
    file = _parsed(renames.STAGES.migrate(document), path, problems)
    base, twice = read_document(_beside(path, file.config))
    problems, in_stages = twice, Counter[str]()
    stages: list[Stage] = []
    trained: list[tuple[str, tuple[Source, ...]]] = []
    for stage in file.stages:
        mapping, wrong = _merged(base, stage.overrides)
        mapping = with_field(mapping, ("run", "name"), f"{file.name}-{stage.name}")
        config, found, _ = inspect_config(mapping, overrides)
        wrong = [*wrong, *found]
        if not wrong:
            own = config.data.train
            wrong = list(_replay_problems(config, stage, trained))
            stages.append(Stage(stage.name, _staged(config, file, stage, stages, trained)))
            trained.append((stage.name, own))
        problems += [f"stage {stage.name}: {line}" for line in wrong if not in_stages[line]]
        in_stages.update(
            wrong
        )  # what the config itself has wrong is said with the first stage only
    problems += _apart(file, stages)
    if problems:
        raise ConfigError(problems, path)
    checked = tuple(Stage(stage.name, _checked(stage)) for stage in stages)
    first = checked[0].config
    return Stages(
        file.name,
        f"{first.run.storage.rstrip('/')}/{file.name}",
        _metric(file, first),
        file.checkpoint,
        checked,
    )


def _parsed(document: Mapping[str, Any], path: str, problems: list[str]) -> StagesSection:
    try:
        found = StagesSection.model_validate(document)
    except ValidationError as error:
        found_wrong = error.errors(include_url=False)
        inner = {one["loc"][0] for one in found_wrong if len(one["loc"]) > 1}  # said once, there
        problems = [
            *problems,
            *(
                f"{'.'.join(str(part) for part in one['loc'])}: {one['msg'].lower()}; allowed: {_fields(one['loc'])}; "
                "correct it"
                for one in found_wrong
                if len(one["loc"]) > 1 or one["loc"][0] not in inner
            ),
        ]
        raise ConfigError(problems, path) from error
    if problems:
        raise ConfigError(problems, path)
    return found


def _fields(where: tuple[Any, ...]) -> str:
    """Return the fields allowed where an error lies, with what a wrong one may be."""
    section = StageSection if len(where) > 1 and where[0] == "stages" else StagesSection
    info = section.model_fields.get(str(where[-1]))
    return str(info.description).rstrip(".") if info else ", ".join(section.model_fields)


def _beside(path: str, config: str) -> str:
    """Return the config's path: relative to the file that names it."""
    if not is_local(config) or Path(config).expanduser().is_absolute():
        return config
    return (
        str(Path(path).parent / config) if is_local(path) else f"{path.rpartition('/')[0]}/{config}"
    )


def _merged(
    base: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the base with a stage's fields set (dotted, or below their sections), and problems."""
    result, problems = dict(base), []
    for key, value in overrides.items():
        path = str(key).split(".")
        inside = value if isinstance(value, Mapping) else None
        if len(path) == 1 and inside is None:
            problems.append(
                f"overrides.{key}: not a field; allowed: section.field: value; name its section"
            )
        elif len(path) == 1 and inside is not None:
            result[path[0]] = {**_section(result, path[0]), **inside}
        else:
            result = with_field(result, path, value)
    return result, problems


def _section(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    held = mapping.get(name)
    return dict(held) if isinstance(held, Mapping) else {}


def _staged(
    config: RunConfig,
    file: StagesSection,
    stage: StageSection,
    before: Sequence[Stage],
    trained: Sequence[tuple[str, tuple[Source, ...]]],
) -> RunConfig:
    """Return a stage's run: it begins with the one before, replays its share, and keeps the head it finds."""
    changes: dict[str, Any] = {}
    if before:
        changes["model"] = config.model.model_copy(
            update={"path": before[-1].config.run_url, "checkpoint": file.checkpoint, "revision": None}
        )
        if config.task.name in LABELLED:
            changes["task"] = config.task.model_copy(update={"grow_head": True, "new_head": False})
    if stage.replay and trained:
        changes["data"] = config.data.model_copy(
            update={"train": with_replay(config.data.train, stage.replay, trained)}
        )
    return config.model_copy(update=changes)


def with_replay(
    own: Sequence[Source], share: float, trained: Sequence[tuple[str, tuple[Source, ...]]]
) -> tuple[Source, ...]:
    """Return a stage's sources with those of the stages before, which together have `share` of the sequences.

    Each earlier stage has the same part of it, each of its sources the same part of that. Where the stage's own
    sources have weights, all have: theirs are scaled to what the replay leaves.
    """
    parts = [
        (f"{name}-{number}", source, share / len(trained) / len(sources))
        for name, sources in trained
        for number, source in enumerate(sources)
    ]
    weighted = any(source.weight is not None for source in own)
    total = sum(source.weight or 0.0 for source in own)
    scaled = [
        source.model_copy(update={"weight": (source.weight or 0.0) / total * (1 - share)})
        if weighted
        else source
        for source in own
    ]
    given = "weight" if weighted else "share"
    plain = {"weight": None, "repeat": None, "share": None}
    return (
        *scaled,
        *(
            source.model_copy(update={**plain, "name": f"replay-{name}", given: part})
            for name, source, part in parts
        ),
    )


def _replay_problems(config: RunConfig, stage: StageSection, trained: Sequence[Any]) -> list[str]:
    found = []
    if stage.replay and not trained:
        found.append(
            f"replay={stage.replay}: there is no stage before it; allowed from the second on; remove it"
        )
    if stage.replay and (config.data.temperature is not None or config.data.mixing):
        found.append(
            f"replay={stage.replay}: data.temperature or data.mixing decides how often sources come; allowed "
            "with weight or repeat of the sources; remove one of them"
        )
    return found


def _apart(file: StagesSection, stages: Sequence[Stage]) -> list[str]:
    """Return what is wrong with the stages as a whole."""
    names, found = [stage.name for stage in file.stages], []
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        found.append(f"stages: two are named {twice}; their runs need different names; rename one")
    for what, values in (
        ("run.storage", {stage.config.run.storage for stage in stages}),
        ("task.name", {stage.config.task.name for stage in stages}),
    ):
        if len(values) > 1:
            found.append(
                f"{what}: is {' and '.join(sorted(values))}; all stages share one; set it in the config only"
            )
    for before, after in pairwise(stages):
        lost = [
            label for label in before.config.task.labels if label not in after.config.task.labels
        ]
        if after.config.task.labels and lost:
            found.append(
                f"stage {after.name}: task.labels: {lost[0]} of stage {before.name} is not among them; a head "
                "keeps all its labels; add it, or leave task.labels empty"
            )
    metric = file.metric
    known = ("loss", *METRICS[stages[0].config.task.name]) if stages else ()
    if metric is not None and stages and metric not in known:
        found.append(
            f"metric={metric}: evaluations of task.name={stages[0].config.task.name} have no such metric; "
            f"allowed: {', '.join(known)}; name one of them"
        )
    found += [
        f"stage {stage.name}: evaluation.data: is empty; what each stage is scored on is needed; set it"
        for stage in stages
        if not stage.config.evaluation.data
    ]
    return found


def _checked(stage: Stage) -> RunConfig:
    """Return the config, checked once more as a whole: replay and names came to it."""
    try:
        return load_config(stage.config.model_dump(mode="json"))
    except ConfigError as error:
        raise ConfigError([f"stage {stage.name}: {line}" for line in error.problems]) from error


def _metric(file: StagesSection, config: RunConfig) -> str:
    if file.metric is not None:
        return file.metric
    best = config.checkpoint.best_by
    return METRICS[config.task.name][0] if best == "loss" else best


def scored(config: RunConfig, run: RunConfig, checkpoint: str, labels: Sequence[str]) -> RunConfig:
    """Return what scores the result of `run` on the held-out data of `config`, with the labels of the run's head."""
    plain = {"weight": None, "repeat": None, "share": None}
    held_out = tuple(source.model_copy(update=plain) for source in config.evaluation.data)
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"workers": 0}),
            "model": config.model.model_copy(
                update={"path": run.run_url, "checkpoint": checkpoint, "revision": None}
            ),
            "task": config.task.model_copy(
                update={
                    "labels": tuple(labels),
                    "grow_head": False,
                    "new_head": False,
                    "class_weights": (),
                }
            ),
            "data": config.data.model_copy(
                update={"train": held_out, "mixing": (), "temperature": None}
            ),
        }
    )
