"""The preview: marks what the loss counts, and its numbers are right."""

import numpy as np
import pytest
from unit.data.data_helpers import batch_section, chat, shared_tokenizer

from dist_ft.data.index import build
from dist_ft.data.plan import Plan
from dist_ft.data.preview import _positions, mark, preview, statistics
from dist_ft.world import Collectives, World

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5)) for i in range(30)]


def open_data(make, rows=ROWS, **values):
    shards, cache = make(rows, **values)
    batch = batch_section(sequence_length=128)
    index = build(shards, cache, cache.encoder.data, 128, World(), Collectives())
    return index, cache, Plan(index, cache.encoder.data, batch, 0)


def test_golden_preview(make):
    text = preview(*open_data(make, [chat("hello", "the fox", system="be [quick]")]), num_samples=3)
    head, *body = text.split("\n\n")[0].split("\n", 1)
    assert head.startswith("sample 0 (") and head.endswith("train-00000-of-00001.jsonl row 1): 26 tokens, 3 learned")
    assert body == ["<|im_start|>system\nbe [quick]<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
                    "<|im_start|>assistant\n[[the fox<|im_end|>]]"]
    assert "samples    1\n" in text and "steps      1 an epoch" in text


def test_rich_markup_survives_brackets(make):
    from rich.text import Text

    text = preview(*open_data(make, [chat("[red]x[/red]", "a [b]")]), rich=True)
    shown = Text.from_markup(text)
    assert "[red]x[/red]" in shown.plain and "a [b]<|im_end|>" in shown.plain
    assert [shown.plain[span.start:span.end] for span in shown.spans] == ["a [b]<|im_end|>"]


def test_statistics(make):
    index, cache, plan = open_data(make)
    numbers = statistics(index, plan)
    assert (numbers.num_samples, numbers.num_left_out) == (30, 0)
    assert (numbers.min_tokens, numbers.max_tokens) == (index.lengths.min(), index.lengths.max())
    assert numbers.learned_share == pytest.approx(index.target_counts.sum() / index.lengths.sum())
    assert numbers.fill == pytest.approx(index.lengths.sum() / (numbers.num_sequences * 128))
    assert numbers.num_steps == -(-numbers.num_sequences // 4)
    assert "packed, " in preview(index, cache, plan, 0) and "[[" not in preview(index, cache, plan, 0)


def test_padding_share(make):
    index, cache, plan = open_data(make, pack=False, shuffle=False)
    rows = index.lengths.reshape(-1, 2)
    expected = 1 - index.lengths.sum() / (2 * rows.max(axis=1)).sum()
    assert statistics(index, plan).padding_share == pytest.approx(expected)
    assert "of the positions are padding" in preview(index, cache, plan, 0)
    assert _positions(np.array([3, 5, 2, 4, 9]), 4, 2) == 2 * 5 + 2 * 4 + 9


def test_sentencepiece_keeps_its_blanks():
    tokenizer = shared_tokenizer("stories260k")
    tokens = np.array(tokenizer("Once upon a time", add_special_tokens=False)["input_ids"])
    learned = np.arange(len(tokens)) >= len(tokens) // 2
    assert mark(tokenizer, tokens, learned).replace("[[", "").replace("]]", "") == "Once upon a time"
