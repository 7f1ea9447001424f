"""Contradictions between the section `task` and other sections."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.decoding import GENERATIVE_TASKS

MAX_WINDOW = 16384
"""Tokens of a window whose positions fit into the labels of question_answering."""
SMOOTHED_TASKS = (
    "causal_lm",
    "sequence_classification",
    "token_classification",
    "seq2seq",
    "masked_lm",
)
"""Tasks whose loss can be label-smoothed."""


def _regularizers(config: RunConfig) -> Iterator[str]:
    task, tuning = config.task.name, config.tuning
    if tuning.neftune_alpha and task == "seq2seq":
        yield (
            f"tuning.neftune_alpha={tuning.neftune_alpha}: not used by task.name=seq2seq (source "
            "and target share their embeddings). Allowed with all other tasks. Remove it."
        )
    if tuning.label_smoothing and task not in SMOOTHED_TASKS:
        yield (
            f"tuning.label_smoothing={tuning.label_smoothing}: the loss of task.name={task} has no "
            f"label probabilities to smooth. Allowed with {', '.join(SMOOTHED_TASKS)}. Remove it."
        )


def _minimum_risk(config: RunConfig) -> Iterator[str]:
    task = config.task
    if task.objective != "minimum_risk":
        return
    if task.name not in GENERATIVE_TASKS:
        yield (
            f"task.objective=minimum_risk: models of task.name={task.name} generate no text. "
            f"Allowed with {' and '.join(GENERATIVE_TASKS)}. Remove it."
        )
    if task.name == "causal_lm" and config.data.pack:
        yield (
            "task.objective=minimum_risk: a row has one prompt and one generation, so samples "
            "cannot be packed. Set data.pack=false."
        )
    if config.tuning.label_smoothing:
        yield (
            f"tuning.label_smoothing={config.tuning.label_smoothing}: not used by "
            "task.objective=minimum_risk. Allowed with likelihood. Remove it."
        )


def _sizes(config: RunConfig) -> Iterator[str]:
    task, batch = config.task, config.batch
    if task.name == "embedding" and batch.micro_batch < 2:
        yield (
            f"batch.micro_batch={batch.micro_batch}: task.name=embedding compares each text with "
            "the others of its micro-batch. At least 2 are needed, more are better. Raise it."
        )
    if task.name == "question_answering" and batch.sequence_length > MAX_WINDOW:
        yield (
            f"batch.sequence_length={batch.sequence_length}: windows of "
            f"task.name=question_answering have at most {MAX_WINDOW} tokens. Longer contexts "
            "become several windows. Lower it."
        )
    if task.name == "question_answering" and task.stride >= batch.sequence_length // 2:
        yield (
            f"task.stride={task.stride}: too long for windows of "
            f"batch.sequence_length={batch.sequence_length}. Allowed: less than half. Lower it."
        )


CHECKS = (_regularizers, _minimum_risk, _sizes)
