"""A run with what its config leaves open: the model folder, the labels, the few-shot examples.

`RunConfig` is what the user wrote and what a run stores. Whatever is found out when the run starts
is a field of `ResolvedRun`, so `config` always means the same. `runtime.bootstrap.resolve_run`
builds it, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dist_ft.config.schema import ModelSection, RunConfig
from dist_ft.config.sections.prompting import PromptingSection, get_model_task
from dist_ft.config.sections.task import TaskSection


@dataclass(frozen=True)
class ResolvedRun:
    """A run as this process carries it out.

    Attributes:
        config: the config as the user gave it.
        model: `config.model`, its path replaced by a local folder where model.path names another
            run or where task.grow_head added rows to the head.
        labels: labels of the task, in the order of the head's outputs; empty for tasks without
            labels, and until they are resolved.
        templates: prompt templates with the few-shot examples written in; None: those of the
            config.
        tokenizer: tokenizer of the model; None until it is loaded.
    """

    config: RunConfig
    model: ModelSection
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] | None = None

    # Any, as `config` imports no heavy package. Not compared: the config determines it.
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def from_config(cls, config: RunConfig) -> ResolvedRun:
        """Return the run with nothing resolved yet."""
        return cls(config, config.model, config.task.labels)

    def with_model_folder(self, folder: str) -> ResolvedRun:
        """Return the run with its model in a local folder."""
        # A revision names a commit of the hub; a local folder has none.
        return replace(self, model=self.model.model_copy(update={"path": folder, "revision": None}))

    @property
    def task(self) -> TaskSection:
        """The task with its labels, as encoders, models and scores take it."""
        return self.config.task.model_copy(update={"labels": self.labels})

    @property
    def prompting(self) -> PromptingSection:
        """The prompting with its examples in place, as encoders take it."""
        if self.templates is None:
            return self.config.prompting

        # The examples are text of the templates now: with shots they would be added a second time.
        return self.config.prompting.model_copy(update={"templates": self.templates, "shots": 0})

    @property
    def model_task(self) -> TaskSection:
        """The task the model is loaded for: one that is prompted for labels continues text."""
        return get_model_task(self.task, self.prompting)
