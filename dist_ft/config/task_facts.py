"""Tasks by name, and what the config and its checks know of them.

A task is a class: `TASKS` names those of dist_ft, and an import path such as
`mypackage.ranking:PairwiseRanking` names a user's own, in every process that reads the config. The
class lies in a higher room (`dist_ft.tasks`), so it is imported when it is looked up.

Guarantee: no folder of a run or a model makes this module import code. `allow_task` permits an
import path, and only the user's own config, command line or Python code calls for it.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any, ClassVar

from dist_ft.core.errors import ConfigError

TASKS = {
    "causal_lm": "dist_ft.tasks.causal_lm:CausalLMTask",
    "sequence_classification": "dist_ft.tasks.sequence_classification:SequenceClassification",
    "multi_label": "dist_ft.tasks.multi_label:MultiLabel",
    "regression": "dist_ft.tasks.regression:Regression",
    "token_classification": "dist_ft.tasks.token_classification:TokenClassification",
    "question_answering": "dist_ft.tasks.question_answering:QuestionAnswering",
    "seq2seq": "dist_ft.tasks.seq2seq:Seq2Seq",
    "masked_lm": "dist_ft.tasks.masked_lm:MaskedLM",
    "embedding": "dist_ft.tasks.embedding:Embedding",
}
"""The class of each task, as an import path."""
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""An import path of a user's own task."""

_classes: dict[str, type[TaskFacts]] = {}
_allowed: set[str] = set()


class TaskFacts:
    """What the config and its checks know of a task.

    The values here are those of a task that labels nothing and generates nothing; a class sets what
    differs.

    Attributes:
        fields: fields of the section `task` that it uses, besides name and columns.
        metrics: metrics of its evaluations, in addition to the loss; the first one is its main one.
        has_labels: its outputs are labels, which task.labels or the data name.
        has_label_per_row: it chooses one label for a whole row.
        has_head: its model has a head of its own, which is always trained.
        generates_text: its models generate text.
        counts_tokens: its loss is one of tokens, so exp(loss) is a perplexity.
        reads_formats: it reads rows as data.format says, not the columns of task.columns, and packs
            several into a sequence.
        splits_rows: a row may continue in further sequences.
        always_splits: a row does so whatever data.overlong says.
        allows_augmentation: words of a row may change (data.augment).
        allows_typos: a row may get typos and keeps its label.
        allows_noise: the embeddings may get noise (tuning.neftune_alpha).
        has_probabilities: its loss is a cross-entropy, whose labels can be smoothed.
        prompting_methods: values of prompting.method that answer it without a head.
        virtual_token_type: peft's name of the task for virtual tokens; None: peft has none.
        adapter_type: peft's name of the task for adapters; None: a task without a class in peft.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = ()
    has_labels: ClassVar[bool] = False
    has_label_per_row: ClassVar[bool] = False
    has_head: ClassVar[bool] = False
    generates_text: ClassVar[bool] = False
    counts_tokens: ClassVar[bool] = False
    reads_formats: ClassVar[bool] = False
    splits_rows: ClassVar[bool] = False
    always_splits: ClassVar[bool] = False
    allows_augmentation: ClassVar[bool] = False
    allows_typos: ClassVar[bool] = False
    allows_noise: ClassVar[bool] = True
    has_probabilities: ClassVar[bool] = False
    prompting_methods: ClassVar[tuple[str, ...]] = ()
    virtual_token_type: ClassVar[str | None] = None
    adapter_type: ClassVar[str | None] = None


def task_class(name: str) -> type[Any]:
    """Return the class of a task.

    Args:
        name: a name in `TASKS`, or an import path.

    Raises:
        ConfigError: no such task, or an import path that was not allowed.
    """
    if name not in _classes:
        _classes[name] = _import_class(name, TASKS.get(name) or _require_allowed(name))
    return _classes[name]


def allow_task(name: str) -> None:
    """Allow a task that the user named, so that `task_class` may import it."""
    _allowed.add(name)


def tasks_where(**facts: Any) -> tuple[str, ...]:
    """Return the names of the tasks of dist_ft whose attributes have these values."""
    return tuple(
        name
        for name in TASKS
        if all(getattr(task_class(name), fact) == value for fact, value in facts.items())
    )


def _require_allowed(name: str) -> str:
    """Return an import path that may be imported."""
    if not IMPORT_PATH.fullmatch(name):
        raise ConfigError(
            [
                f"task.name={name}: no such task. Allowed: {', '.join(TASKS)}, or the import path "
                "of a class of your own, such as mypackage.tasks:MyTask."
            ]
        )

    is_imported = name.partition(":")[0] in sys.modules
    if name not in _allowed and not is_imported:
        raise ConfigError(
            [
                f"task.name={name}: a folder names this class, and dist_ft runs no code that only "
                f"a folder names. If you trust it, use `dist-ft --task {name} ...`, or import its "
                "module first."
            ]
        )
    return name


def _import_class(name: str, path: str) -> type[TaskFacts]:
    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a user's module may raise anything
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            [
                f"task.name={name}: cannot be imported ({cause}). The module must be installed, or "
                "lie in a folder of PYTHONPATH, on every node. Correct the path or the module."
            ]
        ) from error

    if not (isinstance(found, type) and issubclass(found, TaskFacts)):
        raise ConfigError(
            [f"task.name={name}: is not a task. It must be a subclass of dist_ft.Task."]
        )

    missing = sorted(getattr(found, "__abstractmethods__", ()))
    missing += [field for field in ("auto_class", "metrics") if not getattr(found, field, None)]
    if missing:
        raise ConfigError(
            [
                f"task.name={name}: the class lacks {', '.join(missing)}. A task must define them. "
                "See docs/tasks.md, `A task of your own`."
            ]
        )
    return found
