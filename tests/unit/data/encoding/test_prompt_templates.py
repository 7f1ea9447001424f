"""Prompts: their text, which examples are drawn, and the tokens of a label."""

from __future__ import annotations

import itertools

import pytest
import tiny
from transformers import AutoTokenizer

from dist_ft.config.schema import DataSection, PromptingSection, TaskSection
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import prompt_templates
from dist_ft.data.encoding.fast_tokenizer import exact_backend
from dist_ft.data.encoding.prompt_encoder import PromptEncoder
from dist_ft.data.encoding.task_rows import Sample

TASK = TaskSection(name="sequence_classification", labels=("bread", "tea"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.make_model(tmp_path_factory.mktemp("prompts")))


def build_encoder(tokenizer, template="say {text} :", length=40, task=TASK, data=None, **fields):
    section = PromptingSection(method="likelihood", templates=(template,), **fields)
    return PromptEncoder(tokenizer, DataSection(train="x", **(data or {})), task, section, length)


def texts(tokenizer, encoded):
    return [
        tokenizer.decode(encoded.tokens[a:b])
        for a, b in itertools.pairwise(encoded.offsets.tolist())
    ]


def test_row_becomes_a_prompt_with_its_label_on_the_first_token(tokenizer):
    encoded = build_encoder(tokenizer).encode(
        [{"text": "the fox", "label": "tea"}, {"text": "old {stones}", "label": "bread"}], "u"
    )
    assert texts(tokenizer, encoded) == ["say the fox :", "say old {stones} :"]
    firsts = encoded.offsets[:-1]
    assert encoded.targets[firsts].tolist() == [1, 0]
    assert (encoded.targets != IGNORE_INDEX).sum() == 2


def test_pair_is_filled_into_the_template(tokenizer):
    task = TASK.model_copy(update={"columns": TASK.columns.model_copy(update={"pair": "other"})})
    encoded = build_encoder(tokenizer, "{text} and {pair} :", task=task).encode(
        [{"text": "tea", "other": "news", "label": "tea"}], "u"
    )
    assert texts(tokenizer, encoded) == ["tea and news :"]


def test_label_words_have_the_tokens_they_have_after_the_prompt(tokenizer):
    words = build_encoder(
        tokenizer, verbalizers={"bread": " seven wise owls", "tea": " tea"}
    ).label_words()
    whole = tokenizer("say x : seven wise owls")["input_ids"]
    assert tuple(whole[-len(words.ids[0]) :]) == words.ids[0]
    assert tokenizer.decode(words.ids[0]) == " seven wise owls" and words.longest == len(
        words.ids[0]
    )


def test_label_name_is_its_words_by_default():
    assert prompt_templates.verbalize("lost_card", PromptingSection()) == " lost card"
    assert prompt_templates.verbalize("1", PromptingSection(verbalizers={"1": " good"})) == " good"


@pytest.mark.parametrize("words", ["ea", "ea and news of tea", ""])
def test_words_that_merge_with_the_prompt_are_refused(tokenizer, words):
    with pytest.raises(
        ConfigError,
        match=f"prompting\\.verbalizers='{words}': has no token of its own after the template's end ' t'",
    ):
        prompt_templates.tokenize_label(exact_backend(tokenizer), "{text} t", words)


def test_labels_with_the_same_tokens_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="tea has the tokens of another label"):
        build_encoder(tokenizer, verbalizers={"bread": " tea", "tea": " tea"}).label_words()


def test_long_text_is_truncated_and_the_prompt_stays(tokenizer):
    encoder = build_encoder(tokenizer, length=16, data={"overlong": "truncate"})
    (text,) = texts(tokenizer, encoder.encode([{"text": "old stones " * 30, "label": "tea"}], "u"))
    assert text.startswith("say old stones old") and text.endswith(" :")
    room = 16 - encoder.label_words().longest
    assert room - 2 <= len(tokenizer(text)["input_ids"]) <= room


def test_longer_of_two_texts_is_truncated(tokenizer):
    task = TASK.model_copy(update={"columns": TASK.columns.model_copy(update={"pair": "other"})})
    encoder = build_encoder(tokenizer, "{text} and {pair} :", 18, task, {"overlong": "truncate"})
    (text,) = texts(
        tokenizer,
        encoder.encode(
            [{"text": "seven wise owls", "other": "old stones " * 30, "label": "tea"}], "u"
        ),
    )
    assert text.startswith("seven wise owls and old") and text.endswith(" :")


def test_row_that_is_too_long_is_refused_or_dropped(tokenizer):
    row = {"text": "old stones " * 30, "label": "tea"}
    with pytest.raises(DataError, match=r"u row 1: its prompt has \d+ tokens. \d+ are allowed"):
        build_encoder(tokenizer, length=16).encode([row], "u")
    dropped = build_encoder(tokenizer, length=16, data={"overlong": "drop"}).encode(
        [row, {"text": "tea", "label": "tea"}], "u"
    )
    lengths = [b - a for a, b in itertools.pairwise(dropped.offsets.tolist())]
    assert lengths[0] > 16 >= lengths[1], (
        "the index drops rows longer than a sequence, and counts them"
    )
    with pytest.raises(DataError, match="too long even without any text"):
        build_encoder(
            tokenizer,
            "while seven wise owls watch rivers run {text} :",
            8,
            data={"overlong": "truncate"},
        ).encode([row], "u")


def test_draw_takes_count_of_each_class_by_seed():
    samples = [(kind, (kind, number)) for number, kind in enumerate("abcab" * 40)]
    first = prompt_templates.draw_per_class(iter(samples), 3, 7)
    assert first == prompt_templates.draw_per_class(samples, 3, 7), "reproducible"
    assert {kind: sum(own == kind for own, _ in first) for kind in "abc"} == {
        "a": 3,
        "b": 3,
        "c": 3,
    }
    assert len(set(first)) == 9 and first != prompt_templates.draw_per_class(samples, 3, 8)
    assert [kind for kind, _ in first] != sorted(kind for kind, _ in first), "classes are mixed"
    assert sorted(prompt_templates.draw_per_class(samples[:4], 9, 7)) == sorted(
        own for _, own in samples[:4]
    ), "all, if a class has fewer"


def test_every_sample_is_equally_likely():
    counts = [0] * 20
    for seed in range(400):
        for number in prompt_templates.draw_per_class(
            ((0, number) for number in range(20)), 5, seed
        ):
            counts[number] += 1
    assert max(counts) < 140 and min(counts) > 60  # 100 on average


def test_examples_precede_the_prompt_and_may_hold_braces():
    section = PromptingSection(verbalizers={"a": " good", "b": " bad"})
    shown = [
        prompt_templates.format_example("{text} ?", Sample("see {x}", None, 1), ("a", "b"), section)
    ]
    template = prompt_templates.prepend_examples("{text} ?", shown, "\n")
    assert prompt_templates.fill_template(template, "now {y}") == "see {x} ? bad\nnow {y} ?"
