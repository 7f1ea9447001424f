"""The batches of minimum risk training: text sampled from the model, and references.

Which text is sampled follows from the weights and (seed, step, lane, row), on whichever worker, so
that a resumed step samples the same. Every worker makes the same number of calls of `generate`, one
for each lane (empty lanes too), for under ZeRO-3 each is a collective call. Between engines, whose
weights differ by rounding, a sample that rounding decides may differ; from there on losses differ
by more than rounding.

Dimensions: R rows (a prompt and a text each) with L tokens in all, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.config.task_facts import task_class
from dist_ft.core.seeds import derive_seed
from dist_ft.core.world import Collectives
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.data.batching.assemble import assemble_batch
from dist_ft.engine.base import Engine
from dist_ft.metrics import text_scores
from dist_ft.training.held_out_generation import HeldOutSample, iterate_samples

if TYPE_CHECKING:
    from dist_ft.model.generation import TextGenerator

METRICS_UP_TO_100 = ("bleu", "chrf")
"""Metrics of 0 to 100; the others are 0 to 1."""


class RiskBatches(NamedTuple):
    """The batches of a worker's lanes, and the number of samples on all workers."""

    batches: list[Batch]
    num_samples: int


class MinimumRisk:
    """Turns the batches of a step into rows of sampled text with their risks."""

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        """Assign only."""
        self._section = config.task.risk
        self._seed = config.run.seed
        self._tokenizer = tokenizer
        self._is_encoder_decoder = task_class(config.task.name).keeps_texts_apart
        self._text_tokenizer = config.evaluation.text_tokenizer

    @classmethod
    def from_config(cls, config: RunConfig, tokenizer: Any) -> MinimumRisk | None:
        """Return an instance if the config minimizes risk, else None."""
        if config.task.objective != "minimum_risk":
            return None
        return cls(config, tokenizer)

    def prepare(
        self,
        batches: Sequence[Batch],
        step: int,
        engine: Engine,
        collectives: Collectives,
        on_progress: Callable[[], None],
    ) -> RiskBatches:
        """Return a batch of sampled text for each of `batches`.

        A collective call, with the same number of batches on every worker.
        """
        samples_by_lane: list[list[HeldOutSample]] = []
        own_count, own_longest = 0, 1
        for batch in batches:
            samples = list(iterate_samples(batch, self._is_encoder_decoder))
            samples_by_lane.append(samples)
            own_count += len(samples)
            own_longest = max([own_longest, *(len(sample.prompt) for sample in samples)])

        # The loss is a mean over all samples of the step, so every worker needs their number.
        num_samples, longest = 0, 1
        for count, length in collectives.all_gather((own_count, own_longest)):
            num_samples += count
            longest = max(longest, length)

        risk_batches: list[Batch] = []
        with engine.generation_mode() as (model, synced):
            for batch, samples in zip(batches, samples_by_lane, strict=True):
                # The longest prompt of all workers is checked, so that all raise the error.
                generator = self._generator(samples)
                generator.check_length(model, longest)

                # Seeds follow from the lane, which other workers may have after a restart.
                seed = (step, batch.lane)
                texts = self._sample_texts(generator, model, samples, seed, synced, on_progress)

                # An empty lane stays as it is: its loss has no weight.
                if samples:
                    batch = self._risk_batch(batch, samples, texts, generator)
                risk_batches.append(batch)

        return RiskBatches(risk_batches, num_samples)

    def _generator(self, samples: Sequence[HeldOutSample]) -> TextGenerator:
        """Return what samples text for the prompts of a lane."""
        from dist_ft.model.generation import TextGenerator

        # Generations end with the special tokens that end references; a reference that ends with
        # another token was truncated.
        ends = {int(sample.target[-1]) for sample in samples}
        decoding = DecodingSection(
            max_new_tokens=self._section.max_new_tokens,
            strategy="sample",
            temperature=self._section.temperature,
            num_samples=self._section.candidates,
            seed=self._seed,
        )
        return TextGenerator(decoding, self._tokenizer, ends & set(self._tokenizer.all_special_ids))

    def _sample_texts(
        self,
        generator: TextGenerator,
        model: Any,
        samples: Sequence[HeldOutSample],
        seed: tuple[int, int],
        synced: bool,
        on_progress: Callable[[], None],
    ) -> list[list[list[int]]]:
        """Return several token lists for each sample of a lane; `seed`: (step, lane)."""
        from dist_ft.model.generation import GenerationRequest

        requests = [
            GenerationRequest(sample.prompt, derive_seed(*seed, row))
            for row, sample in enumerate(samples)
        ]
        if not requests and not synced:
            return []

        # A worker whose lane is empty generates for a dummy request, to make the same calls as the
        # others. End tokens are kept, because the model is trained to write them.
        dummy = GenerationRequest(np.ones(1, np.int64))
        return generator.generate_batch(
            model, requests or [dummy], synced, on_progress, include_end=True
        )

    def _risk_batch(
        self,
        batch: Batch,
        samples: Sequence[HeldOutSample],
        sampled: Sequence[Sequence[Sequence[int]]],
        generator: TextGenerator,
    ) -> Batch:
        """Return the rows of a lane: for each sample the reference, then the distinct texts."""
        from dist_ft.model.minimum_risk import RiskBatch

        tokens, labels, risks, groups = [], [], [], []
        for group, (sample, texts) in enumerate(zip(samples, sampled, strict=True)):
            reference = tuple(sample.target.tolist())
            reference_text = generator.decode_text(reference)

            # The keys of a dict: each text once and in order, as a text that was sampled twice
            # must not count twice. The reference comes first, where the likelihood finds it.
            candidates = {reference: None}
            for ids in texts:
                if ids:
                    candidates[tuple(ids)] = None

            for text in candidates:
                tokens.append(np.array([*sample.prompt.tolist(), *text], np.int32))
                labels.append(self._labels(len(sample.prompt), text))
                risk = 0.0
                if text != reference:
                    risk = self.compute_risk(generator.decode_text(text), reference_text)
                risks.append(risk)
                groups.append(group)

        # One segment a row, which starts at token 0 of its sample.
        sizes = [len(row) for row in tokens]
        segments = np.zeros((len(sizes), 4), np.int64)  # (R, 4)
        segments[:, 0] = [samples[group].sample for group in groups]
        segments[:, 2] = sizes
        rows = assemble_batch(
            np.concatenate(tokens),  # (L,)
            np.concatenate(labels),  # (L,)
            segments,
            np.arange(len(sizes)),
            batch.lane,
        )
        return RiskBatch(
            rows.input_ids,
            rows.target_ids,
            rows.position_ids,
            segments,
            batch.lane,
            risks=np.array(risks, np.float32),
            groups=np.array(groups, np.int64),
        )

    def _labels(self, prompt_length: int, text: Sequence[int]) -> np.ndarray:
        """Return the labels of a row (T,): target ids of an encoder-decoder, else a mask."""
        # `assemble_batch` distinguishes the two by their type.
        if self._is_encoder_decoder:
            no_targets = np.full(prompt_length, IGNORE_INDEX)
            return np.concatenate([no_targets, text]).astype(np.int32)

        is_target = np.zeros(prompt_length + len(text), np.uint8)
        is_target[prompt_length:] = 1
        return is_target

    def compute_risk(self, text: str, reference: str) -> float:
        """Return the risk of a text: 1 - its metric (scaled to 0..1), or its token error rate."""
        metric = self._section.metric
        value = text_scores.compute_text_metric(metric, text, reference, self._text_tokenizer)
        # An error rate is a risk already; it may exceed 1.
        if metric == "token_error_rate":
            return value

        if metric in METRICS_UP_TO_100:
            return 1 - value / 100
        return 1 - value
