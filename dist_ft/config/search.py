"""The search file of `dist-ft tune`: the config fields to tune, their values, and the algorithm.

A point is one value for each of these fields. The points of a grid or random search are pure
functions of the file and the trial's number, so an interrupted search resumes with the same ones.
`workflows.search` runs the trials.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dist_ft.config import renames
from dist_ft.config.credentials import mask_credentials
from dist_ft.config.document import apply_overrides, read_document, with_field
from dist_ft.config.error_messages import is_text
from dist_ft.config.load import InspectedConfig, inspect_config
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.section import Section
from dist_ft.core.errors import ConfigError

# 42 characters, so that run names with "-t999" have at most the 47 of run.name.
NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$"
DEFAULT_TRIALS = 10
MAX_TRIALS = 10_000
"""Trials of a search: the config of each is checked before the first starts."""
MAX_FIELD_DOTS = 8
"""Dots in the path of a field; the deepest of the schema has three."""


class Range(Section):
    """Values of one field: a list of choices, or a range of numbers."""

    values: tuple[Any, ...] = Field((), description="List of choices, in place of low and high.")
    low: int | float | None = Field(
        None, description="Lowest value; values are whole numbers if low and high are."
    )
    high: int | float | None = Field(None, description="Highest value.")
    log: bool = Field(False, description="Sample uniformly on a logarithmic scale.")

    @model_validator(mode="after")
    def _check_kind(self) -> Range:
        # pydantic puts "Value error, " before these texts; `_line` removes it.
        if bool(self.values) == (self.low is not None and self.high is not None):
            raise ValueError("either values, or low and high, are needed")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError("low must be below high")
        if not all(math.isfinite(end) for end in (self.low or 0, self.high or 0)):
            raise ValueError("low and high must be finite numbers")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log needs a low above 0")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether values of the range are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, rng: random.Random) -> Any:
        """Return a random value."""
        if self.values:
            return self.values[rng.randrange(len(self.values))]

        # Without values both ends are set: `or 0` is for the type checker only.
        low, high = float(self.low or 0), float(self.high or 0)
        if self.is_whole:
            # Half a unit more on both sides: after rounding, the ends are as likely as the values
            # between. The 1e-9 keeps a draw at the very edge from being rounded beyond the range.
            low, high = low - 0.5 + 1e-9, high + 0.5 - 1e-9

        if self.log:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            value = rng.uniform(low, high)

        if self.is_whole:
            return round(value)
        return value


def _as_range(value: Any) -> Any:
    """Return the short form of a range, a list of values, in the long form."""
    return {"values": value} if isinstance(value, list | tuple) else value


class AshaSection(Section):
    """Early stopping of trials by asynchronous successive halving (Li et al., arXiv:1810.05934)."""

    grace_steps: int = Field(
        ge=1, description="Steps before a trial may be stopped: the first rung."
    )
    reduction: int = Field(
        3,
        ge=2,
        description=(
            "Factor between the steps of two rungs. At each rung, the best 1/reduction of the "
            "trials continue."
        ),
    )


class SearchSection(Section):
    """The whole search file."""

    name: str = Field(
        pattern=NAME_PATTERN,
        description="Name of the search; its runs are <name>-t0, <name>-t1, ...",
    )
    search: Literal["random", "grid", "optuna"] = Field(
        "random",
        description=(
            "grid: all combinations of values; random: sampled by seed; optuna: by the results of "
            "previous trials (TPE)."
        ),
    )
    trials: int | None = Field(
        None, ge=1, description="Number of trials; default: 10 (grid: all combinations)."
    )
    max_concurrent: int = Field(
        1,
        ge=1,
        description="Maximum number of trials at the same time, each in a process, as CPUs allow.",
    )
    seed: int = Field(0, ge=0, description="Seed of the search; the runs use run.seed.")
    space: dict[str, Annotated[Range, BeforeValidator(_as_range)]] = Field(
        min_length=1, description="section.field: a list of values, or {low, high, log}."
    )
    asha: AshaSection | None = Field(
        None, description="Early stopping of trials; default: all trials complete."
    )

    @property
    def num_trials(self) -> int:
        """Total number of trials."""
        # A grid ends when its combinations do, whatever `trials` says.
        if self.search == "grid":
            num_combinations = math.prod(len(choice.values) for choice in self.space.values())
            return min(self.trials or num_combinations, num_combinations)

        return self.trials or DEFAULT_TRIALS

    def point(self, number: int) -> dict[str, Any]:
        """Return {field: value} of trial `number` of a grid or random search.

        Optuna's points also depend on the results of previous trials.
        """
        if self.search == "grid":
            combinations = itertools.product(*(choice.values for choice in self.space.values()))
            combination = next(itertools.islice(combinations, number, None))
            return dict(zip(self.space, combination, strict=True))

        # A generator for each trial, so that a resumed search can draw a point without those
        # before. Python hashes a seed that is text by SHA-512, the same on every machine.
        rng = random.Random(f"{self.seed} {number}")
        return {field: choice.draw(rng) for field, choice in self.space.items()}


class Search:
    """A search over a base config.

    Attributes:
        section: the search file.
    """

    def __init__(
        self, section: SearchSection, document: Mapping[str, Any], overrides: Sequence[str]
    ) -> None:
        self.section = section
        self._document = document
        self._overrides = overrides

    def config(self, values: Mapping[str, Any], number: int = 0) -> RunConfig:
        """Return the config of trial `number` with `values`.

        Raises:
            ConfigError: lists all problems of this config.
        """
        inspected = self._inspect(values, number)
        if inspected.problems:
            raise ConfigError(inspected.problems, f"trial {number}")
        return inspected.config

    def _inspect(self, values: Mapping[str, Any], number: int) -> InspectedConfig:
        mapping, invalid_overrides = apply_overrides(self._document, self._overrides, is_text)

        # After the overrides, so that the values of the trial take precedence. The name comes last:
        # each trial needs its own, even if run.name is overridden or searched.
        fields = {**values, "run.name": f"{self.section.name}-t{number}"}
        for field, value in fields.items():
            mapping = with_field(mapping, field.split("."), value)

        inspected = inspect_config(mapping)
        return inspected._replace(problems=[*invalid_overrides, *inspected.problems])

    def problems(self) -> list[str]:
        """Return the distinct problems of the trials' configs.

        Covers all points of a grid or random search; for optuna, each listed value and the ends of
        each range.
        """
        # A dictionary as an ordered set: most problems are those of the base config, in each trial.
        found: dict[str, None] = {}
        for point in self._points_to_check():
            inspected = self._inspect(point, 0)

            # Fields of a broken config may be absent, so they are not read.
            lines = inspected.problems or _trial_problems(inspected.config, self.section)
            found |= dict.fromkeys(lines)

        return list(found)

    def _points_to_check(self) -> list[dict[str, Any]]:
        section = self.section
        if section.search != "optuna":
            return [section.point(number) for number in range(section.num_trials)]

        # The points that optuna will choose are not known. One field at a time goes through its
        # values or ends: the number of all combinations grows exponentially with the fields.
        values_by_field = {}
        for field, choice in section.space.items():
            values_by_field[field] = choice.values or (choice.low, choice.high)
        first = {field: values[0] for field, values in values_by_field.items()}

        points = [first]
        for field, values in values_by_field.items():
            for value in values:
                points.append({**first, field: value})
        return points


def load_search(config: str, path: str, overrides: Sequence[str] = ()) -> Search:
    """Return the search in the search file `path` over the config in `config`.

    Args:
        config: path or URL of the base config.
        path: path or URL of the search file.
        overrides: section.field=value, set in all trials.

    Raises:
        ConfigError: lists the problems of the file, or of the trials' configs.
    """
    document, problems = read_document(path)
    masked = mask_credentials(document)
    document = masked.mapping
    problems += [*masked.problems, *renames.SEARCH.problems(document)]
    try:
        section = SearchSection.model_validate(renames.SEARCH.migrate(document))
    except ValidationError as error:
        lines = [_line(details) for details in error.errors(include_url=False)]
        # Not `from error`: pydantic's own text quotes values.
        raise ConfigError([*problems, *lines], path) from None

    base, duplicates = read_document(config)
    problems += duplicates

    if section.search == "grid":
        for field, choice in section.space.items():
            if not choice.values:
                problems.append(
                    f"space.{field}: is a range, and a grid needs values. Allowed: a list. List "
                    "some, or use search=random."
                )

    for field in section.space:
        if field.count(".") > MAX_FIELD_DOTS:
            problems.append(
                f"space.{field[:40]}...: no field has that many parts. Allowed: section.field. "
                "Correct it."
            )

    if section.num_trials > MAX_TRIALS:
        problems.append(
            f"search: {section.num_trials:,} trials. Allowed: at most {MAX_TRIALS:,}. Lower "
            "trials, or list fewer values."
        )

    # The trials are checked only if the file has no problems: a grid with a range has no points.
    search = Search(section, base, overrides)
    problems = problems or search.problems()
    if problems:
        raise ConfigError(problems, path)
    return search


def _line(error: Any) -> str:
    """Return the line for one of pydantic's errors about the search file."""
    location = error["loc"]
    fields = SearchSection.model_fields

    # An unknown key has no description: the fields of the section are allowed instead.
    info = fields.get(str(location[0])) if location else None
    allowed = str(info.description).rstrip(".") if info else ", ".join(fields)

    message = error["msg"].removeprefix("Value error, ").lower()
    name = ".".join(map(str, location)) or "a key"
    return f"{name}: {message}. Allowed: {allowed}. Correct it."


def _trial_problems(config: RunConfig, section: SearchSection) -> list[str]:
    """Return why a run cannot be a trial."""
    problems = []
    evaluation = config.evaluation
    if config.max_workers:
        problems.append(
            f"cluster.workers={config.max_workers}: a trial is one process, and several may run at "
            "the same time. Allowed in a search: 0. Set it."
        )

    if not evaluation.data or not (evaluation.is_repeated or evaluation.at_end):
        problems.append(
            "evaluation.data: trials are compared by checkpoint.best_by of their evaluations. "
            "Needs held-out data, and evaluation.every_steps or at_end. Set them."
        )

    if section.asha and not evaluation.is_repeated:
        problems.append(
            "asha: a trial can only be stopped after an evaluation. Needs evaluation.every_steps "
            "or every_epochs. Set one."
        )

    return problems
