"""Rows to tokens with one label each, for every task; truncation, windows, bits and sub-words."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tasks
from unit.data.data_helpers import data_section

from dist_ft.config.schema import TaskSection
from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.blocks.segments import measure_block, split_into_segments
from dist_ft.data.blocks.token_cache import compute_fingerprint, read_block, write_block
from dist_ft.data.encoding import answer_spans
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.encoding.make_encoder import (
    make_encoder,
)
from dist_ft.data.encoding.task_encoder import (
    TaskEncoder,
)

TOKENIZER = tiny_tasks.make_tokenizer()
CLS, SEP = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id


def build_encoder(
    name: str, length: int = 40, tokenizer=TOKENIZER, data=None, **values
) -> TaskEncoder:
    encoder = make_encoder(
        tokenizer,
        data_section(**(data or {})),
        TaskSection.model_validate({"name": name, **values}),
        length,
    )
    assert isinstance(encoder, TaskEncoder)
    return encoder


def samples(encoder: TaskEncoder, *rows) -> list[tuple[list[int], list[int]]]:
    """Return (ids, labels) of rows."""
    found = encoder.encode(list(rows), "x.jsonl")
    return [
        (found.tokens[a:b].tolist(), found.targets[a:b].tolist())
        for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)
    ]


def ids(text: str, **options) -> list[int]:
    return TOKENIZER(text, **options)["input_ids"]


def test_label_is_on_the_first_token():
    ((found, labels),) = samples(
        build_encoder("sequence_classification", labels=["a", "b"]),
        {"text": "the quick fox", "label": "b"},
    )
    assert found == ids("the quick fox") and found[0] == CLS and found[-1] == SEP
    assert labels == [1] + [IGNORE_INDEX] * (len(found) - 1)


def test_pair_has_the_special_tokens_of_the_tokenizer():
    encoder = build_encoder("sequence_classification", labels=["a", "b"], columns={"pair": "other"})
    ((found, _),) = samples(encoder, {"text": "the fox", "other": "old stones", "label": "a"})
    assert found == TOKENIZER("the fox", "old stones")["input_ids"] and found.count(SEP) == 2


def test_label_sets_are_stored_as_bits():
    names = [f"l{i:02}" for i in range(65)]
    encoder = build_encoder("multi_label", labels=names)
    (_, labels), (_, none) = samples(
        encoder,
        {"text": "the quick fox", "label": ["l00", "l29", "l30", "l64"]},
        {"text": "the quick fox", "label": []},
    )
    assert (
        labels[:3] == [1 | 1 << 29, 1, 1 << 4]
        and none[:3] == [0, 0, 0]
        and set(labels[3:]) == {IGNORE_INDEX}
    )
    assert encoder.describe_targets(np.array(labels, np.int32)) == "l00, l29, l30, l64"
    many = build_encoder("multi_label", labels=[f"l{i}" for i in range(200)])
    with pytest.raises(DataError, match=r"has 3 tokens. 200 labels need 7"):
        samples(many, {"text": "the", "label": ["l1"]})


def test_tag_is_on_the_first_token_of_its_word():
    encoder = build_encoder("token_classification", labels=["O", "B-X"])
    ((found, labels),) = samples(
        encoder, {"tokens": ["the", "foxbread", "runs"], "tags": ["O", "B-X", "O"]}
    )
    words = TOKENIZER(["the", "foxbread", "runs"], is_split_into_words=True).word_ids()
    assert max(words.count(word) for word in (0, 1, 2)) > 1, "a word of several tokens"
    assert [label for label in labels if label != IGNORE_INDEX] == [0, 1, 0]
    assert labels[words.index(1)] == 1 and len(found) == len(words)
    assert encoder.describe_targets(np.array(labels, np.int32)) == "O B-X O"


def test_byte_level_words_get_a_leading_space(tokenizer):
    encoder = build_encoder("token_classification", tokenizer=tokenizer, labels=["O", "B-X"])
    ((found, labels),) = samples(
        encoder, {"tokens": ["the", "quick", "fox"], "tags": ["O", "B-X", "O"]}
    )
    assert tokenizer.decode(found) == "the quick fox"
    assert [label for label in labels if label != IGNORE_INDEX] == [0, 1, 0]


def test_long_context_becomes_windows_that_share_a_stride():
    encoder = build_encoder("question_answering", length=12, stride=3)
    context = "the quick brown fox jumps over the lazy dogs while seven wise owls watch rivers"
    start = context.index("owls")
    row = {
        "question": "who",
        "context": context,
        "answers": {"text": ["owls"], "answer_start": [start]},
    }
    ((found, labels),) = samples(
        encoder,
        row,
    )
    windows = [found[i : i + 12] for i in range(0, len(found), 12)]
    assert len(windows) > 1 and all(len(window) == 12 for window in windows[:-1])
    for window, own in zip(
        windows, [labels[i : i + 12] for i in range(0, len(labels), 12)], strict=True
    ):
        ((at, (last, context_start, tail)),) = [
            (i, answer_spans.unpack(label)) for i, label in enumerate(own) if label != IGNORE_INDEX
        ]
        assert window[0] == CLS
        assert (at, last) == (0, 0) or TOKENIZER.decode(window[at : last + 1]) == "owls"
        assert context_start == len(TOKENIZER("who")["input_ids"]) and tail == 1
    assert any(label != IGNORE_INDEX and answer_spans.unpack(label).last for label in labels)


def test_windows_are_the_segments_of_a_row(tmp_path):
    encoder = build_encoder(
        "question_answering", length=12, stride=3, data={"overlong": "split", "pack": False}
    )
    context = " ".join(["the quick brown fox"] * 6)
    encoded = encoder.encode(
        [{"question": "who", "context": context, "answers": {"text": [], "answer_start": []}}], "x"
    )
    write_block(tmp_path / "b.safetensors", encoded)
    block = read_block(tmp_path / "b.safetensors")
    assert block.is_labeled and block.targets.dtype == np.int32
    segments, targets = split_into_segments(block, 12, "split")
    assert len(segments) > 1 and set(targets.tolist()) == {1}, (
        "each window has one label, on its first token too"
    )
    found = measure_block(block, encoder.data, 12)
    assert found.num_targets == found.num_segments and found.format == "question_answering"


def test_masked_lm_labels_all_but_special_tokens():
    ((found, labels),) = samples(build_encoder("masked_lm"), {"text": "the fox"})
    assert labels == [IGNORE_INDEX, *found[1:-1], IGNORE_INDEX]


def test_masked_lm_needs_a_mask_token(tokenizer):
    with pytest.raises(ModelError, match=r"task\.name=masked_lm: the tokenizer has no mask token"):
        samples(build_encoder("masked_lm", tokenizer=tokenizer), {"text": "the"})


def test_source_and_target_are_one_sequence():
    ((found, labels),) = samples(
        build_encoder("seq2seq"), {"source": "the fox", "target": "old owls"}
    )
    source, target = ids("the fox"), ids("old owls")
    assert found == source + target and labels == [IGNORE_INDEX] * len(source) + target


def test_long_source_is_truncated_before_its_target():
    encoder = build_encoder("seq2seq", length=16, data={"overlong": "truncate"})
    ((found, labels),) = samples(
        encoder, {"source": "the quick brown fox " * 6, "target": "old owls"}
    )
    target = ids("old owls")
    assert len(found) == 16 and found[-len(target) :] == target and found[15 - len(target)] == SEP
    ((found, labels),) = samples(encoder, {"source": "the", "target": "the quick brown fox " * 6})
    assert len(found) <= 16 and found[-1] == SEP and labels[0] == IGNORE_INDEX


def test_label_marks_where_the_second_text_starts():
    ((found, labels),) = samples(
        build_encoder("embedding"), {"text": "the fox", "positive": "old owls"}
    )
    assert found == ids("the fox") + ids("old owls")
    assert [i for i, label in enumerate(labels) if label != IGNORE_INDEX] == [len(ids("the fox"))]


def test_truncation_keeps_the_last_special_token():
    encoder = build_encoder(
        "sequence_classification", length=8, labels=["a", "b"], data={"overlong": "truncate"}
    )
    ((found, _),) = samples(encoder, {"text": "the quick brown fox " * 6, "label": "a"})
    assert len(found) == 8 and found[-1] == SEP


def test_bad_rows_are_skipped_if_allowed():
    rows = [
        {"text": "the fox", "label": "a"},
        {"text": "the fox", "label": "c"},
        DataError("x row 3: broken"),
        {"text": "owls", "label": "b"},
    ]
    encoder = build_encoder("sequence_classification", labels=["a", "b"], data={"bad_rows": "skip"})
    found = encoder.encode(rows, "x")
    assert np.diff(found.offsets).tolist()[1:3] == [0, 0] and len(found.bad_rows) == 2
    assert found.rows_per_range == (4,) and found.format == "sequence_classification"
    with pytest.raises(DataError, match="x row 2: label is 'c'"):
        build_encoder("sequence_classification", labels=["a", "b"]).encode(rows, "x")


def test_fields_that_decide_tokens_decide_the_fingerprint():
    base = compute_fingerprint(build_encoder("sequence_classification", labels=["a", "b"]))
    assert base != compute_fingerprint(Encoder(TOKENIZER, data_section()))
    assert base == compute_fingerprint(
        build_encoder("sequence_classification", labels=["a", "b"], focal_gamma=2.0)
    )
    others = [
        build_encoder("sequence_classification", labels=["b", "a"]),
        build_encoder("sequence_classification", 41, labels=["a", "b"]),
        build_encoder("multi_label", labels=["a", "b"]),
        build_encoder("sequence_classification", labels=["a", "b"], columns={"text": "t"}),
    ]
    assert base not in {compute_fingerprint(other) for other in others}


def test_question_that_leaves_no_room_is_refused():
    row = {
        "question": "the quick brown fox " * 5,
        "context": "the fox",
        "answers": {"text": [], "answer_start": []},
    }
    with pytest.raises(
        DataError,
        match=r"row 1: its question leaves no room for its context in batch\.sequence_length=12",
    ):
        samples(build_encoder("question_answering", length=12, stride=3), row)


def test_only_byte_level_words_get_a_leading_space(tokenizer):
    from dist_ft.tasks.token_classification import add_leading_spaces

    words = [["the", "fox"], ["tea"]]
    assert add_leading_spaces(words, tokenizer.backend_tokenizer.to_str()) == [
        ["the", " fox"],
        ["tea"],
    ]
    assert add_leading_spaces(words, TOKENIZER.backend_tokenizer.to_str()) == words
