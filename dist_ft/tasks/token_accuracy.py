"""Accuracy of predicted tokens, which masked_lm and seq2seq share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from dist_ft.metrics import task_scores
from dist_ft.metrics.task_scores import TaskScores
from dist_ft.tasks.base import Task


class TokenTask(Task):
    """A task whose targets are tokens; `read_output` expects (correct, all) tokens of a row."""

    metrics = ("perplexity", "accuracy")
    counts_tokens = True
    has_probabilities = True

    @override
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        return task_scores.token_accuracy(np.array(expected))
