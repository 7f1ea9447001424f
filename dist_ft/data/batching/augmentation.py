"""Training texts with some words replaced, exchanged or left out (EDA, Wei and Zou, arXiv:1901.11196).

Done to tokens when batches are made: what a sample becomes is a pure function of seed, epoch and sample, so the same
in every world and after a restart. Words are what the tokenizer's own marks say (for tags: those that have one);
its special tokens, and words with a tag other than O, stay. A tag goes with its word, a label of the whole text stays
with the text. Where more tokens would come out than a sequence takes, the sample stays as it is. Held-out data never
come here. Does not know the ledger, which tells of samples as they were read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ft.config.sections.data import AugmentSection
from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import DataError, ModelError, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.seeds import (
    derive_seed,
    random_uint64,
)
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding.fast_tokenizer import exact_backend, tokenizer_name
from dist_ft.storage.filesystem import Store

SALT = 0x617567
"""Keeps these draws apart from the others of a sample."""
OUTSIDE = "O"

Word = tuple[np.ndarray, np.ndarray]
"""Tokens and labels of a word, (n,) each."""
Synonyms = Mapping[tuple[int, ...], Sequence[np.ndarray]]
"""By the tokens of a word, those of the words that may stand for it."""


@dataclass(frozen=True)
class Augmentation:
    """How texts are changed.

    Attributes:
        begins: (V,) bool: a token of this id begins a word.
        fixed: (V,) bool: a special or added token, which stays where it is.
        outside: token_classification: number of the tag of words that may be changed; None: labels are the text's.
        length: tokens a sequence takes.
        seed: of the run.
    """

    section: AugmentSection
    begins: np.ndarray
    fixed: np.ndarray
    synonyms: Synonyms
    outside: int | None
    length: int
    seed: int

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        section: AugmentSection,
        task: TaskSection,
        length: int,
        seed: int,
        synonyms: str,
    ) -> Augmentation:
        """Return the augmentation of a run; `synonyms` is the text of the file the section names."""
        mark, begins_by_mark = word_mark(tokenizer)
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        begins = np.array([(name or "").startswith(mark) == begins_by_mark for name in names])
        fixed = np.zeros(len(tokenizer), bool)
        fixed[[*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()]] = True
        outside = None
        if task.name == "token_classification":
            outside = task.labels.index(OUTSIDE) if OUTSIDE in task.labels else -1
        return cls(
            section,
            begins,
            fixed,
            read_synonyms(synonyms, tokenizer, str(section.synonyms)),
            outside,
            length,
            seed,
        )

    def apply(
        self, tokens: np.ndarray, labels: np.ndarray, segments: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens and labels of a batch as they are learned from, and how many tokens each piece has now.

        Args:
            tokens: (sum,) of all pieces.
            labels: (sum,) int32.
            pieces: (n, 4) [sample id, first token, number of tokens, epoch].
        """
        found, start = [], 0
        for sample, first, size, epoch in segments.tolist():
            own = tokens[start : start + size], labels[start : start + size]
            found.append(self._changed(*own, derive_seed(self.seed, SALT, epoch, sample, first)))
            start += size
        sizes = np.array([len(own) for own, _ in found], dtype=np.int64)
        return (
            np.concatenate([own for own, _ in found]),
            np.concatenate([own for _, own in found]),
            sizes,
        )

    def _changed(self, tokens: np.ndarray, labels: np.ndarray, seed: int) -> Word:
        """Return a sample as this epoch sees it."""
        starts = np.flatnonzero(self._starts(tokens, labels))
        drawn = random_uint64(seed, 1 + 5 * len(starts))
        chance = (drawn >> np.uint64(11)).astype(np.float64) / 2**53
        if chance[0] >= self.section.probability or not len(starts):
            return tokens, labels
        whole = None if self.outside is not None else labels[labels != IGNORE_INDEX]
        words = list(zip(np.split(tokens, starts[1:]), np.split(labels, starts[1:]), strict=True))
        fixed = np.array([self.fixed[own[0]] for own, _ in words])
        free = (
            ~fixed
            if whole is not None
            else ~fixed & np.array([own[0] == self.outside for _, own in words])
        )
        self._edit(words, free, np.cumsum(fixed), chance[1:].reshape(5, -1))
        kept = np.concatenate([own for own, _ in words]), np.concatenate([own for _, own in words])
        if len(kept[0]) > self.length or (whole is not None and len(kept[0]) < len(whole)):
            return tokens, labels
        if whole is not None:  # carried by the first positions, whatever stands there
            kept[1][:] = IGNORE_INDEX
            kept[1][: len(whole)] = whole
        return kept

    def _starts(self, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Tell where words begin, (T,) bool; what stands before the first is one."""
        fixed = self.fixed[tokens]
        found = fixed | (labels != IGNORE_INDEX if self.outside is not None else self.begins[tokens])
        found[1:] |= fixed[:-1]
        found[:1] = True
        return found

    def _edit(
        self, words: list[Word], free: np.ndarray, texts: np.ndarray, chance: np.ndarray
    ) -> None:
        """Change a sample's words in place: replace, exchange, leave out.

        Args:
            words: of the sample.
            free: (n,) bool: words that may be changed.
            texts: (n,) the number of the text a word belongs to.
            chance: (5, n) draws from [0, 1).
        """
        section, places = self.section, np.flatnonzero(free)
        for i in places[chance[0][places] < section.replace]:
            known = self.synonyms.get(tuple(words[i][0].tolist()), ())
            if known:
                words[i] = _labelled(known[int(chance[1][i] * len(known))], words[i])
        for i in places[chance[2][places] < section.swap]:
            others = places[texts[places] == texts[i]]
            j = others[int(chance[3][i] * len(others))]
            words[i], words[j] = words[j], words[i]
        gone = places[chance[4][places] < section.delete]
        if len(gone) == len(places) and len(gone):  # something of the text is left
            gone = np.delete(gone, chance[4][gone].argmax())
        for i in gone[::-1]:
            del words[i]


def _labelled(tokens: np.ndarray, word: Word) -> Word:
    """Return other tokens with the label of `word` on the first of them."""
    labels = np.full(len(tokens), IGNORE_INDEX, np.int32)
    labels[0] = word[1][0]
    return tokens.astype(word[0].dtype), labels


def word_mark(tokenizer: Any) -> tuple[str, bool]:
    """Return the mark by which a tokenizer's tokens tell words, and whether it stands where one begins.

    Raises:
        ModelError: a tokenizer that marks nothing.
    """
    backend = json.loads(exact_backend(tokenizer).to_str())
    if backend["model"].get("type") == "WordPiece":
        return backend["model"]["continuing_subword_prefix"], False
    kinds = json.dumps([backend.get("pre_tokenizer"), backend.get("normalizer")])
    for kind, mark in (("ByteLevel", "Ġ"), ("Metaspace", "▁"), ("▁", "▁")):
        if kind in kinds or json.dumps(kind)[1:-1] in kinds:
            return mark, True
    raise ModelError(
        f"data.augment: the tokens of model.tokenizer={tokenizer_name(tokenizer)} do not tell where words begin; "
        "WordPiece, byte-level and SentencePiece tokenizers are allowed; remove data.augment"
    )


def read_synonyms(text: str, tokenizer: Any, path: str) -> dict[tuple[int, ...], list[np.ndarray]]:
    """Return the synonyms in lines `word<TAB>synonym,synonym` as tokens, at the start of a text and within one.

    Raises:
        DataError: a line of another kind.
    """
    backend, (_, begins) = exact_backend(tokenizer), word_mark(tokenizer)
    found: dict[tuple[int, ...], list[np.ndarray]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        word, tab, others = line.partition("\t")
        synonyms = [other.strip() for other in others.split(",") if other.strip()]
        if not (word.strip() and tab and synonyms):
            raise DataError(
                f"{path} line {number}: is not a word, a tab, and synonyms with commas between; repair it"
            )
        for before in ("", " ") if begins else ("",):
            own, *rest = [
                encoding.ids
                for encoding in backend.encode_batch(
                    [before + text for text in (word.strip(), *synonyms)], add_special_tokens=False
                )
            ]
            found.setdefault(tuple(own), []).extend(
                np.array(other, np.int32)
                for other in rest
                if other and tokenizer.unk_token_id not in other
            )
    return found


def read_synonym_file(path: str) -> str:
    """Return the text of a file of synonyms.

    Raises:
        DataError: it is not there, or not UTF-8.
    """
    folder, slash, name = path.rpartition("/")
    try:
        return Store((folder or slash) if slash else ".").read(name).decode("utf-8-sig")
    except (FileNotFoundError, StorageError, UnicodeDecodeError) as error:
        why = (
            "is not UTF-8"
            if isinstance(error, UnicodeDecodeError)
            else f"can not be read ({error})"
        )
        raise DataError(
            redact(
                f"data.augment.synonyms={path}: {why}; a file of lines `word<TAB>synonym,synonym` is "
                "needed; correct the path"
            )
        ) from error
