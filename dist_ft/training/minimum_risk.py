"""What minimum risk training learns from in a step: texts drawn from the model as it is, beside the reference.

Which texts are drawn follows from the weights and (seed, step, lane, row), whichever worker draws them, so a resumed
step draws the same. Every worker makes the same number of calls of `generate`, one a lane (empty lanes too), for under
ZeRO-3 each is a collective call. Between engines, whose weights differ by rounding, a draw that rounding decides may
come out otherwise; then losses differ by more than rounding from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.core.seeds import (
    derive_seed,
)
from dist_ft.core.world import Collectives
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.data.batching.loader import assemble_batch
from dist_ft.engine.base import Engine
from dist_ft.metrics import text_scores
from dist_ft.training.held_out_generation import HeldOut, samples_of

if TYPE_CHECKING:
    from dist_ft.model.generation import TextGenerator

OF_A_HUNDRED = ("bleu", "chrf")


class MinimumRisk:
    """Turns the batches of a step into rows of drawn texts with their risks."""

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        """Assign only."""
        self._section, self._seed = config.task.risk, config.run.seed
        self._tokenizer = tokenizer
        self._both = config.task.name == "seq2seq"
        self._cut = config.evaluation.text_tokenizer

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Any) -> MinimumRisk | None:
        """Return one if the config minimises risk."""
        return cls(config, tokenizer) if config.task.objective == "minimum_risk" else None

    def prepare(
        self,
        batches: Sequence[Batch],
        step: int,
        engine: Engine,
        collectives: Collectives,
        beat: Callable[[], None],
    ) -> tuple[list[Batch], int]:
        """Return a batch of texts for each of `batches`, and the number of samples in all workers' ones.

        A collective call, with as many batches on every worker.
        """
        from dist_ft.model.generation import GenerationRequest, TextGenerator

        found: list[Batch] = []
        section, every = self._section, [list(samples_of(batch, self._both)) for batch in batches]
        told = collectives.all_gather(
            (
                sum(map(len, every)),
                max([len(one.prompt) for own in every for one in own], default=1),
            )
        )
        with engine.generation_mode() as (model, synced):
            for batch, samples in zip(batches, every, strict=True):
                # what ends a text ends the references too; where they end otherwise, they were cut
                ends = {int(one.target[-1]) for one in samples} & set(
                    self._tokenizer.all_special_ids
                )
                decoder = TextGenerator(
                    DecodingSection(
                        max_new_tokens=section.max_new_tokens,
                        strategy="sample",
                        temperature=section.temperature,
                        num_samples=section.candidates,
                        seed=self._seed,
                    ),
                    self._tokenizer,
                    ends,
                )
                decoder.require_room(
                    model, max(longest for _, longest in told)
                )  # of all, as all must know
                asked = [
                    GenerationRequest(one.prompt, derive_seed(step, batch.lane, row)) for row, one in enumerate(samples)
                ]
                made: list[list[list[int]]] = []
                if asked or synced:
                    made = decoder.make(
                        model, asked or [GenerationRequest(np.ones(1, np.int64))], synced, beat, with_end=True
                    )
                found.append(self._texts(batch, samples, made, decoder) if samples else batch)
        return found, sum(count for count, _ in told)

    def _texts(
        self,
        batch: Batch,
        samples: Sequence[HeldOut],
        made: Sequence[Sequence[Sequence[int]]],
        decoder: TextGenerator,
    ) -> Batch:
        """Return the rows of a lane: of each sample the reference, then the different texts drawn."""
        from dist_ft.model.minimum_risk import RiskBatch

        tokens, learned, risks, groups = [], [], [], []
        for group, (sample, drawn) in enumerate(zip(samples, made, strict=True)):
            reference = tuple(sample.target.tolist())
            wanted = decoder.text(reference)
            for text in dict.fromkeys([reference, *(tuple(one) for one in drawn if one)]):
                tokens.append(np.array([*sample.prompt.tolist(), *text], np.int32))
                before = np.full(len(sample.prompt), IGNORE_INDEX if self._both else 0)
                own = text if self._both else np.ones(len(text))
                learned.append(
                    np.concatenate([before, own]).astype(np.int32 if self._both else np.uint8)
                )
                risks.append(0.0 if text == reference else self.risk(decoder.text(text), wanted))
                groups.append(group)
        sizes = [len(row) for row in tokens]
        segments = np.zeros((len(sizes), 4), np.int64)
        segments[:, 0], segments[:, 2] = [samples[group].sample for group in groups], sizes
        rows = assemble_batch(
            np.concatenate(tokens),
            np.concatenate(learned),
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

    def risk(self, text: str, reference: str) -> float:
        """Return the risk of a text: 1 - its metric (of 0 to 1), or its token error rate."""
        metric = self._section.metric
        value = text_scores.score(metric, text, reference, self._cut)
        return (
            value
            if metric == "token_error_rate"
            else 1 - value / (100 if metric in OF_A_HUNDRED else 1)
        )
