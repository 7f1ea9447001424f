"""Robustness: detection of out-of-scope rows, and predictions that a perturbation changes. Pure.

K is the number of labels, T the number of words of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_ft.metrics.task_scores import softmax


def out_of_scope_auroc(inside: Sequence[Any], outside: Sequence[Any]) -> float:
    """Return how well the largest probability separates rows in scope from others (ROC AUC).

    1: it is always larger in scope; 0.5: it does not separate them (Hendrycks, Gimpel,
        arXiv:1610.02136).

    Args:
        inside: logits (K,) of each row in scope.
        outside: logits (K,) of each other row.
    """
    from sklearn.metrics import roc_auc_score

    confidence = np.concatenate([softmax(np.array(logits)).max(1) for logits in (inside, outside)])
    return float(roc_auc_score([1] * len(inside) + [0] * len(outside), confidence))


def share_of_changed_predictions(task: str, before: Sequence[Any], after: Sequence[Any]) -> float:
    """Return the share of rows whose prediction changed.

    Rows as `PredictionCollector` gathers them.
    """
    changed = [
        not np.array_equal(_decode_row(task, row_before), _decode_row(task, row_after))
        for row_before, row_after in zip(before, after, strict=True)
    ]
    return float(np.mean(changed))


def _decode_row(task: str, output: Any) -> Any:
    """Return the prediction of a row: a label, booleans per label, tags (T,) or the output."""
    if task == "sequence_classification":
        return np.asarray(output).argmax()
    if task == "token_classification":
        return output[0]
    if task == "multi_label":
        return np.asarray(output) > 0
    return np.asarray(output)
