"""Robustness scores: out-of-scope detection, and predictions that a perturbation changes. Pure.

K is the number of labels, T the number of words of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_ft.metrics.task_scores import softmax


def out_of_scope_auroc(in_scope: Sequence[Any], out_of_scope: Sequence[Any]) -> float:
    """Return the ROC AUC with which the maximum softmax probability detects rows in scope.

    1: it is higher for every row in scope than for any other row; 0.5: it does not separate them.
    Source: Hendrycks and Gimpel, arXiv:1610.02136.

    Args:
        in_scope: logits (K,) of each row in scope; at least one row.
        out_of_scope: logits (K,) of each row out of scope; at least one row.
    """
    from sklearn.metrics import roc_auc_score

    confidence = [softmax(np.array(logits)).max(1) for logits in (in_scope, out_of_scope)]
    is_in_scope = [1] * len(in_scope) + [0] * len(out_of_scope)
    return float(roc_auc_score(is_in_scope, np.concatenate(confidence)))


def share_of_changed_predictions(before: Sequence[Any], after: Sequence[Any]) -> float:
    """Return the share of rows whose prediction changed, from 0 to 1.

    Args:
        before: what the model decided for each row (`Task.decide`).
        after: the same for each perturbed row, in the order of `before`.
    """
    changed = [not np.array_equal(*pair) for pair in zip(before, after, strict=True)]
    return float(np.mean(changed))
