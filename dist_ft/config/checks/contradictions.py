"""All checks of a config for contradictions between its fields.

Each check is one small pure function to lines. Checks of one section are in `sections`, those of
several in the other modules here, and those of `zero.deepspeed` in `deepspeed_keys`.
`config.credentials` looks for credentials, `runtime.preflight` checks whether model, data and
machine fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from dist_ft.config.checks import data, evaluation, prompting, streaming, task, tuning, workers
from dist_ft.config.checks.deepspeed_keys import deepspeed_problems
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections import batch as batch_section
from dist_ft.config.sections import checkpoint as checkpoint_section
from dist_ft.config.sections import cluster as cluster_section
from dist_ft.config.sections import data as data_section
from dist_ft.config.sections import evaluation as evaluation_section
from dist_ft.config.sections import log as log_section
from dist_ft.config.sections import model as model_section
from dist_ft.config.sections import optimizer as optimizer_section
from dist_ft.config.sections import prompting as prompting_section
from dist_ft.config.sections import schedule as schedule_section
from dist_ft.config.sections import task as task_section
from dist_ft.config.sections import tuning as tuning_section
from dist_ft.config.sections import zero as zero_section

_BROKEN_FIELD = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError)
"""What a check raises that reads an absent field, or computes with what stands in its place."""

Check = Callable[[RunConfig], Iterator[str]]
SectionCheck = Callable[[Any], Iterator[str]]


def contradictions(config: RunConfig, whole: bool = True) -> list[str]:
    """Return a line for each contradiction in `config`.

    With `whole=False` some fields may be absent; checks that read one of those are skipped.
    """
    lines: list[str] = []
    for check in CHECKS:
        # A list first: lines of a check that fails half-way must not be reported.
        try:
            lines.extend(list(check(config)))
        except _BROKEN_FIELD:
            # A whole config has all fields, so this is a mistake in the check itself.
            if whole:
                raise

    return lines


def _on_section(name: str, check: SectionCheck, config: RunConfig) -> Iterator[str]:
    return check(getattr(config, name))


def _section_checks(name: str, checks: tuple[SectionCheck, ...]) -> tuple[Check, ...]:
    """Return the checks of the section `name` as checks of the whole config."""
    # The section is read when a check is called, not here: it may be absent from a broken config.
    return tuple(partial(_on_section, name, check) for check in checks)


# Lines are reported in this order. Checks of one section come first: a line between sections may be
# a consequence of theirs.
CHECKS: tuple[Check, ...] = (
    *_section_checks("batch", batch_section.CHECKS),
    *_section_checks("cluster", cluster_section.CHECKS),
    *_section_checks("schedule", schedule_section.CHECKS),
    *_section_checks("tuning", tuning_section.CHECKS),
    *_section_checks("task", task_section.CHECKS),
    *_section_checks("prompting", prompting_section.CHECKS),
    *_section_checks("optimizer", optimizer_section.CHECKS),
    *_section_checks("zero", zero_section.CHECKS),
    *_section_checks("model", model_section.CHECKS),
    *_section_checks("data", data_section.CHECKS),
    *_section_checks("checkpoint", checkpoint_section.CHECKS),
    *_section_checks("evaluation", evaluation_section.CHECKS),
    *_section_checks("log", log_section.CHECKS),
    *workers.CHECKS,
    *tuning.CHECKS,
    *task.CHECKS,
    *prompting.CHECKS,
    *data.CHECKS,
    *streaming.CHECKS,
    *evaluation.CHECKS,
    deepspeed_problems,
)
