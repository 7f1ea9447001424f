"""Generation by all workers together, and generations for held-out prompts with their scores.

Each text is generated once, by any worker, and is the same at every world size (see
`model.generation`). Batches of requests of similar length are dealt to the workers in turn. Where a
forward pass is a collective call (ZeRO-3), every worker makes the same number of calls of
`generate`: a worker without a batch left generates for a dummy request, and no call ends before all
can.

Dimensions: B sequences (rows) of a batch with T tokens; N segments; R rows that hold a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.config.task_facts import task_class
from dist_ft.core.world import Collectives, World
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.engine.base import Engine
from dist_ft.metrics import text_scores

if TYPE_CHECKING:
    from dist_ft.model.generation import GenerationRequest, TextGenerator


@dataclass(frozen=True)
class HeldOutSample:
    """A held-out sample: the tokens before its first target, and its target.

    Attributes:
        sample: id.
        prompt: (T,) token ids.
        target: token ids; of a chat with several answers the first.
    """

    sample: int
    prompt: np.ndarray
    target: np.ndarray


class Generation(TypedDict):
    """Generated text as it is stored and reported (JSON).

    Attributes:
        sample: id.
        prompt, reference: decoded.
        text: the generated text, the first of several.
        others: the further ones, if the strategy generates several.
    """

    sample: int
    prompt: str
    reference: str
    text: str
    others: NotRequired[list[str]]


@dataclass(frozen=True)
class ScoredGenerations:
    """Generations for held-out prompts.

    Attributes:
        metrics: metrics of all generations.
        generations: the first evaluation.keep_generations of them.
        num_tokens: generated, in all generations.
    """

    metrics: dict[str, float]
    generations: list[Generation]
    num_tokens: int


def generate_distributed(
    generator: TextGenerator,
    engine: Engine,
    requests: Sequence[GenerationRequest],
    world: World,
    collectives: Collectives,
    on_progress: Callable[[], None] = lambda: None,
) -> list[list[list[int]]]:
    """Return the token ids for `requests` as `TextGenerator.generate_all` does, on all workers.

    A collective call with the same requests on all workers. `on_progress` is called for each token.
    """
    from dist_ft.model.generation import GenerationRequest

    batches = generator.split_into_batches(requests)
    own_batches = batches[world.rank :: world.num_ranks]
    own_texts: dict[int, list[list[int]]] = {}
    with engine.generation_mode() as (model, synced):
        # Of all requests, on all workers: if only the worker with the longest prompt raised an
        # error, the others would wait for it.
        if requests:
            generator.check_length(model, max(len(request.ids) for request in requests))

        dummy = GenerationRequest(np.ones(1, np.int64))
        for call in range(world.largest_share(len(batches))):
            batch: list[int] = []
            if call < len(own_batches):
                batch = own_batches[call]

            # A worker that has fewer batches than others may leave out the call, unless each
            # forward pass in it needs all workers.
            if not batch and not synced:
                continue
            own_requests = [requests[number] for number in batch] or [dummy]
            texts = generator.generate_batch(model, own_requests, synced, on_progress)

            # Not strict: the text of the dummy request belongs to no number.
            own_texts |= zip(batch, texts, strict=False)

    all_texts: dict[int, list[list[int]]] = {}
    for part in collectives.all_gather(own_texts):
        all_texts |= part

    return [all_texts[number] for number in range(len(requests))]


class HeldOutGenerator:
    """Collects held-out samples as they are evaluated, then generates text for their prompts."""

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        """Assign only."""
        self._section = config.evaluation
        self._tokenizer = tokenizer
        self._is_encoder_decoder = task_class(config.task.name).keeps_texts_apart
        self._samples: list[HeldOutSample] = []

    @classmethod
    def from_config(cls, config: RunConfig, tokenizer: Any) -> HeldOutGenerator | None:
        """Return a generator as the config says; None if evaluations generate no text."""
        if not config.evaluation.decoding.max_new_tokens:
            return None
        return cls(config, tokenizer)

    def collect(self, batch: Batch) -> None:
        """Add the samples of a batch that is evaluated."""
        self._samples += iterate_samples(batch, self._is_encoder_decoder)

    def take_samples(self, collectives: Collectives) -> list[HeldOutSample]:
        """Return the samples that all workers collected since the last call; a collective call.

        Ordered by id, the first evaluation.generate_samples of them (0: all).
        """

        def first(samples: list[HeldOutSample]) -> list[HeldOutSample]:
            most = self._section.generate_samples or None
            return sorted(samples, key=lambda sample: sample.sample)[:most]

        # Each worker sends no more than are taken in the end. Which those are does not depend on
        # the worker that holds them, so it is the same at every world size.
        own_first = first(self._samples)
        self._samples = []

        all_first: list[HeldOutSample] = []
        for part in collectives.all_gather(own_first):
            all_first += part

        return first(all_first)

    def generate(
        self,
        engine: Engine,
        world: World,
        collectives: Collectives,
        on_progress: Callable[[], None],
    ) -> ScoredGenerations:
        """Generate text for the collected samples and score it; a collective call."""
        samples = self.take_samples(collectives)
        return self.generate_for(samples, engine, world, collectives, on_progress)

    def generate_for(
        self,
        samples: Sequence[HeldOutSample],
        engine: Engine,
        world: World,
        collectives: Collectives,
        on_progress: Callable[[], None] = lambda: None,
        decoding: DecodingSection | None = None,
    ) -> ScoredGenerations:
        """Generate text for `samples` and score it; a collective call.

        `decoding`: a strategy other than the config's.
        """
        from dist_ft.model.generation import GenerationRequest, TextGenerator

        # Random draws follow from the id of a sample, whatever batch it is in.
        section = decoding or self._section.decoding
        generator = TextGenerator(section, self._tokenizer, self._end_tokens(samples))
        requests = [GenerationRequest(sample.prompt, sample.sample) for sample in samples]
        token_ids = generate_distributed(
            generator, engine, requests, world, collectives, on_progress
        )

        texts: list[list[str]] = []
        num_tokens = 0
        for sample_ids in token_ids:
            texts.append([generator.decode_text(ids) for ids in sample_ids])
            num_tokens += sum(len(ids) for ids in sample_ids)

        # Of several generations of a sample only the first is scored: otherwise the metrics of
        # strategies with and without several could not be compared.
        references = [generator.decode_text(sample.target.tolist()) for sample in samples]
        metrics = text_scores.compute_text_metrics(
            self._section.text_metrics,
            [generated[0] for generated in texts],
            references,
            self._section.text_tokenizer,
        )

        generations = []
        for sample, reference, generated in zip(samples, references, texts, strict=True):
            generation = Generation(
                sample=sample.sample,
                prompt=generator.decode_text(sample.prompt.tolist()),
                reference=reference,
                text=generated[0],
            )
            if len(generated) > 1:
                generation["others"] = generated[1:]
            generations.append(generation)

        kept = generations[: self._section.keep_generations]
        return ScoredGenerations(metrics, kept, num_tokens)

    def _end_tokens(self, samples: Sequence[HeldOutSample]) -> set[int]:
        """Return the special token that ends every reference, such as a template's end of turn.

        Empty if they end differently.
        """
        # An ordinary token would stop generations wherever it occurs first. Targets that end
        # differently have no common end: some may be truncated.
        ends = {int(sample.target[-1]) for sample in samples if len(sample.target)}
        is_special = ends <= set(self._tokenizer.all_special_ids)
        if len(ends) == 1 and is_special:
            return ends
        return set()


def iterate_samples(batch: Batch, is_encoder_decoder: bool) -> Iterator[HeldOutSample]:
    """Yield the samples in a batch, however they are packed.

    Only the first segment of a sample counts. The labels of an encoder-decoder are the target's own
    tokens, else they are the tokens that follow.
    """
    # Segments (N, 4) are in the order of the rows. Which row each is in follows from the number of
    # tokens of each row, in `row_sources` (R, 2).
    row, start = 0, 0  # where the next segment starts
    for sample, first, size, _ in batch.segments.tolist():
        if start == batch.row_sources[row, 1]:
            row, start = row + 1, 0

        ids = batch.input_ids[row, start : start + size]  # (size,)
        labels = batch.target_ids[row, start : start + size]  # (size,)
        start += size

        # A sample that was split has its prompt in its first segment only.
        targets = np.flatnonzero(labels != IGNORE_INDEX)
        if first or not len(targets):
            continue

        # The first run of labels is the target. One more position without a label gives a target
        # at the end of the segment a stop.
        target_start = int(targets[0])
        followed = np.append(labels[target_start:], IGNORE_INDEX)
        target_stop = target_start + int((followed == IGNORE_INDEX).argmax())

        # Where the label of a position is the next token, the first target follows the position.
        prompt_stop = target_start
        if not is_encoder_decoder:
            prompt_stop += 1

        # Copies: views would keep the arrays of whole batches in memory.
        yield HeldOutSample(
            sample, ids[:prompt_stop].copy(), labels[target_start:target_stop].copy()
        )
