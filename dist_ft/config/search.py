"""The file of `dist-ft tune`: the config fields to tune, their values, and the algorithm.

Points of a grid and random points are pure functions of the file (of seed and number), so an
interrupted search resumes with the same ones. Does not run anything.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dist_ft.config import renames
from dist_ft.config.document import apply_overrides, read_document, with_field
from dist_ft.config.error_messages import is_text
from dist_ft.config.load import InspectedConfig, inspect_config
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.section import Section
from dist_ft.core.errors import ConfigError

# 42 characters, so that run names with "-t999" have at most the 47 of run.name.
NAME = r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$"
DEFAULT_TRIALS = 10


class Range(Section):
    """Values of one field: a list of choices, or a range of numbers."""

    values: tuple[Any, ...] = Field((), description="List of choices, in place of low and high.")
    low: int | float | None = Field(
        None, description="Lowest value; values are whole numbers if low and high are."
    )
    high: int | float | None = Field(None, description="Highest value.")
    log: bool = Field(False, description="Sample uniformly on a logarithmic scale.")

    @model_validator(mode="after")
    def _is_one(self) -> Range:
        # pydantic prefixes these texts; `_line` takes the prefix off again.
        if bool(self.values) == (self.low is not None and self.high is not None):
            raise ValueError("either values, or low and high, are needed")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError("low must be below high")
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

        low, high = float(self.low or 0), float(self.high or 0)
        if self.is_whole:
            # Half a unit more on both sides makes the ends as likely as other values after
            # rounding. The 1e-9 keeps a draw at the very edge from being rounded beyond the range.
            low, high = low - 0.5 + 1e-9, high + 0.5 - 1e-9

        if self.log:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            value = rng.uniform(low, high)

        if self.is_whole:
            return round(value)
        return value


def _as_range(value: Any) -> Any:
    """Accept a list of values."""
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
            "Factor between the steps of two rungs; at each rung one trial of this number "
            "continues."
        ),
    )


class SearchSection(Section):
    """The whole file."""

    name: str = Field(
        pattern=NAME, description="Name of the search; its runs are <name>-t0, <name>-t1, ..."
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
        description="Trials that run at the same time, each in a process, as CPUs allow.",
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
        """Return {field: value} of trial `number`; not of optuna, which uses previous results."""
        if self.search == "grid":
            combinations = itertools.product(*(choice.values for choice in self.space.values()))
            combination = next(itertools.islice(combinations, number, None))
            return dict(zip(self.space, combination, strict=True))

        # A generator of its own for each trial, so that a resumed search draws the same points
        # without those before. Seeded by text: Python hashes it by SHA-512, the same everywhere.
        rng = random.Random(f"{self.seed} {number}")
        return {field: choice.draw(rng) for field, choice in self.space.items()}


class Search:
    """A search over a config."""

    def __init__(
        self, section: SearchSection, document: Mapping[str, Any], overrides: Sequence[str]
    ) -> None:
        self.section = section
        self._document = document
        self._overrides = overrides

    def config(self, values: Mapping[str, Any], number: int = 0) -> RunConfig:
        """Return the run of a trial; raises ConfigError if its fields contradict each other."""
        inspected = self._inspect(values, number)
        if inspected.problems:
            raise ConfigError(inspected.problems, f"trial {number}")
        return inspected.config

    def _inspect(self, values: Mapping[str, Any], number: int) -> InspectedConfig:
        mapping, invalid_overrides = apply_overrides(self._document, self._overrides, is_text)

        # After the overrides, which are the same for all trials. The name is last: it makes the
        # trial a run of its own, whatever the other fields say.
        fields = {**values, "run.name": f"{self.section.name}-t{number}"}
        for field, value in fields.items():
            mapping = with_field(mapping, field.split("."), value)

        inspected = inspect_config(mapping)
        return inspected._replace(problems=[*invalid_overrides, *inspected.problems])

    def problems(self) -> list[str]:
        """Return the distinct problems of the trials' configs.

        All points of a grid or random search are checked, and the ends of optuna's ranges.
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

        # Which points optuna will choose is not known. One field at a time goes through its ends:
        # all combinations of ends would be 2 to the power of the number of fields.
        ends_of_fields = {}
        for field, choice in section.space.items():
            ends_of_fields[field] = choice.values or (choice.low, choice.high)
        first = {field: ends[0] for field, ends in ends_of_fields.items()}

        points = [first]
        for field, ends in ends_of_fields.items():
            for value in ends:
                points.append({**first, field: value})
        return points


def load_search(config: str, path: str, overrides: Sequence[str] = ()) -> Search:
    """Return the search in the YAML file `path` over the config file `config`.

    Args:
        config: file of the base config.
        path: file of the search.
        overrides: section.field=value, set in all trials.

    Raises:
        ConfigError: lists the problems of the file, or of the trials' configs.
    """
    document, problems = read_document(path)
    problems += renames.SEARCH.problems(document)
    try:
        section = SearchSection.model_validate(renames.SEARCH.migrate(document))
    except ValidationError as error:
        lines = [_line(details) for details in error.errors(include_url=False)]
        raise ConfigError([*problems, *lines], path) from error

    base, duplicates = read_document(config)
    problems += duplicates

    if section.search == "grid":
        for field, choice in section.space.items():
            if not choice.values:
                problems.append(
                    f"space.{field}: is a range, and a grid needs values. Allowed: a list. List "
                    "some, or use search=random."
                )

    # The points of a broken search cannot be computed, so trials are only checked without problems.
    search = Search(section, base, overrides)
    problems = problems or search.problems()
    if problems:
        raise ConfigError(problems, path)
    return search


def _line(error: Any) -> str:
    """Return the line for one of pydantic's errors."""
    location = error["loc"]
    fields = SearchSection.model_fields

    # An unknown key has no description; the fields of the section are what is allowed then.
    info = fields.get(str(location[0])) if location else None
    allowed = str(info.description).rstrip(".") if info else ", ".join(fields)

    message = error["msg"].removeprefix("Value error, ").lower()
    return f"{'.'.join(map(str, location))}: {message}. Allowed: {allowed}. Correct it."


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
