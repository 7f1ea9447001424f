"""The section `log`: progress lines, metrics, experiment trackers and notifications."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from dist_ft.config.sections.section import Section


class WandbSection(Section):
    """Weights & Biases, if a project is set.

    Its key comes from WANDB_API_KEY or the machine's netrc.
    """

    project: str = Field(
        "",
        description=(
            "Project that receives the metrics; empty: not used. Needs the extra dist-ft[wandb]."
        ),
    )
    entity: str | None = Field(
        None, description="Team or user; default: the default entity of the account."
    )
    mode: Literal["online", "offline"] = Field(
        "online",
        description="offline: store in `folder` on rank 0's node, for `wandb sync` later.",
    )
    folder: str | None = Field(
        None, description="Local folder of its files; default: wandb in data.cache_dir."
    )


class MlflowSection(Section):
    """MLflow, if an experiment is set.

    Its credentials come from the environment (MLFLOW_TRACKING_TOKEN ...).
    """

    experiment: str = Field(
        "",
        description=(
            "Experiment that receives the metrics; empty: not used. Needs the extra "
            "dist-ft[mlflow]."
        ),
    )
    tracking_uri: str | None = Field(
        None,
        description=("Server, database (sqlite:///file) or folder; default: MLFLOW_TRACKING_URI."),
    )


NotifyEvent = Literal["end", "give_up", "restarts", "no_progress"]
NOTIFY_EVENTS: tuple[NotifyEvent, ...] = ("end", "give_up", "restarts", "no_progress")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class NotifySection(Section):
    """Notifications about a run: a command, a webhook, or both.

    They are sent by the process that was started (`dist-ft train`), which on Ray is the driver.
    """

    command: tuple[str, ...] = Field(
        (),
        description=(
            "Program and arguments, as a list of words; no shell reads them. It gets the notice as "
            "JSON on its standard input, and as DIST_FT_EVENT, _RUN, _STORAGE, _STEP, _TIME and "
            "_MESSAGE in its environment; empty: none."
        ),
    )
    # Its value is a secret, and a config is stored with the run.
    webhook_env: str = Field(
        "",
        description=(
            "Name of the environment variable that holds the URL of a webhook (Slack's, or any "
            "that takes JSON), such as DIST_FT_WEBHOOK; never the URL itself; empty: none."
        ),
    )
    events: tuple[NotifyEvent, ...] = Field(
        NOTIFY_EVENTS,
        description=(
            "Events to report: end (complete, or stopped by request or a limit), give_up (ended by "
            "an error), restarts (repeated), no_progress."
        ),
    )
    restarts: int = Field(
        3, ge=1, description="Restarts after failures, within restarts_within_s, to report."
    )
    restarts_within_s: float = Field(
        3600, gt=0, description="Seconds within which restarts are counted."
    )
    no_progress_s: float = Field(
        3600,
        ge=0,
        description=(
            "Seconds without a step, an evaluated batch or a save (also while workers are missing) "
            "to report; 0: never."
        ),
    )
    timeout_s: float = Field(
        10, gt=0, le=300, description="Seconds that one attempt to deliver a notice may take."
    )


class LogSection(Section):
    """Progress lines, metrics, experiment trackers and notifications."""

    # No field is part of the identity: what is logged changes nothing of the run.
    every_steps: int = Field(1, ge=1, description="Steps between progress lines and metrics.")
    straggler_steps: int = Field(
        20,
        ge=0,
        description=(
            "Steps between comparisons of the workers' speed; a slow worker is named; 0: never."
        ),
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events into the run's storage.")
    wandb: WandbSection = Field(default_factory=WandbSection, description="Weights & Biases.")
    mlflow: MlflowSection = Field(default_factory=MlflowSection, description="MLflow.")
    notify: NotifySection = Field(
        default_factory=NotifySection,
        description="Notifications: end, giving up, repeated restarts, no progress.",
    )
    level: Literal["debug", "info", "warning"] = Field(
        "info", description="Lowest level of log lines to show."
    )


def _notify(log: LogSection) -> Iterator[str]:
    notify = log.notify
    if notify.command and not notify.command[0].strip():
        yield (
            "log.notify.command: its first word, the program, is empty. Allowed: a list of words "
            "such as [./notify.sh, me]. Correct it."
        )

    for word in notify.command:
        # The URL of a webhook is its secret: whoever has it can post. So it is not shown either.
        if re.search(r"(?i)https?://", word):
            yield (
                "log.notify.command: a word holds a URL, which may be a secret, and a config is "
                "stored with the run. Allowed: URLs in the environment. Set log.notify.webhook_env "
                "to the name of a variable, or have a script read one."
            )
        if "\0" in word:
            yield (
                "log.notify.command: a word has a NUL character. Programs take words without one. "
                "Remove it."
            )

    if notify.webhook_env and not _VARIABLE_NAME.fullmatch(notify.webhook_env):
        yield (
            "log.notify.webhook_env: not the name of an environment variable. Allowed: letters, "
            "digits and '_', such as DIST_FT_WEBHOOK. Set a variable to the URL, and write its "
            "name here."
        )


CHECKS = (_notify,)
