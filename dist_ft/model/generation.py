"""Texts made by a model: transformers' `generate` over batches, row by row what it would be alone.

Rows of like length share a batch (causal models: padded on the left), and order is restored. What is drawn at random
follows from (seed, sample, which of its texts), never from what shares a batch: a token is the argmax of its logits
plus Gumbel noise (Gumbel 1954; the same distribution as a draw by softmax) of a generator of the row's own, and noise
does not turn on rounding as a draw from cumulated shares does. Knows no workers and no references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor

from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.core.errors import ConfigError
from dist_ft.core.seeds import (
    derive_seed,
)
from dist_ft.model.adapters import soft_prompts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class GenerationRequest:
    """What a text is made from.

    Attributes:
        ids: (T,) tokens of the prompt, or (encoder-decoder) of the source; at least one.
        sample: number that random draws follow from.
        draw: which of the texts of this sample.
    """

    ids: np.ndarray
    sample: int = 0
    draw: int = 0


class TextGenerator:
    """Makes texts as a section says."""

    def __init__(self, section: DecodingSection, tokenizer: Any, stops: Iterable[int] = ()) -> None:
        """Assign only; `stops` are tokens that end a text besides those the model and its tokenizer name."""
        self.section = section
        self._tokenizer = tokenizer
        self._stops = frozenset(stops)

    def batches(self, rows: Sequence[GenerationRequest]) -> list[list[int]]:
        """Return the numbers of `rows` by batch, those of like length together, longest first."""
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
        return [
            order[start : start + self.section.batch_size]
            for start in range(0, len(order), self.section.batch_size)
        ]

    def generate_all(self, model: PreTrainedModel, rows: Sequence[GenerationRequest]) -> list[list[list[int]]]:
        """Return, by row and in their order, `num_samples` texts as token ids, without what ended them."""
        found: dict[int, list[list[int]]] = {}
        for batch in self.batches(rows):
            found |= zip(batch, self.make(model, [rows[number] for number in batch]), strict=True)
        return [found[number] for number in range(len(rows))]

    @torch.no_grad()
    def make(
        self,
        model: PreTrainedModel,
        rows: Sequence[GenerationRequest],
        synced: bool = False,
        beat: Callable[[], None] = lambda: None,
        with_end: bool = False,
    ) -> list[list[list[int]]]:
        """Return the texts of one batch, as `make_all`.

        Args:
            model: in evaluation mode.
            rows: what is asked, all at once.
            synced: every forward is a collective call, so all workers call this as often and go on until all are done.
            beat: called for each token.
            with_end: leave what ended a text at its end.

        Raises:
            ConfigError: the longest prompt and text have more tokens than the model has places.
        """
        section, both = self.section, model.config.is_encoder_decoder
        copies = section.num_samples if section.strategy == "sample" else 1
        rows = (
            [replace(row, draw=draw) for row in rows for draw in range(copies)]
            if copies > 1
            else list(rows)
        )
        config = self._config(model)
        virtual = soft_prompts.find_virtual_tokens(model)
        self.require_room(
            model, max(len(row.ids) for row in rows) + (virtual.count if virtual else 0)
        )
        if virtual is not None and virtual.ids:
            if section.repetition_penalty != 1 and not both:
                raise ConfigError(
                    [
                        f"decoding.repetition_penalty={section.repetition_penalty}: virtual tokens (tuning."
                        "prompt) are no words; 1 is allowed; remove it"
                    ],
                    "decoding",
                )
            rows = [
                replace(row, ids=np.concatenate([virtual.ids, row.ids]).astype(np.int64))
                for row in rows
            ]
        ids, mask = pad_rows([row.ids for row in rows], int(config.pad_token_id), left=not both)  # type: ignore
        start = 1 if both else ids.shape[1]
        made = model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=self._processors(
                rows, start, set(config.eos_token_id or ()), both, beat
            ),  # type: ignore
            synced_gpus=synced,
        )
        stops, texts = set(config.eos_token_id or ()), []  # type: ignore[arg-type]
        for row in made[:, start:].tolist():
            texts.append(
                row[
                    : next(
                        (at + with_end for at, token in enumerate(row) if token in stops), len(row)
                    )
                ]
            )
        each = section.num_samples
        return [texts[first : first + each] for first in range(0, len(texts), each)]

    def require_room(self, model: PreTrainedModel, longest: int) -> None:
        """Raise ConfigError if a prompt of `longest` tokens and its text do not fit into the places of `model`."""
        config, length = (
            model.config.get_text_config(decoder=True),
            self._config(model).max_new_tokens or 0,
        )
        places = getattr(config, "max_position_embeddings", None) or getattr(
            config, "n_positions", None
        )
        longest = 0 if model.config.is_encoder_decoder else longest
        if isinstance(places, int) and longest + length > places:
            raise ConfigError(
                [
                    f"decoding.max_new_tokens={length}: the model has {places} places and the longest "
                    f"prompt {longest} tokens; at most {max(0, places - longest)} are allowed; lower it, or "
                    "shorten the prompts"
                ],
                "decoding",
            )

    def text(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _config(self, model: PreTrainedModel) -> GenerationConfig:
        """Return transformers' config of this section: all it decides is set, as the model's own fills the rest."""
        from transformers import GenerationConfig

        section, own = self.section, model.generation_config
        known = own.eos_token_id if own is not None else None  # type: ignore[union-attr]
        stops = {*self._stops, *([known] if isinstance(known, int) else known or ())}
        stops |= {self._tokenizer.eos_token_id} - {None}
        pads = (self._tokenizer.pad_token_id, getattr(own, "pad_token_id", None), *sorted(stops), 0)
        both = model.config.is_encoder_decoder
        length = section.max_new_tokens
        if section.choices:
            length = max(map(len, self._choices(stops, both)))
        beams = section.strategy == "beam"
        return GenerationConfig(
            max_new_tokens=length,
            do_sample=False,
            num_beams=section.num_beams if beams else 1,
            length_penalty=section.length_penalty,
            early_stopping=section.early_stopping,
            num_return_sequences=section.num_samples if beams else 1,
            repetition_penalty=section.repetition_penalty,
            no_repeat_ngram_size=0,
            encoder_no_repeat_ngram_size=0,
            encoder_repetition_penalty=1.0,
            min_length=0,
            min_new_tokens=0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            eos_token_id=sorted(stops) or None,
            pad_token_id=next(pad for pad in pads if pad is not None),
        )

    def _choices(self, stops: set[int], both: bool) -> list[list[int]]:
        """Return the choices as tokens, each with its end."""
        if not stops:
            raise ConfigError(
                [
                    "decoding.choices: neither the model nor its tokenizer names a token that ends a text; "
                    "one is needed; set eos_token in tokenizer_config.json, or remove choices"
                ],
                "decoding",
            )
        encoded = [
            list(self._tokenizer(choice, add_special_tokens=both)["input_ids"])
            for choice in self.section.choices
        ]
        end = self._tokenizer.eos_token_id if self._tokenizer.eos_token_id in stops else min(stops)
        return [ids if ids[-1] in stops else [*ids, end] for ids in encoded]

    def _processors(
        self,
        rows: Sequence[GenerationRequest],
        start: int,
        stops: set[int],
        both: bool,
        beat: Callable[[], None],
    ) -> list[Any]:
        """Return what acts on logits after transformers' own processors, in order."""
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        section, found = self.section, LogitsProcessorList([_Beat(beat)])
        if section.choices:
            found.append(_OneOf(self._choices(stops, both), start))
        if section.strategy != "sample":
            return found
        if section.temperature != 1:
            found.append(TemperatureLogitsWarper(section.temperature))
        if section.top_k:
            found.append(TopKLogitsWarper(section.top_k))
        if section.top_p < 1:
            found.append(TopPLogitsWarper(section.top_p))
        if section.min_p:
            found.append(MinPLogitsWarper(section.min_p))
        found.append(Gumbel([derive_seed(section.seed, row.sample, row.draw) for row in rows]))
        return found


class Gumbel(LogitsProcessor):
    """Adds noise to logits (B, V), of one generator a row, so that their argmax is a draw by probability."""

    def __init__(self, seeds: Sequence[int]) -> None:
        """Begin a generator for each row."""
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return noisy logits (transformers' interface)."""
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp(min=torch.finfo(torch.float32).tiny).log().to(scores.device)


class _OneOf(LogitsProcessor):
    """Allows only tokens that go on with one of some texts."""

    def __init__(self, texts: Sequence[Sequence[int]], start: int) -> None:
        """Take whole texts, each with its end; `start` is the first place that is made."""
        self._start = start
        self._ends = sorted({text[-1] for text in texts})
        self._next: dict[tuple[int, ...], set[int]] = {}
        for text in texts:
            for at, token in enumerate(text):
                self._next.setdefault(tuple(text[:at]), set()).add(token)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logits of -inf for all other tokens (transformers' interface)."""
        allowed = torch.full_like(scores, -torch.inf)
        for row, made in enumerate(input_ids[:, self._start :].tolist()):
            allowed[row, sorted(self._next.get(tuple(made), self._ends))] = (
                0  # behind its end a row goes on for others
            )
        return scores + allowed


class _Beat(LogitsProcessor):
    """Says that there is progress."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Change nothing (transformers' interface)."""
        self._beat()
        return scores


def pad_rows(rows: Sequence[np.ndarray], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of ids as one tensor (B, T), padded on one side, and its mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[number, place] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[number, place] = 1
    return ids, mask
