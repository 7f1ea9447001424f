"""The preview: marks what the loss counts, and its numbers are right."""

import numpy as np
import pytest
from unit.data.data_helpers import chat, shared_tokenizer

from dist_ft.data.tools.preview import _positions, mark, preview, statistics

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5)) for i in range(30)]


def test_golden_preview(make_loader):
    text = preview(make_loader([chat("hello", "the fox", system="be [quick]")]), num_samples=3)
    head, *body = text.split("\n\n")[0].split("\n", 1)
    assert head.startswith("sample 0 (") and head.endswith(
        "train-00000-of-00001.jsonl row 1): 26 tokens, 3 learned"
    )
    assert body == [
        "<|im_start|>system\nbe [quick]<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n[[the fox<|im_end|>]]"
    ]
    assert "samples    1\n" in text and "steps      1 an epoch" in text


def test_rich_markup_survives_brackets(make_loader):
    from rich.text import Text

    text = preview(make_loader([chat("[red]x[/red]", "a [b]")]), rich=True)
    shown = Text.from_markup(text)
    assert "[red]x[/red]" in shown.plain and "a [b]<|im_end|>" in shown.plain
    assert [shown.plain[span.start : span.end] for span in shown.spans] == ["a [b]<|im_end|>"]


def lengths_of(loader):
    return np.concatenate(
        [np.diff(loader.store.block(i).offsets) for i in range(len(loader.index.blocks))]
    )


def test_statistics(make_loader):
    loader = make_loader(ROWS)
    numbers, lengths = statistics(loader), lengths_of(loader)
    assert (numbers.num_samples, numbers.num_left_out, numbers.num_bad) == (30, 0, 0)
    assert (numbers.min_tokens, numbers.max_tokens) == (lengths.min(), lengths.max())
    assert numbers.learned_share == pytest.approx(loader.index.total("num_targets") / lengths.sum())
    assert numbers.fill == pytest.approx(lengths.sum() / (numbers.num_sequences * 128))
    assert numbers.num_steps == -(-numbers.num_sequences // 4)
    assert "packed, " in preview(loader, 0) and "[[" not in preview(loader, 0)


def test_padding_share(make_loader):
    loader = make_loader(ROWS, pack=False, shuffle=False)
    rows = lengths_of(loader).reshape(-1, 2)
    expected = 1 - rows.sum() / (2 * rows.max(axis=1)).sum()
    assert statistics(loader).padding_share == pytest.approx(expected)
    assert "of the positions are padding" in preview(loader, 0)
    assert _positions(np.array([3, 5, 2, 4, 9]), 4, 2) == 2 * 5 + 2 * 4 + 9


def test_sentencepiece_keeps_its_blanks():
    tokenizer = shared_tokenizer("stories260k")
    tokens = np.array(tokenizer("Once upon a time", add_special_tokens=False)["input_ids"])
    learned = np.arange(len(tokens)) >= len(tokens) // 2
    assert (
        mark(tokenizer, tokens, learned).replace("[[", "").replace("]]", "") == "Once upon a time"
    )
