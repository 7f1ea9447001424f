"""The file of `dist-ft stages`: a sequence of runs that train one model, and the config of each.

Each stage is an ordinary run that starts from the result of the previous stage. A fraction of its
data may be a replay of previous stages. Guarantees: all mistakes in the file and in the configs of
all stages are reported at once, before any training. Pure, except for reading the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from dist_ft.config import renames
from dist_ft.config.credentials import mask_credentials
from dist_ft.config.document import Document, read_document, with_field
from dist_ft.config.load import inspect_config, load_config
from dist_ft.config.schema import RunConfig, Source
from dist_ft.config.sections.section import Section
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ConfigError
from dist_ft.storage.filesystem import is_local

# As run.name. Names that are too long together are found by the check of the stage's config.
NAME = r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$"


class StageSection(Section):
    """One stage."""

    name: str = Field(
        pattern=NAME,
        description="Name of the stage; its run is named <name of the file>-<name of the stage>.",
    )
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Fraction of the stage's sequences that comes from the training data of all previous "
            "stages, in equal parts."
        ),
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of this stage: section.field: value, such as data.train: more.jsonl.",
    )


class StagesSection(Section):
    """The whole file."""

    name: str = Field(
        pattern=NAME, description="Name of the sequence of stages, in the storage of its runs."
    )
    config: str = Field(
        description="Config that all stages share: a YAML file, relative to this one, or a URL."
    )
    checkpoint: Literal["latest", "best"] = Field(
        "latest",
        description=(
            "Checkpoint of a stage that is evaluated and that the next stage starts from: the "
            "latest, or the best by checkpoint.best_by."
        ),
    )
    metric: str | None = Field(
        None,
        description=(
            "Metric of the matrix; default: checkpoint.best_by, or, if that is the loss, the first "
            "metric of the task."
        ),
    )
    stages: tuple[StageSection, ...] = Field(min_length=1, description="The stages, in order.")


@dataclass(frozen=True)
class Stage:
    """A stage and the config of its run."""

    name: str
    config: RunConfig


@dataclass(frozen=True)
class Stages:
    """The stages of a file, whose runs share a storage.

    Attributes:
        name: name of the sequence.
        url: folder of the sequence's own files: <run.storage>/<name>.
        metric: metric in the matrix.
        checkpoint: "latest" or "best": which one is evaluated and starts the next stage.
        stages: the stages, in order.
    """

    name: str
    url: str
    metric: str
    checkpoint: str
    stages: tuple[Stage, ...]


class StageSources(NamedTuple):
    """The training data of a previous stage, without its own replay."""

    name: str
    sources: tuple[Source, ...]


def load_stages(path: str, overrides: Sequence[str] = ()) -> Stages:
    """Return the stages in the YAML file `path`.

    Args:
        path: path of the file.
        overrides: section.field=value, set in the config of every stage.

    Raises:
        ConfigError: lists all problems of the file, or of the configs.
    """
    document, problems = read_document(path)
    masked = mask_credentials(document)
    problems += [*masked.problems, *renames.STAGES.problems(masked.mapping)]
    file = _parse(renames.STAGES.migrate(masked.mapping), path, problems)

    base, problems = read_document(_resolve(path, file.config))

    counts = Counter[str]()
    stages: list[Stage] = []
    previous: list[StageSources] = []
    for stage in file.stages:
        # The overrides of the command line come last: they hold for every stage.
        mapping, stage_problems = _merge(base, stage.overrides)
        mapping = with_field(mapping, ("run", "name"), f"{file.name}-{stage.name}")
        inspected = inspect_config(mapping, overrides)
        config = inspected.config
        stage_problems += inspected.problems

        if not stage_problems:
            stage_problems = list(_replay_problems(config, stage, previous))
            stages.append(Stage(stage.name, _stage_config(config, file, stage, stages, previous)))

            # Without this stage's own replay: later stages would replay the first ones repeatedly.
            previous.append(StageSources(stage.name, config.data.train))

        # Problems of the shared config are reported with the first stage only.
        for line in stage_problems:
            if not counts[line]:
                problems.append(f"stage {stage.name}: {line}")
        counts.update(stage_problems)

    problems += _sequence_problems(file, stages)
    if problems:
        raise ConfigError(problems, path)

    checked = tuple(Stage(stage.name, _checked(stage)) for stage in stages)
    config = checked[0].config
    url = f"{config.run.storage.rstrip('/')}/{file.name}"
    return Stages(file.name, url, _metric(file, config), file.checkpoint, checked)


def _parse(document: Mapping[str, Any], path: str, problems: list[str]) -> StagesSection:
    """Return the file's section; raises ConfigError with its problems and those in `problems`."""
    try:
        file = StagesSection.model_validate(document)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        # A problem inside a stage is reported once, at its own place.
        nested = {details["loc"][0] for details in errors if len(details["loc"]) > 1}
        lines = []
        for details in errors:
            location = details["loc"]
            # An error of the file as a whole, such as a key that is no text, has no location.
            if len(location) != 1 or location[0] not in nested:
                name = ".".join(map(str, location)) or "a key"
                lines.append(
                    f"{name}: {details['msg'].lower()}. Allowed: {_allowed(location)}. Correct it."
                )
        raise ConfigError([*problems, *lines], path) from None  # its own text quotes values

    if problems:
        raise ConfigError(problems, path)
    return file


def _allowed(location: tuple[Any, ...]) -> str:
    """Return the allowed value of the field at an error's location, or the allowed fields."""
    # ("stages", number, field) lies in a stage, (field,) in the file.
    section = StageSection if len(location) > 1 and location[0] == "stages" else StagesSection
    info = section.model_fields.get(str(location[-1])) if location else None
    return str(info.description).rstrip(".") if info else ", ".join(section.model_fields)


def _resolve(path: str, config: str) -> str:
    """Return the path of `config`, which may be relative to the file at `path`."""
    if not is_local(config) or Path(config).expanduser().is_absolute():
        return config
    if is_local(path):
        return str(Path(path).parent / config)

    # Not by pathlib, which would make one slash of the two after the protocol.
    return f"{path.rpartition('/')[0]}/{config}"


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> Document:
    """Return the base with a stage's fields (dotted, or nested in their sections)."""
    result: dict[str, Any] = dict(base)
    problems: list[str] = []
    for key, value in overrides.items():
        path = str(key).split(".")
        if len(path) > 1:
            result = with_field(result, path, value)

        # A nested section adds to that of the base. Replacing it would drop its other fields.
        elif isinstance(value, Mapping):
            section = result.get(path[0])
            if not isinstance(section, Mapping):
                section = {}
            result[path[0]] = {**section, **value}

        else:
            problems.append(
                f"overrides.{key}: not a field. Allowed: section.field: value. Add its section."
            )

    return Document(result, problems)


def _stage_config(
    config: RunConfig,
    file: StagesSection,
    stage: StageSection,
    before: Sequence[Stage],
    previous: Sequence[StageSources],
) -> RunConfig:
    """Return the config of a stage: it starts from the previous one, with its head and a replay."""
    changes: dict[str, Any] = {}
    if before:
        # The revision is that of the base model on the hub; a run has none.
        start = {"path": before[-1].config.run_url, "checkpoint": file.checkpoint, "revision": None}
        changes["model"] = config.model.model_copy(update=start)

        # A stage may bring new labels. A new head would forget the old ones.
        if task_class(config.task.name).has_labels:
            changes["task"] = config.task.model_copy(update={"grow_head": True, "new_head": False})

    if stage.replay and previous:
        train = with_replay(config.data.train, stage.replay, previous)
        changes["data"] = config.data.model_copy(update={"train": train})
    return config.model_copy(update=changes)


def with_replay(
    own: Sequence[Source], share: float, previous: Sequence[StageSources]
) -> tuple[Source, ...]:
    """Return a stage's sources and those of previous stages, which get `share` of the sequences.

    Each previous stage gets an equal part of it, and each source an equal part of its stage's.
    Weights of the stage's own sources are scaled to what the replay leaves.
    """
    is_weighted = any(source.weight is not None for source in own)
    total_weight = sum(source.weight or 0.0 for source in own)
    sources: list[Source] = []
    for source in own:
        if is_weighted:
            weight = (source.weight or 0.0) / total_weight * (1 - share)
            source = source.model_copy(update={"weight": weight})
        sources.append(source)

    # A share is relative to an epoch of the other sources, and weighted sources have no epochs.
    field = "weight" if is_weighted else "share"
    for stage_name, stage_sources in previous:
        part = share / len(previous) / len(stage_sources)
        for number, source in enumerate(stage_sources):
            # Named after its stage, as names must be unique and metrics are reported by name.
            update = {"name": f"replay-{stage_name}-{number}", field: part}
            sources.append(source.without_mixing().model_copy(update=update))
    return tuple(sources)


def _replay_problems(
    config: RunConfig, stage: StageSection, previous: Sequence[StageSources]
) -> Iterator[str]:
    if stage.replay and not previous:
        yield (
            f"replay={stage.replay}: there is no previous stage. Allowed from the second stage on. "
            "Remove it."
        )
    if stage.replay and (config.data.temperature is not None or config.data.mixing):
        yield (
            f"replay={stage.replay}: data.temperature or data.mixing also decides how often "
            "sources are used. Allowed with weight or repeat of the sources. Remove one of them."
        )


def _sequence_problems(file: StagesSection, stages: Sequence[Stage]) -> Iterator[str]:
    """Yield the problems of the stages as a whole."""
    names = [stage.name for stage in file.stages]
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        yield f"stages: two are named {duplicate}. Their runs need different names. Rename one."

    yield from _shared_fields(stages)
    for before, after in pairwise(stages):
        yield from _lost_labels(before, after)
    yield from _metric_problems(file, stages)

    for stage in stages:
        if not stage.config.evaluation.data:
            yield (
                f"stage {stage.name}: evaluation.data: is empty. Each stage needs held-out data. "
                "Set it."
            )


def _shared_fields(stages: Sequence[Stage]) -> Iterator[str]:
    # The matrix is stored next to the runs, and compares scores of one metric.
    shared: dict[str, set[str]] = {
        "run.storage": {stage.config.run.storage for stage in stages},
        "task.name": {stage.config.task.name for stage in stages},
    }
    for field, values in shared.items():
        if len(values) > 1:
            yield (
                f"{field}: is {' and '.join(sorted(values))}. All stages share one. Set it in the "
                "config only."
            )


def _lost_labels(before: Stage, after: Stage) -> Iterator[str]:
    labels = after.config.task.labels
    lost = [label for label in before.config.task.labels if label not in labels]
    if labels and lost:
        yield (
            f"stage {after.name}: task.labels: {lost[0]} of stage {before.name} is missing. A head "
            "keeps all its labels. Add it, or leave task.labels empty."
        )


def _metric_problems(file: StagesSection, stages: Sequence[Stage]) -> Iterator[str]:
    if file.metric is None or not stages:
        return
    task = stages[0].config.task.name
    metrics = ("loss", *task_class(task).metrics)
    if file.metric not in metrics:
        yield (
            f"metric={file.metric}: not a metric of evaluations of task.name={task}. Allowed: "
            f"{', '.join(metrics)}. Use one of them."
        )


def _checked(stage: Stage) -> RunConfig:
    """Return the stage's config after another check: replay and start checkpoint were added."""
    try:
        return load_config(stage.config.model_dump(mode="json"))
    except ConfigError as error:
        raise ConfigError([f"stage {stage.name}: {line}" for line in error.problems]) from error


def _metric(file: StagesSection, config: RunConfig) -> str:
    if file.metric is not None:
        return file.metric

    # The first metric of a task is its main one.
    best_by = config.checkpoint.best_by
    return task_class(config.task.name).metrics[0] if best_by == "loss" else best_by


def with_scoring_data(
    config: RunConfig, run: RunConfig, checkpoint: str, labels: Sequence[str]
) -> RunConfig:
    """Return the config that evaluates the result of `run` on the held-out data of `config`.

    Args:
        config: config of the stage with the data.
        run: whose model is evaluated.
        checkpoint: "latest" or "best".
        labels: labels of the head of `run`.
    """
    held_out = tuple(source.without_mixing() for source in config.evaluation.data)

    # The model is scored as it is, with the head and the labels that it has by now. The class
    # weights are those of `config`, whose labels may differ.
    model = {"path": run.run_url, "checkpoint": checkpoint, "revision": None}
    task = {"labels": tuple(labels), "grow_head": False, "new_head": False, "class_weights": ()}

    # Mixing weights and a temperature belong to the sources that are replaced here.
    data = {"train": held_out, "mixing": (), "temperature": None}
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"workers": 0}),
            "model": config.model.model_copy(update=model),
            "task": config.task.model_copy(update=task),
            "data": config.data.model_copy(update=data),
        }
    )
