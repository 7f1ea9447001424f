"""Metrics of generated text against references: pure, and the same at every world size.

BLEU and chrF are sacrebleu's, over the corpus; ROUGE is rouge-score's (without stemming). The
others are shares of samples, except token_error_rate, which is a share of tokens. No model is
needed.
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
ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")
UNSPACED_TOKENIZERS = ("zh", "char")
"""Tokenizers of sacrebleu for languages written without spaces."""


def compute_text_metrics(
    metrics: Sequence[str], texts: Sequence[str], references: Sequence[str], tokenizer: str = "13a"
) -> dict[str, float]:
    """Return the value of each of `metrics` (config.decoding.TEXT_METRICS) over all texts.

    Empty without a text.

    Args:
        metrics: their names.
        texts: generated text, one for each reference.
        references: the expected text.
        tokenizer: tokenizer of sacrebleu.
    """
    if not texts:
        return {}

    split = get_word_splitter(tokenizer)
    pairs = list(zip(texts, references, strict=True))
    values: dict[str, float] = {}
    for metric in metrics:
        # BLEU and chrF count n-grams over all texts: they are not means over sentences.
        if metric in ("bleu", "chrf"):
            values[metric] = _corpus_score(metric, texts, references, tokenizer)

        # Edits of all texts over tokens of all references: a mean of rates would give a short
        # reference the weight of a long one.
        elif metric == "token_error_rate":
            num_edits = num_tokens = 0
            for text, reference in pairs:
                num_edits += edit_distance(split(text), split(reference))
                num_tokens += len(split(reference))
            values[metric] = num_edits / max(1, num_tokens)

        else:
            scores = []
            for text, reference in pairs:
                scores.append(compute_text_metric(metric, text, reference, tokenizer))
            values[metric] = float(np.mean(scores))

    return values


def compute_text_metric(metric: str, text: str, reference: str, tokenizer: str = "13a") -> float:
    """Return a metric of one text.

    bleu and chrf are those of a sentence, 0 to 100; token_error_rate may exceed 1; all others are 0
    to 1.
    """
    # Imported where they are used: a run without these metrics need not load the libraries.
    split = get_word_splitter(tokenizer)
    if metric == "bleu":
        import sacrebleu

        return float(sacrebleu.sentence_bleu(text, [reference], tokenize=tokenizer).score)

    if metric == "chrf":
        import sacrebleu

        return float(sacrebleu.sentence_chrf(text, [reference]).score)

    if metric in ROUGE_METRICS:
        return float(_rouge_scorer(tokenizer).score(reference, text)[metric].fmeasure)
    if metric == "exact_match":
        return float(text.split() == reference.split())
    if metric == "token_f1":
        return token_f1(split(text), split(reference))
    if metric == "token_error_rate":
        num_edits = edit_distance(split(text), split(reference))
        return num_edits / max(1, len(split(reference)))

    # number_match: the last number of the text is that of the reference
    number = last_number(reference)
    return float(number is not None and last_number(text) == number)


def get_word_splitter(tokenizer: str) -> Callable[[str], list[str]]:
    """Return a function that splits text: at whitespace, or for zh and char as sacrebleu does."""
    if tokenizer not in UNSPACED_TOKENIZERS:
        return str.split

    # sacrebleu puts spaces between the tokens of a line.
    tokenize = _sacrebleu_tokenizer(tokenizer)
    return lambda text: tokenize(text).split()


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the Levenshtein distance of two lists: insertions, deletions and replacements."""
    # One row of the table is kept. Before step i, row[j] is the distance between the first i - 1
    # tokens of `first` and the first j of `second`; after it, that of the first i tokens.
    row = list(range(len(second) + 1))
    for i, token in enumerate(first, 1):
        diagonal = row[0]  # row[j - 1] before this step
        row[0] = i
        for j, other in enumerate(second, 1):
            above = row[j]
            replaced = diagonal + (token != other)
            row[j] = min(above + 1, row[j - 1] + 1, replaced)
            diagonal = above

    return row[-1]


def token_f1(first: Sequence[str], second: Sequence[str]) -> float:
    """Return F1 of the tokens that two lists share; 1 if both are empty.

    A token counts as often as it occurs in both.
    """
    if not first or not second:
        return float(not first and not second)

    # The intersection of counters has the lower of the two counts.
    num_common = sum((Counter(first) & Counter(second)).values())
    return 2 * num_common / (len(first) + len(second))


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text ("#### 1,042" gives 1042); None without a number."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None

    # A decimal, so that 0.1 equals 0.10 and long numbers are compared digit by digit.
    return Decimal(numbers[-1].replace(",", ""))


def _corpus_score(
    metric: str, texts: Sequence[str], references: Sequence[str], tokenizer: str
) -> float:
    import sacrebleu

    if metric == "chrf":
        return float(sacrebleu.corpus_chrf(texts, [references]).score)
    return float(sacrebleu.corpus_bleu(texts, [references], tokenize=tokenizer).score)


@cache
def _sacrebleu_tokenizer(tokenizer: str) -> Callable[[str], str]:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenizer).tokenizer


class _RougeTokenizer:
    """A tokenizer with the interface that rouge-score requires."""

    def __init__(self, tokenizer: str) -> None:
        self.tokenize = get_word_splitter(tokenizer)


@cache
def _rouge_scorer(tokenizer: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    # rouge-score's own tokenizer keeps ASCII letters and digits only: of Chinese nothing is left.
    own_tokenizer = None
    if tokenizer in UNSPACED_TOKENIZERS:
        own_tokenizer = _RougeTokenizer(tokenizer)

    return RougeScorer(list(ROUGE_METRICS), use_stemmer=False, tokenizer=own_tokenizer)
