"""What the file of `dist-ft tune` holds: which fields of a config are tried with which values, and how.

Points of a grid and random points are pure functions of the file (and of seed and number), so that a search that was
cut off goes on with the same ones. Does not run anything.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dist_ft.config import renames
from dist_ft.config.document import read_document, with_field
from dist_ft.config.load import inspect_config
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.section import Section
from dist_ft.core.errors import ConfigError

NAME = r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$"


class Range(Section):
    """Values of one field: some to choose among, or a range of numbers."""

    values: tuple[Any, ...] = Field(
        (), description="Values to choose among, in place of low and high."
    )
    low: int | float | None = Field(
        None, description="Least value; a whole number where low and high are."
    )
    high: int | float | None = Field(None, description="Greatest value.")
    log: bool = Field(False, description="Draw evenly by order of magnitude.")

    @model_validator(mode="after")
    def _is_one(self) -> Range:
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
        """Return one of the values."""
        if self.values:
            return self.values[rng.randrange(len(self.values))]
        low, high = float(self.low or 0), float(self.high or 0)
        if self.is_whole:
            low, high = low - 0.5 + 1e-9, high + 0.5 - 1e-9
        found = (
            math.exp(rng.uniform(math.log(low), math.log(high)))
            if self.log
            else rng.uniform(low, high)
        )
        return round(found) if self.is_whole else found


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
            "At each rung, which lie so many times further apart, one in so many trials goes on."
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
            "grid: every combination of values; random: drawn by seed; optuna: by what trials before gave (TPE)."
        ),
    )
    trials: int | None = Field(None, ge=1, description="How many trials; none: 10 (grid: all).")
    max_concurrent: int = Field(
        1, ge=1, description="Trials at a time, each a process of its own, as far as CPUs reach."
    )
    seed: int = Field(0, ge=0, description="Seed of what is drawn; the runs have run.seed.")
    space: dict[str, Annotated[Range, BeforeValidator(_as_range)]] = Field(
        min_length=1, description=("section.field: a list of values, or {low, high, log}.")
    )
    asha: AshaSection | None = Field(
        None, description="Early stopping of trials; none: all go to their end."
    )

    @property
    def num_trials(self) -> int:
        """Trials of the search, all in all."""
        if self.search == "grid":
            every = math.prod(len(one.values) for one in self.space.values())
            return min(self.trials or every, every)
        return self.trials or 10

    def point(self, number: int) -> dict[str, Any]:
        """Return the values of trial `number`, by field; not of optuna, which decides as it goes."""
        if self.search == "grid":
            every = itertools.product(*(one.values for one in self.space.values()))
            return dict(zip(self.space, next(itertools.islice(every, number, None)), strict=True))
        rng = random.Random(f"{self.seed} {number}")
        return {field: one.draw(rng) for field, one in self.space.items()}


class Search:
    """A search over a config."""

    def __init__(
        self, section: SearchSection, document: Mapping[str, Any], overrides: Sequence[str]
    ) -> None:
        self.section = section
        self._document = document
        self._overrides = overrides

    def config(self, values: Mapping[str, Any], number: int = 0) -> RunConfig:
        """Return the run of a trial; raises ConfigError if its fields do not go together."""
        config, problems = self._inspect(values, number)
        if problems:
            raise ConfigError(problems, f"trial {number}")
        return config

    def _inspect(self, values: Mapping[str, Any], number: int) -> tuple[RunConfig, list[str]]:
        from dist_ft.config.document import apply_overrides
        from dist_ft.config.error_messages import is_text

        mapping, broken = apply_overrides(self._document, self._overrides, is_text)
        for field, value in {**values, "run.name": f"{self.section.name}-t{number}"}.items():
            mapping = with_field(mapping, field.split("."), value)
        config, problems, _ = inspect_config(mapping)
        return config, [*broken, *problems]

    def problems(self) -> list[str]:
        """Return what is wrong with the trials' configs: all of a grid or random points, else the ends of ranges."""
        section = self.section
        if section.search == "optuna":
            first = {field: (one.values or (one.low,))[0] for field, one in section.space.items()}
            points = [
                first,
                *(
                    {**first, field: value}
                    for field, one in section.space.items()
                    for value in one.values or (one.low, one.high)
                ),
            ]
        else:
            points = [section.point(number) for number in range(section.num_trials)]
        found: dict[str, None] = {}
        for point in points:
            config, wrong = self._inspect(point, 0)
            found |= dict.fromkeys(wrong or _unfit(config, section))
        return list(found)


def load_search(config: str, path: str, overrides: Sequence[str] = ()) -> Search:
    """Return the search in the YAML file `path` over the config file `config`, `overrides` set in all trials.

    Raises ConfigError with every problem of the file or of the trials' configs.
    """
    document, problems = read_document(path)
    problems += renames.SEARCH.problems(document)
    try:
        section = SearchSection.model_validate(renames.SEARCH.migrate(document))
    except ValidationError as error:
        raise ConfigError(
            [*problems, *(_line(one) for one in error.errors(include_url=False))], path
        ) from error
    base, twice = read_document(config)
    problems += twice
    if section.search == "grid":
        problems += [
            f"space.{field}: is a range, and a grid needs values; allowed: a list; name some, or use "
            "search=random"
            for field, one in section.space.items()
            if not one.values
        ]
    search = Search(section, base, overrides)
    problems = problems or search.problems()
    if problems:
        raise ConfigError(problems, path)
    return search


def _line(error: Any) -> str:
    """Return the line for one of pydantic's errors."""
    where, fields = error["loc"], SearchSection.model_fields
    info = fields.get(str(where[0])) if where else None
    allowed = str(info.description).rstrip(".") if info else ", ".join(fields)
    return (
        f"{'.'.join(map(str, where))}: {error['msg'].removeprefix('Value error, ').lower()}; allowed: {allowed}; "
        "correct it"
    )


def _unfit(config: RunConfig, section: SearchSection) -> list[str]:
    """Return what keeps a run from being a trial."""
    found = []
    again = config.evaluation.every_steps or config.evaluation.every_epochs
    if config.max_workers:
        found.append(
            f"cluster.workers={config.max_workers}: a trial is one process, and several may run at once; "
            "allowed in a search: 0; set it"
        )
    if not config.evaluation.data or not (again or config.evaluation.at_end):
        found.append(
            "evaluation.data: trials are compared by checkpoint.best_by of their evaluations; needs held-out "
            "data, and evaluation.every_steps or at_end; set them"
        )
    if section.asha and not again:
        found.append(
            "asha: a trial can be stopped where it is evaluated; needs evaluation.every_steps or "
            "every_epochs; set one"
        )
    return found
