"""Scores beyond the metrics of a task: how sure a model is out of scope, what typos and swapped names change. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_ft.metrics.task_scores import softmax


def out_of_scope_auroc(inside: Sequence[Any], outside: Sequence[Any]) -> float:
    """Return how well the largest probability tells rows in scope from others: the area under the ROC curve.

    1: always larger in scope; 0.5: it tells nothing (Hendrycks, Gimpel, arXiv:1610.02136).

    Args:
        inside: logits (K,) of each row in scope.
        outside: of each that is not.
    """
    from sklearn.metrics import roc_auc_score

    sure = np.concatenate([softmax(np.array(rows)).max(1) for rows in (inside, outside)])
    return float(roc_auc_score([1] * len(inside) + [0] * len(outside), sure))


def share_changed(task: str, before: Sequence[Any], after: Sequence[Any]) -> float:
    """Return the share of rows of which something else is predicted; rows as a `Scorer` gathers them."""
    return float(
        np.mean(
            [
                not np.array_equal(_predicted(task, one), _predicted(task, other))
                for one, other in zip(before, after, strict=True)
            ]
        )
    )


def _predicted(task: str, told: Any) -> Any:
    """Return what is predicted of one row: the number of a label, yes or no for each, or the number of each tag."""
    if task == "sequence_classification":
        return np.asarray(told).argmax()
    if task == "token_classification":
        return told[0]
    return np.asarray(told) > 0 if task == "multi_label" else np.asarray(told)
