"""Preview: it marks what the loss counts, and its statistics are correct."""

import numpy as np
import pytest
from unit.data.data_helpers import chat, shared_tokenizer

from dist_ft.data.tools.preview import _num_positions, compute_statistics, mark_targets, preview

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5)) for i in range(30)]


def test_preview_marks_the_answer(make_loader):
    text = preview(make_loader([chat("hello", "the fox", system="be [quick]")]), num_samples=3)
    head, *body = text.split("\n\n")[0].split("\n", 1)
    assert head.startswith("sample 0 (") and head.endswith(
        "train-00000-of-00001.jsonl row 1): 26 tokens, 3 of them targets"
    )
    assert body == [
        "<|im_start|>system\nbe [quick]<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n[[the fox<|im_end|>]]"
    ]
    assert "samples        1\n" in text and "steps          1 per epoch" in text


def test_rich_markup_survives_brackets(make_loader):
    from rich.text import Text

    text = preview(make_loader([chat("[red]x[/red]", "a [b]")]), markup=True)
    shown = Text.from_markup(text)
    assert "[red]x[/red]" in shown.plain and "a [b]<|im_end|>" in shown.plain
    assert [shown.plain[span.start : span.end] for span in shown.spans] == ["a [b]<|im_end|>"]


def lengths_of(loader):
    return np.concatenate(
        [np.diff(loader.store.block(i).offsets) for i in range(len(loader.index.blocks))]
    )


def test_statistics_of_packed_data(make_loader):
    loader = make_loader(ROWS)
    numbers, lengths = compute_statistics(loader), lengths_of(loader)
    assert (numbers.num_samples, numbers.num_left_out, numbers.num_bad) == (30, 0, 0)
    assert (numbers.min_tokens, numbers.max_tokens) == (lengths.min(), lengths.max())
    assert numbers.target_share == pytest.approx(loader.index.total("num_targets") / lengths.sum())
    assert numbers.fill == pytest.approx(lengths.sum() / (numbers.num_sequences * 128))
    assert numbers.num_steps == -(-numbers.num_sequences // 4)
    assert "packed, " in preview(loader, 0) and "[[" not in preview(loader, 0)


def test_padding_share_of_unpacked_data(make_loader):
    loader = make_loader(ROWS, pack=False, shuffle=False)
    rows = lengths_of(loader).reshape(-1, 2)
    expected = 1 - rows.sum() / (2 * rows.max(axis=1)).sum()
    assert compute_statistics(loader).padding_share == pytest.approx(expected)
    assert "of the positions are padding" in preview(loader, 0)
    assert _num_positions(np.array([3, 5, 2, 4, 9]), 4, 2) == 2 * 5 + 2 * 4 + 9


def test_blanks_of_sentencepiece_tokens_are_shown():
    tokenizer = shared_tokenizer("stories260k")
    tokens = np.array(tokenizer("Once upon a time", add_special_tokens=False)["input_ids"])
    is_target = np.arange(len(tokens)) >= len(tokens) // 2
    assert (
        mark_targets(tokenizer, tokens, is_target).replace("[[", "").replace("]]", "")
        == "Once upon a time"
    )
