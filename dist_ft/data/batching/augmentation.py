"""Augmentation: training texts with words replaced, swapped or deleted.

The method is EDA (Wei and Zou, arXiv:1901.11196), applied to tokens when batches are built. What a
sample becomes is a pure function of seed, epoch and sample, so it is the same in every world size
and after a restart.

Word boundaries come from the marks in the tokenizer's tokens (for tags: from the tags). Special
tokens, and words with a tag other than O, stay. A tag moves with its word; the label of a whole
text stays with the text. A sample that would exceed a sequence stays unchanged. Held-out data are
never augmented, and the ledger records samples as they were read.

N is the number of segments of a batch, L the sum of their tokens, V the size of the vocabulary; T
is the number of tokens of one text, n the number of its words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dist_ft.config.sections.data import AugmentSection
from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import DataError, ModelError, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.seeds import derive_seed, random_uint64, to_unit_interval
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding.data_task import data_task
from dist_ft.data.encoding.fast_tokenizer import exact_backend, tokenizer_name
from dist_ft.storage.documents import MAX_LARGE_BYTES
from dist_ft.storage.single_files import read_file

SALT = 0x617567
"""Separates these draws from other draws of the same sample ("aug" in ASCII)."""
OUTSIDE_TAG = "O"

Synonyms = Mapping[tuple[int, ...], Sequence[np.ndarray]]
"""Token ids of a word -> the token ids of each word that may replace it."""


class Word(NamedTuple):
    """Tokens and labels of a word (or of a whole text), (n,) each."""

    tokens: np.ndarray
    labels: np.ndarray


class AugmentedTokens(NamedTuple):
    """The tokens of a batch after augmentation.

    Attributes:
        tokens: (L,) token ids.
        labels: int32 (L,).
        lengths: int64 (N,) tokens of each segment.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class WordMark(NamedTuple):
    """How a tokenizer's tokens show word boundaries.

    Attributes:
        mark: the prefix of some tokens.
        is_start: tokens with the mark start a word; else, tokens without it do.
    """

    mark: str
    is_start: bool


@dataclass(frozen=True)
class Augmentation:
    """How texts are changed.

    Attributes:
        section: probabilities.
        starts_word: bool (V,): a token with this id starts a word.
        is_fixed: bool (V,): a special or added token, which stays in its place.
        synonyms: words that may replace one another.
        outside_label: token_classification: the label of words that may be changed (-1: none may);
            None: labels belong to the whole text.
        max_length: maximum tokens of a sequence.
        seed: seed of the run.
    """

    section: AugmentSection
    starts_word: np.ndarray
    is_fixed: np.ndarray
    synonyms: Synonyms
    outside_label: int | None
    max_length: int
    seed: int

    @classmethod
    def from_config(
        cls,
        tokenizer: Any,
        section: AugmentSection,
        task: TaskSection,
        max_length: int,
        seed: int,
        synonyms: str,
    ) -> Augmentation:
        """Return the augmentation of a run; `synonyms` is the text of `section.synonyms`."""
        mark, is_start = find_word_mark(tokenizer)
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        # the name is None for an id that a vocabulary with gaps does not use
        starts_word = np.array([(name or "").startswith(mark) == is_start for name in names])

        is_fixed = np.zeros(len(tokenizer), bool)
        is_fixed[[*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()]] = True

        outside_label = None
        if data_task(task).has_label_per_word:
            outside_label = -1  # equals no label, so that no word may change
            if OUTSIDE_TAG in task.labels:
                outside_label = task.labels.index(OUTSIDE_TAG)

        return cls(
            section=section,
            starts_word=starts_word,
            is_fixed=is_fixed,
            synonyms=parse_synonyms(synonyms, tokenizer, str(section.synonyms)),
            outside_label=outside_label,
            max_length=max_length,
            seed=seed,
        )

    def apply(
        self, tokens: np.ndarray, labels: np.ndarray, segments: np.ndarray
    ) -> AugmentedTokens:
        """Augment the tokens and labels of a batch.

        Args:
            tokens: (L,) of all segments.
            labels: int32 (L,).
            segments: (N, 4) [sample id, first token, number of tokens, epoch].
        """
        augmented: list[Word] = []
        start = 0
        for sample, first, size, epoch in segments.tolist():
            own = Word(tokens[start : start + size], labels[start : start + size])
            # `first` too: the segments of a long sample must not repeat the same draws
            seed = derive_seed(self.seed, SALT, epoch, sample, first)
            augmented.append(self._augment(own, seed))
            start += size

        return AugmentedTokens(
            tokens=np.concatenate([text.tokens for text in augmented]),
            labels=np.concatenate([text.labels for text in augmented]),
            lengths=np.array([len(text.tokens) for text in augmented], dtype=np.int64),
        )

    def _augment(self, text: Word, seed: int) -> Word:
        """Return a text as one epoch sees it."""
        word_starts = np.flatnonzero(self._is_word_start(text))  # (n,)

        # One draw for the text and five for each of its words. All are drawn at once, so a draw
        # does not depend on which words the earlier ones changed.
        chance = to_unit_interval(random_uint64(seed, 1 + 5 * len(word_starts)))
        if chance[0] >= self.section.probability or not len(word_starts):
            return text

        word_tokens = np.split(text.tokens, word_starts[1:])
        word_labels = np.split(text.labels, word_starts[1:])
        words = [Word(*both) for both in zip(word_tokens, word_labels, strict=True)]

        # a fixed token is a word of its own, so the first token decides
        is_fixed = np.array([self.is_fixed[word.tokens[0]] for word in words])  # (n,)
        may_change = ~is_fixed
        text_labels = None
        if self.outside_label is None:
            text_labels = text.labels[text.labels != IGNORE_INDEX]
        else:
            may_change &= np.array([word.labels[0] == self.outside_label for word in words])

        # fixed tokens separate the texts of a pair
        text_numbers = np.cumsum(is_fixed)
        self._edit(words, may_change, text_numbers, chance[1:].reshape(5, -1))

        tokens = np.concatenate([word.tokens for word in words])
        labels = np.concatenate([word.labels for word in words])
        if len(tokens) > self.max_length:
            return text

        if text_labels is not None:
            if len(tokens) < len(text_labels):
                return text  # too few positions for the labels
            # the first positions carry the labels of the text, whatever their tokens
            labels[:] = IGNORE_INDEX
            labels[: len(text_labels)] = text_labels
        return Word(tokens, labels)

    def _is_word_start(self, text: Word) -> np.ndarray:
        """Return where words start, bool (T,); tokens before the first start form a word."""
        is_fixed = self.is_fixed[text.tokens]  # (T,)
        if self.outside_label is None:
            is_start = is_fixed | self.starts_word[text.tokens]
        else:
            # tags are on the first token of each word
            is_start = is_fixed | (text.labels != IGNORE_INDEX)

        # after a fixed token comes another word, whether its token has the mark or not
        is_start[1:] |= is_fixed[:-1]
        is_start[:1] = True
        return is_start

    def _edit(
        self,
        words: list[Word],
        may_change: np.ndarray,
        text_numbers: np.ndarray,
        chance: np.ndarray,
    ) -> None:
        """Replace, swap and delete a sample's n words, in place.

        Args:
            words: words of the sample.
            may_change: bool (n,).
            text_numbers: (n,) the number of the text that a word belongs to.
            chance: (5, n) draws from [0, 1): whether to replace, by which synonym; whether to swap,
                with which word; whether to delete.
        """
        replace, synonym, swap, partner, delete = chance  # (n,) each
        places = np.flatnonzero(may_change)

        for i in places[replace[places] < self.section.replace]:
            known = self.synonyms.get(tuple(words[i].tokens.tolist()), ())
            if known:
                words[i] = _replace_tokens(words[i], known[int(synonym[i] * len(known))])

        for i in places[swap[places] < self.section.swap]:
            same_text = places[text_numbers[places] == text_numbers[i]]
            j = same_text[int(partner[i] * len(same_text))]
            words[i], words[j] = words[j], words[i]

        # Deletions come last: until then a word's index is also that of its draws.
        deleted = places[delete[places] < self.section.delete]
        if len(deleted) == len(places) and len(deleted):
            # keep the word with the largest draw, so that some text is left
            deleted = np.delete(deleted, delete[deleted].argmax())
        # from the end, so that the indices before stay valid
        for i in deleted[::-1]:
            del words[i]


def _replace_tokens(word: Word, tokens: np.ndarray) -> Word:
    """Return `tokens` with the label of `word` on the first of them."""
    labels = np.full(len(tokens), IGNORE_INDEX, np.int32)
    labels[0] = word.labels[0]
    return Word(tokens.astype(word.tokens.dtype), labels)


def find_word_mark(tokenizer: Any) -> WordMark:
    """Return how a tokenizer's tokens show word boundaries.

    Raises:
        ModelError: they do not.
    """
    backend = json.loads(exact_backend(tokenizer).to_str())
    if backend["model"].get("type") == "WordPiece":
        return WordMark(backend["model"]["continuing_subword_prefix"], is_start=False)

    # Both may be nested sequences, so their names are looked up in the JSON. Some SentencePiece
    # conversions have no Metaspace, but a normalizer that replaces blanks by its mark.
    settings = json.dumps([backend.get("pre_tokenizer"), backend.get("normalizer")])
    for name, mark in (("ByteLevel", "Ġ"), ("Metaspace", "▁"), ("▁", "▁")):
        # json.dumps writes "▁" as an escape sequence
        escaped_name = json.dumps(name)[1:-1]
        if name in settings or escaped_name in settings:
            return WordMark(mark, is_start=True)

    raise ModelError(
        f"data.augment: the tokens of model.tokenizer={tokenizer_name(tokenizer)} do not mark where"
        " words start. WordPiece, byte-level and SentencePiece tokenizers are supported. Remove "
        "data.augment."
    )


def parse_synonyms(text: str, tokenizer: Any, path: str) -> Synonyms:
    """Return the synonyms in lines `word<TAB>synonym,synonym` as tokens.

    Words are tokenized as at the start of a text and, where that differs, as within one.

    Raises:
        DataError: a line has another form.
    """
    backend = exact_backend(tokenizer)
    prefixes: tuple[str, ...] = ("",)
    if find_word_mark(tokenizer).is_start:
        # the mark stands for a blank, so a word has other tokens after one
        prefixes = ("", " ")
    synonyms: dict[tuple[int, ...], list[np.ndarray]] = {}

    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        word, tab, others = line.partition("\t")
        replacements = [other.strip() for other in others.split(",") if other.strip()]
        if not (word.strip() and tab and replacements):
            raise DataError(
                f"{path} line {number}: is not a word, a tab, and synonyms separated by commas. "
                "Correct the line."
            )

        for prefix in prefixes:
            texts = [prefix + text for text in (word.strip(), *replacements)]
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            word_encoding, *replacement_encodings = encodings

            own = synonyms.setdefault(tuple(word_encoding.ids), [])
            for encoding in replacement_encodings:
                ids = encoding.ids
                # an unknown token would lose the word
                if ids and tokenizer.unk_token_id not in ids:
                    own.append(np.array(ids, np.int32))
    return synonyms


def read_synonym_file(path: str) -> str:
    """Return the text of a synonym file.

    Raises:
        DataError: it does not exist, or is not UTF-8.
    """
    try:
        return read_file(path, MAX_LARGE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _synonym_file_error(path, "is not UTF-8") from error
    except (FileNotFoundError, StorageError) as error:
        raise _synonym_file_error(path, f"cannot be read ({error})") from error


def _synonym_file_error(path: str, problem: str) -> DataError:
    return DataError(
        redact(
            f"data.augment.synonyms={path}: {problem}. A file of lines `word<TAB>synonym,synonym` "
            "is needed. Correct the path."
        )
    )
