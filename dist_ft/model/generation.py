"""Text generation: transformers' `generate` over batches.

Each row's result is the one it would have alone. Rows of similar length share a batch (causal
models: padded on the left), and the order is restored. Random draws follow from (seed, sample,
draw), never from the other rows of a batch: a token is the argmax of its logits plus Gumbel noise
(Gumbel 1954; the same distribution as a draw from the softmax) from a generator of its row. Unlike
a draw from cumulated probabilities, noise is not sensitive to rounding. Independent of workers and
of references.

Dimensions: B rows of a batch, T tokens of a prompt, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor

from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.core.errors import ConfigError
from dist_ft.core.seeds import derive_seed
from dist_ft.model import generation_checks
from dist_ft.model.adapters import soft_prompts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class GenerationRequest:
    """The input of one generation.

    Attributes:
        ids: (T,) tokens of the prompt, or (encoder-decoder) of the source; at least one.
        sample: number that random draws follow from.
        draw: number of the generation among those of its sample.
    """

    ids: np.ndarray
    sample: int = 0
    draw: int = 0


class TextGenerator:
    """Generates texts with the options of a section decoding."""

    def __init__(self, section: DecodingSection, tokenizer: Any, stops: Iterable[int] = ()) -> None:
        """Set options; `stops` are further end tokens (next to the model's own)."""
        self.section = section
        self._tokenizer = tokenizer
        self._stops = frozenset(stops)

    def split_into_batches(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Return the numbers of `requests` by batch, similar lengths together, longest first."""
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number].ids))
        size = self.section.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def generate_all(
        self, model: PreTrainedModel, requests: Sequence[GenerationRequest]
    ) -> list[list[list[int]]]:
        """Return for each request its `num_samples` generations, token ids without end tokens."""
        generations: dict[int, list[list[int]]] = {}
        for batch in self.split_into_batches(requests):
            results = self.generate_batch(model, [requests[number] for number in batch])
            generations |= zip(batch, results, strict=True)
        return [generations[number] for number in range(len(requests))]

    @torch.no_grad()
    def generate_batch(
        self,
        model: PreTrainedModel,
        requests: Sequence[GenerationRequest],
        synced: bool = False,
        on_token: Callable[[], None] = lambda: None,
        include_end: bool = False,
    ) -> list[list[list[int]]]:
        """Return the generations of one batch, as `generate_all` does.

        Args:
            model: a model in evaluation mode.
            requests: all rows of the batch.
            synced: every forward is a collective call, so all workers make the same number of them
                and continue until all are done.
            on_token: called for each token.
            include_end: keep the end token of a generation.

        Raises:
            ConfigError: the longest prompt and generation have more tokens than the model has
                positions, or a repetition penalty meets virtual tokens.
        """
        is_encoder_decoder = model.config.is_encoder_decoder
        generation_checks.check_vocabulary(model, requests)
        rows = self._repeat_for_draws(requests)
        config = self._generation_config(model)

        virtual = soft_prompts.find_virtual_tokens(model)
        longest = max(len(row.ids) for row in rows)
        if virtual is not None:
            longest += virtual.count  # a prefix takes positions too, though it has no ids
        self.check_length(model, longest)
        if virtual is not None and virtual.ids:
            self._check_repetition_penalty(is_encoder_decoder)
            ids = [np.concatenate([virtual.ids, row.ids]).astype(np.int64) for row in rows]
            rows = [replace(row, ids=row_ids) for row, row_ids in zip(rows, ids, strict=True)]

        # Causal models are padded on the left, so that every row continues at the same position.
        pad_id: Any = config.pad_token_id
        padded = pad_rows([row.ids for row in rows], int(pad_id), left=not is_encoder_decoder)

        # The output of a causal model repeats the prompt; that of a decoder has a start token.
        first_position = 1 if is_encoder_decoder else padded.ids.shape[1]
        stops: set[int] = set(config.eos_token_id or ())  # type: ignore[arg-type]
        processors: Any = self._logits_processors(
            rows, first_position, stops, is_encoder_decoder, on_token
        )

        with generation_checks.generation_errors():
            output = model.generate(  # type: ignore[operator]
                input_ids=padded.ids.to(model.device),
                attention_mask=padded.mask.to(model.device),
                generation_config=config,
                logits_processor=processors,
                synced_gpus=synced,
            )

        new_tokens = output[:, first_position:].tolist()
        generations = [_cut_at_stop(tokens, stops, include_end) for tokens in new_tokens]

        # The generations of one request are next to each other, for draws and beams alike.
        size = self.section.num_samples
        return [generations[first : first + size] for first in range(0, len(generations), size)]

    def _repeat_for_draws(self, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        """Return one row for each random draw of each request."""
        # A beam search returns several generations of one row. A single draw keeps the number that
        # the caller chose.
        copies = self.section.num_samples
        if self.section.strategy != "sample" or copies == 1:
            return list(requests)
        return [replace(request, draw=draw) for request in requests for draw in range(copies)]

    def _check_repetition_penalty(self, is_encoder_decoder: bool) -> None:
        """Raise ConfigError if a repetition penalty would apply to virtual tokens."""
        # The penalty looks up logits by the ids of a sequence, which must not be negative. Of an
        # encoder-decoder the virtual tokens are in the source, which it ignores.
        penalty = self.section.repetition_penalty
        if penalty != 1 and not is_encoder_decoder:
            raise ConfigError(
                [
                    f"decoding.repetition_penalty={penalty}: virtual tokens (tuning.prompt) have "
                    "no entry in the vocabulary. Only 1 is allowed. Remove the option."
                ],
                "decoding",
            )

    def check_length(self, model: PreTrainedModel, longest: int) -> None:
        """Check that a prompt of `longest` tokens and its generation fit the model's positions.

        Raises:
            ConfigError: they do not.
        """
        config = model.config.get_text_config(decoder=True)
        max_new_tokens = self._generation_config(model).max_new_tokens or 0

        # Some configs have the second name only. A model with neither has relative positions.
        num_positions = getattr(config, "max_position_embeddings", None)
        num_positions = num_positions or getattr(config, "n_positions", None)
        if model.config.is_encoder_decoder:
            longest = 0  # the decoder holds the generation only

        if isinstance(num_positions, int) and longest + max_new_tokens > num_positions:
            raise ConfigError(
                [
                    f"decoding.max_new_tokens={max_new_tokens}: the model has {num_positions} "
                    f"positions and the longest prompt {longest} tokens. At most "
                    f"{max(0, num_positions - longest)} are allowed. Lower it, or shorten the "
                    "prompts."
                ],
                "decoding",
            )

    def decode_text(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _stop_tokens(self, model: PreTrainedModel) -> set[int]:
        """Return all end tokens: of the caller, of the model, of the tokenizer."""
        # transformers stores one end token as a number, several as a list.
        own_stops = getattr(model.generation_config, "eos_token_id", None)
        if isinstance(own_stops, int):
            own_stops = [own_stops]

        stops = {*self._stops, *(own_stops or ())}
        if self._tokenizer.eos_token_id is not None:
            stops.add(self._tokenizer.eos_token_id)
        return stops

    def _generation_config(self, model: PreTrainedModel) -> GenerationConfig:
        """Return transformers' config of this section.

        Every option that changes the result is set, because the model's own config fills the rest.
        """
        from transformers import GenerationConfig

        section = self.section
        stops = self._stop_tokens(model)

        # Masks hide padding, so any token will do for a model that has no token of its own for it.
        own_pad = getattr(model.generation_config, "pad_token_id", None)
        pads = (self._tokenizer.pad_token_id, own_pad, *sorted(stops), 0)
        pad_id = generation_checks.first_token(model, pads)

        # The limit must not cut a choice.
        max_new_tokens = section.max_new_tokens
        if section.choices:
            choices = self._encode_choices(stops, model.config.is_encoder_decoder)
            max_new_tokens = max(map(len, choices))

        num_beams = num_returned = 1
        if section.strategy == "beam":
            num_beams, num_returned = section.num_beams, section.num_samples

        # Random draws are the argmax of noisy logits (`Gumbel`), so transformers never samples.
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=num_beams,
            length_penalty=section.length_penalty,
            early_stopping=section.early_stopping,
            num_return_sequences=num_returned,
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
            pad_token_id=pad_id,
        )

    def _encode_choices(self, stops: set[int], is_encoder_decoder: bool) -> list[list[int]]:
        """Return the choices as tokens, each with its end token."""
        if not stops:
            raise ConfigError(
                [
                    "decoding.choices: neither the model nor its tokenizer has an end token, and "
                    "one is needed. Set eos_token in tokenizer_config.json, or remove choices."
                ],
                "decoding",
            )

        end = self._tokenizer.eos_token_id
        if end not in stops:
            end = min(stops)

        # Without an end token a choice could not stop where a longer one continues it.
        choices = []
        for choice in self.section.choices:
            encoded = self._tokenizer(choice, add_special_tokens=is_encoder_decoder)
            ids = list(encoded["input_ids"])
            if ids[-1] not in stops:
                ids.append(end)
            choices.append(ids)
        return choices

    def _logits_processors(
        self,
        rows: Sequence[GenerationRequest],
        first_position: int,
        stops: set[int],
        is_encoder_decoder: bool,
        on_token: Callable[[], None],
    ) -> list[Any]:
        """Return the processors that follow transformers' own, in order."""
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        section = self.section
        processors = LogitsProcessorList([_TokenCallback(on_token)])

        # Before the filters: top-k and top-p must choose among the allowed tokens only.
        if section.choices:
            choices = self._encode_choices(stops, is_encoder_decoder)
            processors.append(_ChoiceConstraint(choices, first_position))
        if section.strategy != "sample":
            return processors

        # In the order in which transformers itself applies them.
        if section.temperature != 1:
            processors.append(TemperatureLogitsWarper(section.temperature))
        if section.top_k:
            processors.append(TopKLogitsWarper(section.top_k))
        if section.top_p < 1:
            processors.append(TopPLogitsWarper(section.top_p))
        if section.min_p:
            processors.append(MinPLogitsWarper(section.min_p))

        # Last, so that the noise is added to the final distribution.
        seeds = [derive_seed(section.seed, row.sample, row.draw) for row in rows]
        processors.append(Gumbel(seeds))
        return processors


class Gumbel(LogitsProcessor):
    """Adds noise to logits (B, V), one generator per row: their argmax is a random draw."""

    def __init__(self, seeds: Sequence[int]) -> None:
        """Start a generator for each row."""
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return noisy logits (transformers' interface)."""
        # Drawn on the CPU, because generators of CPU and GPU give different numbers for a seed.
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)

        # The negative log of exponential noise is Gumbel noise. The bound prevents a log of zero.
        noise = noise.clamp(min=torch.finfo(torch.float32).tiny)
        return scores - noise.log().to(scores.device)


class _ChoiceConstraint(LogitsProcessor):
    """Allows only tokens that continue one of a list of choices."""

    def __init__(self, choices: Sequence[Sequence[int]], first_position: int) -> None:
        """Take choices with end tokens; `first_position` is that of the first generated token."""
        self._first_position = first_position
        self._ends = sorted({choice[-1] for choice in choices})

        # By the tokens so far: a choice may start like another one.
        self._next_tokens: dict[tuple[int, ...], set[int]] = {}
        for choice in choices:
            for index, token in enumerate(choice):
                self._next_tokens.setdefault(tuple(choice[:index]), set()).add(token)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logits of -inf for all other tokens (transformers' interface)."""
        mask = torch.full_like(scores, -torch.inf)
        for row, generated in enumerate(input_ids[:, self._first_position :].tolist()):
            # A finished row continues with end tokens while other rows of the batch are unfinished.
            allowed = self._next_tokens.get(tuple(generated), self._ends)
            mask[row, sorted(allowed)] = 0
        return scores + mask


class _TokenCallback(LogitsProcessor):
    """Calls a function for each token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits unchanged (transformers' interface)."""
        self._on_token()
        return scores


class PaddedRows(NamedTuple):
    """Token ids (B, T) int64, padded on one side, and their mask (B, T) int64."""

    ids: torch.Tensor
    mask: torch.Tensor


def pad_rows(rows: Sequence[np.ndarray], pad: int, left: bool) -> PaddedRows:
    """Return rows of ids as one tensor, padded on the left or right, and its mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = longest - len(row) if left else 0
        place = slice(start, start + len(row))
        ids[number, place] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[number, place] = 1
    return PaddedRows(ids, mask)


def _cut_at_stop(tokens: list[int], stops: set[int], include_end: bool) -> list[int]:
    """Return tokens up to the first end token, with it if `include_end`."""
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[: index + include_end]
    return tokens
