"""Metrics of generated text, against the libraries and cases worked out by hand."""

from __future__ import annotations

import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from dist_ft.config.sections.decoding import TEXT_METRICS
from dist_ft.metrics import text_scores

TEXTS = ["the quick brown fox jumps over the dog", "seven wise owls watch", "stars until morning"]
REFERENCES = [
    "the quick brown fox jumped over the lazy dog",
    "seven wise owls watch rivers run",
    "stars until morning",
]


def test_every_metric_is_computed_and_perfect_for_equal_text():
    values = text_scores.compute_text_metrics(
        TEXT_METRICS, ["the year 1,042 .", "9 of 10"], ["the year 1,042 .", "9 of 10"]
    )
    assert values == pytest.approx(
        {
            **dict.fromkeys(TEXT_METRICS, 1.0),
            "bleu": values["bleu"],
            "chrf": 100.0,
            "token_error_rate": 0.0,
        }
    )
    assert tuple(values) == TEXT_METRICS
    assert text_scores.compute_text_metrics(TEXT_METRICS, [], []) == {}


def test_bleu_chrf_and_rouge_equal_the_libraries():
    values = text_scores.compute_text_metrics(TEXT_METRICS, TEXTS, REFERENCES)
    assert values["bleu"] == sacrebleu.corpus_bleu(TEXTS, [REFERENCES]).score > 20
    assert values["chrf"] == sacrebleu.corpus_chrf(TEXTS, [REFERENCES]).score > 20
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for kind in ("rouge1", "rouge2", "rougeL"):
        each = [
            rouge.score(reference, text)[kind].fmeasure
            for text, reference in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert values[kind] == pytest.approx(sum(each) / 3) and 0.5 < values[kind] < 1
    assert (
        text_scores.compute_text_metric("bleu", TEXTS[0], REFERENCES[0])
        == sacrebleu.sentence_bleu(TEXTS[0], [REFERENCES[0]]).score
    )
    assert (
        text_scores.compute_text_metric("chrf", TEXTS[0], REFERENCES[0])
        == sacrebleu.sentence_chrf(TEXTS[0], [REFERENCES[0]]).score
    )


@pytest.mark.parametrize("tokenizer", ["zh", "char"])
def test_text_without_spaces_is_split_by_the_tokenizer(tokenizer):
    text, reference = "我喜欢红茶", "我喜欢绿茶"
    values = text_scores.compute_text_metrics(TEXT_METRICS, [text], [reference], tokenizer)
    assert values["token_error_rate"] == pytest.approx(1 / 5)
    assert values["token_f1"] == pytest.approx(4 / 5)
    assert values["rouge1"] == pytest.approx(4 / 5) and values["rouge2"] == pytest.approx(2 / 4)
    assert values["bleu"] == sacrebleu.corpus_bleu([text], [[reference]], tokenize=tokenizer).score
    whole = text_scores.compute_text_metrics(TEXT_METRICS, [text], [reference])
    assert (whole["token_error_rate"], whole["token_f1"], whole["rouge1"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("a b c", "a b c", 0),
        ("", "a b c", 1),
        ("a b c d", "a b c", 1 / 3),
        ("a c", "a b c", 1 / 3),
        ("x b c", "a b c", 1 / 3),
        ("c a b", "a b c", 2 / 3),
        ("x y z v w", "a b c", 5 / 3),
    ],
)
def test_token_error_rate_equals_hand_computed_values(text, reference, expected):
    assert text_scores.compute_text_metric("token_error_rate", text, reference) == pytest.approx(
        expected
    )


def test_token_error_rate_is_averaged_over_tokens_not_samples():
    assert text_scores.compute_text_metrics(
        ["token_error_rate"], ["x", "a b c d"], ["y", "a b c d"]
    ) == {"token_error_rate": 1 / 5}


def test_edit_distance_is_a_metric():
    rng = random.Random(0)
    lists = [rng.choices("abc", k=rng.randint(0, 6)) for _ in range(25)]
    for a, b, c in zip(lists, lists[1:], lists[2:], strict=False):
        assert text_scores.edit_distance(a, b) == text_scores.edit_distance(b, a)
        assert text_scores.edit_distance(a, c) <= text_scores.edit_distance(
            a, b
        ) + text_scores.edit_distance(b, c)
        assert abs(len(a) - len(b)) <= text_scores.edit_distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("so it is 42", "6 * 7\n#### 42", 1),
        ("#### 1,042", "1042", 1),
        ("42.0", "#### 42", 1),
        ("-3", "3", 0),
        ("12 then 5", "12", 0),
        ("", "#### 42", 0),
        ("no", "none", 0),
        ("$1,234.50.", "1234.5", 1),
    ],
)
def test_number_match_compares_the_last_numbers(text, reference, expected):
    assert text_scores.compute_text_metric("number_match", text, reference) == expected


@pytest.mark.parametrize(
    ("text", "reference", "exact", "f1"),
    [
        ("a  b", "a b", 1, 1),
        ("b a", "a b", 0, 1),
        ("a a b", "a b b", 0, 2 / 3),
        ("", "", 1, 1),
        ("", "a", 0, 0),
    ],
)
def test_exact_match_and_token_f1_equal_hand_computed_values(text, reference, exact, f1):
    assert text_scores.compute_text_metric("exact_match", text, reference) == exact
    assert text_scores.compute_text_metric("token_f1", text, reference) == pytest.approx(f1)
