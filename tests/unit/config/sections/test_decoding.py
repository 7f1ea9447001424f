"""The short form of a strategy."""

from __future__ import annotations

import pytest

from dist_ft.config.sections.decoding import DecodingSection, format_strategy, parse_strategy
from dist_ft.core.errors import ConfigError

BASE = DecodingSection(
    max_new_tokens=9,
    strategy="beam",
    num_beams=7,
    choices=("a", "b"),
    seed=4,
    repetition_penalty=1.2,
)


@pytest.mark.parametrize(
    "text",
    [
        "greedy",
        "beam:3",
        "sample:0.7",
        "beam:5,length_penalty=0.8,early_stopping=True",
        "sample:1,top_p=0.9,num_samples=2",
    ],
)
def test_a_formatted_strategy_is_parsed_back(text):
    assert format_strategy(parse_strategy(text)) == text


def test_what_belongs_to_no_strategy_is_kept():
    found = parse_strategy("sample:0.5,seed=5", BASE)
    assert found == DecodingSection(
        max_new_tokens=9,
        strategy="sample",
        temperature=0.5,
        choices=("a", "b"),
        seed=5,
        repetition_penalty=1.2,
    )
    assert parse_strategy("greedy", BASE, max_new_tokens=3).max_new_tokens == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beamm", "strategy: input should be 'greedy', 'beam' or 'sample'"),
        ("beam:x", "num_beams: input should be a valid integer"),
        ("beam:1", "num_beams: input should be greater than or equal to 2"),
        ("greedy:2", "greedy: extra inputs are not permitted"),
        ("sample:0.7,topp=0.9", "topp: extra inputs are not permitted"),
        ("sample,top_p", "top_p: input should be a valid number"),
        ("sample,num_sample=2", "num_sample: extra inputs"),
        ("sample:0.7,top_k=-1", "top_k: input"),
        ("sample:0.7,num_beams=3", "not used by strategy=sample"),
        ("", "strategy: input should be"),
        ("beam:4,strategy=greedy", "strategy=greedy: extra"),
        ("beam:4,rows=2", "rows: renamed to evaluation.decoding.batch_size in 0.2. Rename it."),
    ],
)
def test_an_invalid_strategy_is_refused_in_one_line(text, expected):
    with pytest.raises(ConfigError) as caught:
        parse_strategy(text)
    assert expected in str(caught.value) and str(caught.value).count("\n") == 1
