"""Augmentation: a function of seed, epoch and sample; labels stay with their words or texts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))
import tiny
import tiny_tasks

from dist_ft.config.sections.data import AugmentSection
from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.batching.augmentation import Augmentation, read_synonym_file

SYNONYMS = "the\ta\nstones\tlazy dogs,rivers\n"
TAGS = TaskSection(name="token_classification", labels=("O", "B-place"))


@pytest.fixture(scope="module")
def wordpiece():
    return tiny_tasks.make_tokenizer()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.make_model(tmp_path_factory.mktemp("model")))


def make_augmentation(tokenizer, task=None, length=64, seed=1, **section):
    section = {"synonyms": "s.tsv", **section} if "replace" in section else section
    return Augmentation.from_config(
        tokenizer,
        AugmentSection(**section),
        task or TaskSection(name="sequence_classification"),
        length,
        seed,
        SYNONYMS,
    )


def sample(tokenizer, text, label=1, epoch=0, number=0):
    """Return tokens, labels and segments of one text with its class on the first position."""
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[0] = label
    return ids, labels, np.array([[number, 0, len(ids), epoch]])


def texts(augmentation, tokenizer, text, count=400):
    """Return a text as each of `count` epochs sees it."""
    return [
        tokenizer.decode(
            augmentation.apply(*sample(tokenizer, text, epoch=epoch))[0], skip_special_tokens=True
        )
        for epoch in range(count)
    ]


TEXT = "the quick brown fox jumps over stones and every child counts stars"


def test_words_are_replaced_by_their_synonyms(wordpiece):
    found = texts(make_augmentation(wordpiece, replace=0.5), wordpiece, TEXT)
    words = TEXT.split()
    kept = " ".join(words[1:6]), " ".join(words[7:])
    assert {text.split()[0] for text in found} == {"the", "a"}
    assert all(kept[0] in text and text.endswith(kept[1]) for text in found)
    shares = [
        np.mean([f" {synonym} and" in text for text in found])
        for synonym in ("stones", "lazy dogs", "rivers")
    ]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.08)


def test_byte_level_words_are_found_with_their_space(byte_level):
    tokens = np.array(
        byte_level("watch the stones", add_special_tokens=False)["input_ids"], np.int32
    )
    labels = np.where(np.arange(len(tokens)) == 0, 1, IGNORE_INDEX).astype(np.int32)
    found, _, sizes = make_augmentation(byte_level, replace=1.0).apply(
        tokens, labels, np.array([[0, 0, len(tokens), 0]])
    )
    assert byte_level.decode(found) in (
        "watch a lazy dogs",
        "watch a rivers",
    ) and sizes.tolist() == [len(found)]


def test_words_are_deleted_by_probability_but_never_all(wordpiece):
    found = texts(make_augmentation(wordpiece, delete=0.3), wordpiece, TEXT)
    left = [len(text.split()) for text in found]
    assert np.mean(left) == pytest.approx(0.7 * 12, abs=0.3)
    order = TEXT.split()
    assert all(sorted(text.split(), key=order.index) == text.split() for text in found)
    assert all(
        len(text.split()) == 1
        for text in texts(make_augmentation(wordpiece, delete=0.99), wordpiece, "the fox", 50)
    )


def test_swapped_words_stay_in_their_text(wordpiece):
    augmentation, pair = (
        make_augmentation(wordpiece, swap=0.5),
        ("the quick fox jumps", "seven wise owls watch rivers"),
    )
    seen = set()
    for epoch in range(50):
        ids = np.array(wordpiece(*pair)["input_ids"], np.int32)
        labels = np.where(np.arange(len(ids)) == 0, 1, IGNORE_INDEX).astype(np.int32)
        found, _, _ = augmentation.apply(ids, labels, np.array([[0, 0, len(ids), epoch]]))
        halves = " ".join(wordpiece.convert_ids_to_tokens(found.tolist())).split("[SEP]")
        assert halves[0].startswith("[CLS]")
        plain = [
            wordpiece.decode(wordpiece(text, add_special_tokens=False)["input_ids"]).split()
            for text in pair
        ]
        got = [
            " ".join(half.split()).replace("[CLS]", "").replace(" ##", "").split()
            for half in halves[:2]
        ]
        assert [sorted(words) for words in got] == [sorted(words) for words in plain]
        seen.add(tuple(got[0]))
    assert len(seen) > 5


def test_texts_are_augmented_by_probability(wordpiece):
    found = texts(make_augmentation(wordpiece, probability=0.25, replace=1.0), wordpiece, TEXT)
    assert np.mean([text != TEXT for text in found]) == pytest.approx(0.25, abs=0.07)


def test_augmentation_depends_on_sample_epoch_and_seed_only(wordpiece):
    augmentation = make_augmentation(wordpiece, replace=0.5, swap=0.3, delete=0.2)
    one, other = (
        sample(wordpiece, TEXT, number=3),
        sample(wordpiece, "seven wise owls watch the stones", number=4),
    )
    together = augmentation.apply(
        *(np.concatenate(parts) for parts in zip(one, other, strict=True))
    )
    alone = [augmentation.apply(*one), augmentation.apply(*other)]
    for index in range(3):
        assert np.array_equal(together[index], np.concatenate([part[index] for part in alone]))
    assert together[0].dtype == np.int32 and together[1].dtype == np.int32
    different = {
        make_augmentation(wordpiece, replace=0.5, swap=0.3, delete=0.2, seed=seed)
        .apply(*sample(wordpiece, TEXT, epoch=epoch))[0]
        .tobytes()
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(different) == 4


def test_label_of_a_text_stays_on_its_first_position(wordpiece, byte_level):
    for tokenizer in (
        wordpiece,
        byte_level,
    ):  # the first token of the second is a word, which may be deleted
        for epoch in range(20):
            _, labels, sizes = make_augmentation(tokenizer, delete=0.6, swap=0.5).apply(
                *sample(tokenizer, TEXT, label=7, epoch=epoch)
            )
            assert labels[0] == 7 and (labels[1:] == IGNORE_INDEX).all() and len(labels) == sizes[0]


def test_tags_move_with_their_words_and_tagged_words_stay(wordpiece):
    words, tags = ["the", "quick", "rivers", "stones", "and", "towns"], [0, 0, 1, 0, 0, 1]
    augmentation = make_augmentation(wordpiece, TAGS, replace=0.5, swap=0.5, delete=0.3)
    encoding = wordpiece([words], is_split_into_words=True)
    ids = np.array(encoding["input_ids"][0], np.int32)
    labels, last = np.full(len(ids), IGNORE_INDEX, np.int32), None
    for place, word in enumerate(encoding.word_ids(0)):
        if word is not None and word != last:
            labels[place] = tags[word]
        last = word
    results = set()
    for epoch in range(100):
        found, new_labels, _ = augmentation.apply(ids, labels, np.array([[0, 0, len(ids), epoch]]))
        starts = np.flatnonzero(new_labels != IGNORE_INDEX)
        ends = [*starts[1:], len(found) - 1]
        got = [
            (wordpiece.decode(found[a:b]), int(new_labels[a]))
            for a, b in zip(starts, ends, strict=True)
        ]
        assert [word for word, tag in got if tag == 1] == ["rivers", "towns"]
        assert {word for word, tag in got if tag == 0} <= {
            "the",
            "a",
            "quick",
            "stones",
            "lazy dogs",
            "rivers",
            "and",
        }
        assert found[0] == wordpiece.cls_token_id and found[-1] == wordpiece.sep_token_id
        results.add(tuple(got))
    assert len(results) > 30 and any(len(got) < 6 for got in results)


def test_text_that_would_not_fit_stays_unchanged(wordpiece):
    ids, labels, segments = sample(wordpiece, "stones stones stones")
    for length, changed in ((len(ids), False), (64, True)):
        found = [
            make_augmentation(wordpiece, length=length, replace=1.0, seed=seed).apply(
                ids, labels, segments
            )[0]
            for seed in range(20)
        ]
        assert all(len(one) <= length for one in found)
        assert any(len(one) > len(ids) for one in found) == changed
    many = labels.copy()
    many[:] = 0  # as many labels as positions
    found, new_labels, _ = make_augmentation(wordpiece, delete=0.9).apply(ids, many, segments)
    assert np.array_equal(found, ids) and np.array_equal(new_labels, many)


def test_bad_synonym_files_are_refused_by_line_and_path(wordpiece, tmp_path):
    section = AugmentSection(synonyms="s.tsv", replace=0.1)
    with pytest.raises(DataError, match=r"s.tsv line 2: is not a word, a tab, and synonyms"):
        Augmentation.from_config(wordpiece, section, TAGS, 64, 0, "a\tb\nc d\n")
    with pytest.raises(DataError, match=r"data.augment.synonyms=.*none.tsv: cannot be read "):
        read_synonym_file(str(tmp_path / "none.tsv"))
    (tmp_path / "latin.tsv").write_bytes(b"caf\xe9\tbar\n")
    with pytest.raises(DataError, match=r"latin.tsv: is not UTF-8. "):
        read_synonym_file(str(tmp_path / "latin.tsv"))


def test_tokenizer_without_word_marks_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    with pytest.raises(ModelError, match="do not mark where words start"):
        make_augmentation(
            PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]"), swap=0.1
        )
