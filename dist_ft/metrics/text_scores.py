"""How good texts are beside their references: pure, and the same at every world size.

BLEU and chrF are sacrebleu's, of the corpus; ROUGE is rouge-score's (without stemming); the others are shares of
samples, but for token_error_rate, which is one of tokens. Does not know models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ROUGES = ("rouge1", "rouge2", "rougeL")
SPLITTING = ("zh", "char")
"""Tokenizers of sacrebleu for what is written without blanks."""


def scores(
    metrics: Sequence[str], texts: Sequence[str], references: Sequence[str], tokenizer: str = "13a"
) -> dict[str, float]:
    """Return the value of each of `metrics` (config.decoding.TEXT_METRICS) of `texts`, one for each of `references`."""
    if not texts:
        return {}
    words = words_by(tokenizer)
    pairs = list(zip(texts, references, strict=True))
    found: dict[str, float] = {}
    for metric in metrics:
        if metric in ("bleu", "chrf"):
            found[metric] = _corpus(metric, texts, references, tokenizer)
        elif metric == "token_error_rate":
            edits = sum(distance(words(text), words(reference)) for text, reference in pairs)
            found[metric] = edits / max(1, sum(len(words(reference)) for reference in references))
        else:
            found[metric] = float(
                np.mean([score(metric, text, reference, tokenizer) for text, reference in pairs])
            )
    return found


def score(metric: str, text: str, reference: str, tokenizer: str = "13a") -> float:
    """Return a metric of one text: of bleu and chrf those of a sentence, 0 to 100; token_error_rate may exceed 1."""
    words = words_by(tokenizer)
    if metric == "bleu":
        import sacrebleu

        return float(sacrebleu.sentence_bleu(text, [reference], tokenize=tokenizer).score)
    if metric == "chrf":
        import sacrebleu

        return float(sacrebleu.sentence_chrf(text, [reference]).score)
    if metric in ROUGES:
        return float(_rouge(tokenizer).score(reference, text)[metric].fmeasure)
    if metric == "exact_match":
        return float(text.split() == reference.split())
    if metric == "token_f1":
        return overlap(words(text), words(reference))
    if metric == "token_error_rate":
        return distance(words(text), words(reference)) / max(1, len(words(reference)))
    number = last_number(reference)
    return float(number is not None and last_number(text) == number)


def words_by(tokenizer: str) -> Callable[[str], list[str]]:
    """Return what cuts a text into tokens: at blanks, or for zh and char as sacrebleu does."""
    if tokenizer not in SPLITTING:
        return str.split
    splitter = _splitter(tokenizer)
    return lambda text: splitter(text).split()


def distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the fewest insertions, deletions and replacements that make one list of tokens the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, token in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (token != other))
    return row[-1]


def overlap(first: Sequence[str], second: Sequence[str]) -> float:
    """Return F1 of the tokens two lists have in common, each as often as it stands in both; 1 of two empty ones."""
    if not first or not second:
        return float(not first and not second)
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / (len(first) + len(second))


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text ("#### 1,042" gives 1042), None without any."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _corpus(metric: str, texts: Sequence[str], references: Sequence[str], tokenizer: str) -> float:
    import sacrebleu

    if metric == "chrf":
        return float(sacrebleu.corpus_chrf(texts, [references]).score)
    return float(sacrebleu.corpus_bleu(texts, [references], tokenize=tokenizer).score)


@cache
def _splitter(tokenizer: str) -> Callable[[str], str]:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenizer).tokenizer


class _Words:
    """A tokenizer as rouge-score wants one."""

    def __init__(self, tokenizer: str) -> None:
        self.tokenize = words_by(tokenizer)


@cache
def _rouge(tokenizer: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(
        list(ROUGES),
        use_stemmer=False,
        tokenizer=_Words(tokenizer) if tokenizer in SPLITTING else None,
    )
