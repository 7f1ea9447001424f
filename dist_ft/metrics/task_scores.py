"""The metrics of each task from what a model told of every sample: pure, and the same at every world size.

Values are those of scikit-learn, scipy and seqeval. A metric that is not defined for the data (no spread) is NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dist_ft.config.sections.task import TaskSection

RECALLS = (1, 5, 10)
ROWS, TIE = 1024, 1e-6
"""Vectors compared at once; cosines that count as equal."""
BINS = 15


def sequence_classification(
    task: TaskSection, wanted: np.ndarray, told: np.ndarray
) -> dict[str, Any]:
    """Return the metrics of logits `told` (N, K) for labels `wanted` (N,)."""
    from sklearn import metrics

    found = told.argmax(1)
    names = list(range(len(task.labels)))
    shares = softmax(told)
    return {
        "accuracy": float(metrics.accuracy_score(wanted, found)),
        "f1_macro": float(metrics.f1_score(wanted, found, average="macro", zero_division=0)),
        "f1_weighted": float(metrics.f1_score(wanted, found, average="weighted", zero_division=0)),
        "mcc": float(metrics.matthews_corrcoef(wanted, found)),
        "calibration_error": calibration_error(shares.max(1), found == wanted),
        "by_label": _by_label(
            task,
            metrics.classification_report(
                wanted,
                found,
                labels=names,
                target_names=list(task.labels),
                output_dict=True,
                zero_division=0,
            ),
        ),
        "confusion": metrics.confusion_matrix(wanted, found, labels=names).tolist(),
    }


def multi_label(task: TaskSection, wanted: np.ndarray, told: np.ndarray) -> dict[str, Any]:
    """Return the metrics of logits `told` (N, K) for 0 or 1 `wanted` (N, K); above a logit of 0 is yes."""
    from sklearn import metrics

    found = (told > 0).astype(int)
    return {
        "accuracy": float((found == wanted).all(1).mean()),
        "f1_micro": float(metrics.f1_score(wanted, found, average="micro", zero_division=0)),
        "f1_macro": float(metrics.f1_score(wanted, found, average="macro", zero_division=0)),
        "by_label": _by_label(
            task,
            metrics.classification_report(
                wanted, found, target_names=list(task.labels), output_dict=True, zero_division=0
            ),
        ),
    }


def regression(task: TaskSection, wanted: np.ndarray, told: np.ndarray) -> dict[str, Any]:
    """Return the metrics of values `told` (N,) for `wanted` (N,)."""
    from scipy import stats

    values = {
        "mse": float(((told - wanted) ** 2).mean()),
        "mae": float(np.abs(told - wanted).mean()),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data without spread, whose correlations are NaN
        values["pearson"] = float(stats.pearsonr(wanted, told)[0]) if len(wanted) > 1 else math.nan
        values["spearman"] = (
            float(stats.spearmanr(wanted, told)[0]) if len(wanted) > 1 else math.nan
        )
    return values


def token_classification(
    task: TaskSection, wanted: Sequence[np.ndarray], told: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Return the metrics of tags, numbers (T,) of each sample's words: of entities (seqeval), and of single tags."""
    from seqeval import metrics
    from sklearn.metrics import accuracy_score, classification_report

    names = np.array(task.labels, dtype=object)
    flat_wanted, flat_told = np.concatenate(wanted), np.concatenate(told)
    gold, found = ([names[tags].tolist() for tags in side] for side in (wanted, told))
    values: dict[str, Any] = {"accuracy": float(accuracy_score(flat_wanted, flat_told))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds that do not occur; they count 0
        if any(len(label) > 2 and label[1] == "-" for label in task.labels):
            values |= {
                "precision": float(metrics.precision_score(gold, found)),
                "recall": float(metrics.recall_score(gold, found)),
                "f1": float(metrics.f1_score(gold, found)),
                "by_label": _plain(metrics.classification_report(gold, found, output_dict=True)),
            }
        values["by_tag"] = _by_label(
            task,
            classification_report(
                flat_wanted,
                flat_told,
                labels=list(range(len(names))),
                target_names=list(task.labels),
                output_dict=True,
                zero_division=0,
            ),
        )
    return values


def question_answering(task: TaskSection, wanted: np.ndarray, told: np.ndarray) -> dict[str, Any]:
    """Return exact match and F1 of token spans.

    Args:
        task: of the run.
        wanted: (N, 3) [window, first token, last token] of the answer of each question; window -1: no answer.
        told: (N, 3) the same as found.
    """
    exact = (wanted == told).all(1)
    same = (wanted[:, 0] == told[:, 0]) & (wanted[:, 0] >= 0)
    overlap = np.minimum(wanted[:, 2], told[:, 2]) - np.maximum(wanted[:, 1], told[:, 1]) + 1
    overlap = np.where(same, np.maximum(overlap, 0), 0)
    sizes = (wanted[:, 2] - wanted[:, 1] + 1) + (told[:, 2] - told[:, 1] + 1)
    f1 = np.where(exact, 1.0, np.where(same, 2 * overlap / np.maximum(sizes, 1), 0.0))
    return {"exact_match": float(exact.mean()), "f1": float(f1.mean())}


def embedding(task: TaskSection, first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Return how well vectors `first` (N, H) find theirs among all `second` (N, H): recall@k, MRR, NDCG@10."""
    first, second = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (first, second))
    own = (first * second).sum(1)[:, None] - TIE
    # what is not clearly farther counts as nearer: vectors that are all alike, or no numbers, find nothing
    places = np.concatenate(
        [
            (~(first[start : start + ROWS] @ second.T < own[start : start + ROWS])).sum(1)
            for start in range(0, len(first), ROWS)
        ]
    )
    values = {f"recall@{k}": float((places <= k).mean()) for k in RECALLS if k <= len(places)}
    gains = np.where(places <= 10, 1 / np.log2(places + 1), 0.0)
    return {**values, "mrr": float((1 / places).mean()), "ndcg@10": float(gains.mean())}


def counted_tokens(task: TaskSection, wanted: np.ndarray, told: np.ndarray) -> dict[str, Any]:
    """Return the share of tokens told rightly, of [right, all] of each sample (N, 2)."""
    right, every = wanted.sum(0)
    return {"accuracy": float(right / max(1, every))}


SCORES: dict[str, Callable[[TaskSection, Any, Any], dict[str, Any]]] = {
    "sequence_classification": sequence_classification,
    "multi_label": multi_label,
    "regression": regression,
    "token_classification": token_classification,
    "question_answering": question_answering,
    "embedding": embedding,
    "masked_lm": counted_tokens,
    "seq2seq": counted_tokens,
}
"""The metrics of each task with a head."""


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error (Guo et al., arXiv:1706.04599) over 15 bins of confidence (N,)."""
    bins = np.minimum((np.nan_to_num(confidence) * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    gap = np.bincount(bins, confidence, BINS) - np.bincount(bins, right.astype(float), BINS)
    return float(np.abs(gap).sum() / max(1, count.sum()))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the shares of logits (N, K)."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _by_label(task: TaskSection, report: dict[str, Any]) -> dict[str, dict[str, float]]:
    return _plain({label: report[label] for label in task.labels if label in report})


def _plain(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return a report with plain numbers."""
    return {
        label: {name: float(value) for name, value in row.items()} for label, row in report.items()
    }
