"""Robustness scores: out-of-scope detection, and predictions that a perturbation changes. Pure.

Dimensions: N rows in scope, M rows out of scope, K labels.
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

    confidence_parts = []
    for logits in (in_scope, out_of_scope):
        probabilities = softmax(np.array(logits))  # (N, K), then (M, K)
        confidence_parts.append(probabilities.max(1))

    confidence = np.concatenate(confidence_parts)  # (N + M,)
    is_in_scope = [1] * len(in_scope) + [0] * len(out_of_scope)
    return float(roc_auc_score(is_in_scope, confidence))


def share_of_changed_predictions(before: Sequence[Any], after: Sequence[Any]) -> float:
    """Return the share of rows whose prediction changed, from 0 to 1.

    Args:
        before: what the model decided for each row (`Task.decide`).
        after: the same for each perturbed row, in the order of `before`.
    """
    # A decision may be an array (tags, spans), for which `!=` would compare element by element.
    changed = []
    for decision, perturbed_decision in zip(before, after, strict=True):
        changed.append(not np.array_equal(decision, perturbed_decision))

    return float(np.mean(changed))
