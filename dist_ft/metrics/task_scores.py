"""The metrics of each task from predictions. Pure, and the same at every world size.

Values are those of scikit-learn, scipy and seqeval. A metric that is not defined for the data (no
spread) is NaN.

Dimensions: N samples, K labels, T words of a sample, H size of a vector, C vectors compared at
once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RECALL_CUTOFFS = (1, 5, 10)
ROWS_PER_CHUNK = 1024
"""Vectors compared at once."""
COSINE_TOLERANCE = 1e-6
"""Cosines that differ by less count as equal."""
NUM_BINS = 15

LabelTable = dict[str, dict[str, float]]
"""{label or tag: {precision, recall, f1-score, support}}"""


@dataclass(frozen=True)
class TaskScores:
    """The metrics of a task.

    Attributes:
        values: numbers by the name of the metric.
        tables: `by_label`, `by_tag`, and `confusion`, the confusion matrix (K, K): rows are labels,
            columns predictions.
    """

    values: dict[str, float]
    tables: dict[str, LabelTable | list[list[int]]] = field(default_factory=dict)


def sequence_classification(
    names: Sequence[str], labels: np.ndarray, logits: np.ndarray
) -> TaskScores:
    """Return the metrics of `logits` (N, K) for `labels` (N,)."""
    from sklearn import metrics

    predicted = logits.argmax(1)  # (N,)
    probabilities = softmax(logits)  # (N, K)

    # All labels are passed: scikit-learn would leave out those that do not occur in this data, and
    # tables of two evaluations would have different rows.
    label_ids = list(range(len(names)))
    report = metrics.classification_report(
        labels,
        predicted,
        labels=label_ids,
        target_names=list(names),
        output_dict=True,
        zero_division=0,
    )

    # Unlike the tables, the averages are over labels that occur or are predicted.
    def f1(average: str) -> float:
        return float(metrics.f1_score(labels, predicted, average=average, zero_division=0))

    return TaskScores(
        {
            "accuracy": float(metrics.accuracy_score(labels, predicted)),
            "f1_macro": f1("macro"),
            "f1_weighted": f1("weighted"),
            "mcc": float(metrics.matthews_corrcoef(labels, predicted)),
            "calibration_error": calibration_error(probabilities.max(1), predicted == labels),
        },
        {
            "by_label": _select_labels(names, report),
            "confusion": metrics.confusion_matrix(labels, predicted, labels=label_ids).tolist(),
        },
    )


def multi_label(names: Sequence[str], labels: np.ndarray, logits: np.ndarray) -> TaskScores:
    """Return the metrics of `logits` (N, K) for `labels` (N, K) of 0 or 1.

    A logit above 0 predicts the label.
    """
    from sklearn import metrics

    # Each label has a probability of its own: a logit above 0 is one of more than 0.5.
    predicted = (logits > 0).astype(int)  # (N, K)
    report = metrics.classification_report(
        labels, predicted, target_names=list(names), output_dict=True, zero_division=0
    )

    def f1(average: str) -> float:
        return float(metrics.f1_score(labels, predicted, average=average, zero_division=0))

    return TaskScores(
        {
            # a row is right only if its whole label set is
            "accuracy": float((predicted == labels).all(1).mean()),
            "f1_micro": f1("micro"),
            "f1_macro": f1("macro"),
        },
        {"by_label": _select_labels(names, report)},
    )


def regression(targets: np.ndarray, predicted: np.ndarray) -> TaskScores:
    """Return the metrics of `predicted` (N,) for `targets` (N,)."""
    from scipy import stats

    values = {
        "mse": float(((predicted - targets) ** 2).mean()),
        "mae": float(np.abs(predicted - targets).mean()),
        "pearson": math.nan,
        "spearman": math.nan,
    }
    # scipy raises an error for a correlation of a single pair.
    if len(targets) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of data without spread, whose correlations are NaN
            values["pearson"] = float(stats.pearsonr(targets, predicted)[0])
            values["spearman"] = float(stats.spearmanr(targets, predicted)[0])

    return TaskScores(values)


def token_classification(
    names: Sequence[str], expected: Sequence[np.ndarray], predicted: Sequence[np.ndarray]
) -> TaskScores:
    """Return the metrics of entities (seqeval) and of single tags.

    Args:
        names: the tags.
        expected: tag numbers (T,) of the words of each sample.
        predicted: the same, as predicted.
    """
    from seqeval import metrics
    from sklearn.metrics import accuracy_score, classification_report

    # seqeval takes tags as text, row by row, because an entity ends with its row; the accuracy of
    # single tags needs no rows.
    name_of = np.array(names, dtype=object)
    expected_names = [name_of[tags].tolist() for tags in expected]
    predicted_names = [name_of[tags].tolist() for tags in predicted]
    flat_expected = np.concatenate(expected)
    flat_predicted = np.concatenate(predicted)

    values = {"accuracy": float(accuracy_score(flat_expected, flat_predicted))}
    tables: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types that do not occur; they count 0

        # Plain tags, such as parts of speech, mark no entities.
        if any(_is_entity_tag(label) for label in names):
            pair = (expected_names, predicted_names)
            values["precision"] = float(metrics.precision_score(*pair))
            values["recall"] = float(metrics.recall_score(*pair))
            values["f1"] = float(metrics.f1_score(*pair))
            tables["by_label"] = _plain_numbers(
                metrics.classification_report(*pair, output_dict=True)
            )

        tag_report = classification_report(
            flat_expected,
            flat_predicted,
            labels=list(range(len(names))),
            target_names=list(names),
            output_dict=True,
            zero_division=0,
        )

    tables["by_tag"] = _select_labels(names, tag_report)
    return TaskScores(values, tables)


def _is_entity_tag(label: str) -> bool:
    """Return whether a label is like B-PER, the start or the inside of an entity."""
    return len(label) > 2 and label[1] == "-"


def question_answering(expected: np.ndarray, predicted: np.ndarray) -> TaskScores:
    """Return exact match and F1 of token spans.

    Args:
        expected: (N, 3) [window, first token, last token] of the answer of each question; window
            -1: no answer.
        predicted: (N, 3) the same, as predicted.
    """
    # All arrays are (N,). Positions of different windows cannot be compared, and window -1 (no
    # answer) has none.
    is_exact = (expected == predicted).all(1)
    same_window = (expected[:, 0] == predicted[:, 0]) & (expected[:, 0] >= 0)

    # Both ends of a span are part of it, hence + 1.
    first = np.maximum(expected[:, 1], predicted[:, 1])
    last = np.minimum(expected[:, 2], predicted[:, 2])
    overlap = np.where(same_window, np.maximum(last - first + 1, 0), 0)

    # F1 of two spans is twice the overlap over the sum of their sizes.
    expected_sizes = expected[:, 2] - expected[:, 1] + 1
    predicted_sizes = predicted[:, 2] - predicted[:, 1] + 1
    sizes = expected_sizes + predicted_sizes
    partial_f1 = np.where(same_window, 2 * overlap / np.maximum(sizes, 1), 0.0)

    # "No answer" predicted for "no answer" is exact, although nothing overlaps.
    f1 = np.where(is_exact, 1.0, partial_f1)
    return TaskScores({"exact_match": float(is_exact.mean()), "f1": float(f1.mean())})


def embedding(first: np.ndarray, second: np.ndarray) -> TaskScores:
    """Return how well vectors `first` (N, H) retrieve their own partner among all `second` (N, H).

    The metrics are recall@k, the mean reciprocal rank (mrr) and NDCG@10.
    """
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    own_cosine = (first * second).sum(1)[:, None] - COSINE_TOLERANCE  # (N, 1)

    # In chunks, because all cosines at once would be an (N, N) matrix.
    rank_chunks = []
    for start in range(0, len(first), ROWS_PER_CHUNK):
        chunk = slice(start, start + ROWS_PER_CHUNK)
        cosines = first[chunk] @ second.T  # (C, N)

        # A vector that is not clearly farther counts as nearer, so that equal vectors, or NaN,
        # retrieve nothing. The own partner always counts: ranks start at 1.
        is_nearer = ~(cosines < own_cosine[chunk])
        rank_chunks.append(is_nearer.sum(1))

    ranks = np.concatenate(rank_chunks)  # (N,)
    values = {}
    for cutoff in RECALL_CUTOFFS:
        # A cutoff above N would include every vector.
        if cutoff <= len(ranks):
            values[f"recall@{cutoff}"] = float((ranks <= cutoff).mean())

    # One vector of `second` is relevant, so that its gain is the NDCG.
    gains = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)
    values["mrr"] = float((1 / ranks).mean())
    values["ndcg@10"] = float(gains.mean())
    return TaskScores(values)


def token_accuracy(counts: np.ndarray) -> TaskScores:
    """Return the share of correct tokens, from `counts` (N, 2): [correct, all] of each sample."""
    num_correct, num_tokens = counts.sum(0)
    return TaskScores({"accuracy": float(num_correct / max(1, num_tokens))})


def calibration_error(confidence: np.ndarray, is_correct: np.ndarray) -> float:
    """Return the expected calibration error over 15 bins of `confidence` (N,).

    Source: Guo et al., arXiv:1706.04599.
    """
    # A confidence of 1 belongs to the last bin. NaN needs some bin, too: it makes that bin's sum,
    # and so the error, NaN.
    bins = (np.nan_to_num(confidence) * NUM_BINS).astype(int)  # (N,)
    bins = np.minimum(bins, NUM_BINS - 1)

    # Sums over the samples of a bin instead of means: the weight of a bin, its count, cancels out.
    count = np.bincount(bins, minlength=NUM_BINS)
    confidence_sums = np.bincount(bins, confidence, NUM_BINS)
    correct_sums = np.bincount(bins, is_correct.astype(float), NUM_BINS)
    return float(np.abs(confidence_sums - correct_sums).sum() / max(1, count.sum()))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits (..., K)."""
    # Without its largest logit, a row has the same probabilities, and `exp` cannot overflow.
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _select_labels(names: Sequence[str], report: Mapping[str, Any]) -> LabelTable:
    """Return the rows of a report that belong to labels, without its averages."""
    return _plain_numbers({name: report[name] for name in names if name in report})


def _plain_numbers(report: Mapping[str, Any]) -> LabelTable:
    """Return a report with Python's own numbers, as JSON takes them."""
    table = {}
    for label, row in report.items():
        table[label] = {name: float(value) for name, value in row.items()}
    return table
