"""Texts made by all workers together, and those of held-out samples, scored.

Each text is made once, whoever makes it, and is the same at every world size (`model.decoding`); batches are dealt in
turn, those of like length to all workers at once. Where forward is a collective call (ZeRO-3) every worker makes the
same number of calls of `generate`, of a text of no weight where it has none left, and no call ends before all can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_ft.config.schema import RunConfig
from dist_ft.core.world import Collectives, World
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.engine.base import Engine
from dist_ft.metrics import text_scores

if TYPE_CHECKING:
    from dist_ft.model.generation import GenerationRequest, TextGenerator


@dataclass(frozen=True)
class HeldOutSample:
    """A held-out sample: what stands before its first target, and its target.

    Attributes:
        sample: its number.
        prompt: (T,) token ids.
        target: token ids; of a chat with several answers the first.
    """

    sample: int
    prompt: np.ndarray
    target: np.ndarray


def generate_distributed(
    decoder: TextGenerator,
    engine: Engine,
    rows: Sequence[GenerationRequest],
    world: World,
    collectives: Collectives,
    beat: Callable[[], None] = lambda: None,
) -> list[list[list[int]]]:
    """Return the texts of `rows`, as `TextGenerator.generate_all`, on all workers; a collective call with the same rows on all.

    `beat` is called for each token.
    """
    from dist_ft.model.generation import GenerationRequest

    batches = decoder.split_into_batches(rows)
    mine = batches[world.rank :: world.num_ranks]
    found: dict[int, list[list[int]]] = {}
    with engine.generation_mode() as (model, synced):
        if rows:  # on all workers, as all must know
            decoder.check_length(model, max(len(row.ids) for row in rows))
        for call in range(world.largest_share(len(batches))):
            own = mine[call] if call < len(mine) else []
            if own or synced:
                texts = decoder.generate_batch(
                    model,
                    [rows[number] for number in own] or [GenerationRequest(np.ones(1, np.int64))],
                    synced,
                    beat,
                )
                found |= zip(own, texts, strict=False)
    every = {
        number: texts for part in collectives.all_gather(found) for number, texts in part.items()
    }
    return [every[number] for number in range(len(rows))]


class HeldOutGenerator:
    """Gathers held-out samples as they are evaluated, makes texts from their prompts and scores them."""

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        """Assign only."""
        self._section = config.evaluation
        self._tokenizer = tokenizer
        self._both = config.task.name == "seq2seq"
        self._seen: list[HeldOutSample] = []

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Any) -> HeldOutGenerator | None:
        """Return one as the config says; None where no texts are made."""
        return cls(config, tokenizer) if config.evaluation.decoding.max_new_tokens else None

    def see(self, batch: Batch) -> None:
        """Take the samples of a batch that is evaluated."""
        self._seen += iterate_samples(batch, self._both)

    def gather(self, collectives: Collectives) -> list[HeldOutSample]:
        """Return what all workers saw since the last time, in order, the first so many; a collective call."""
        most = self._section.generate_samples or None
        seen, self._seen = sorted(self._seen, key=lambda one: one.sample)[:most], []
        return sorted(
            (one for part in collectives.all_gather(seen) for one in part),
            key=lambda one: one.sample,
        )[:most]

    def scores(
        self, engine: Engine, world: World, collectives: Collectives, beat: Callable[[], None]
    ) -> dict[str, Any]:
        """Return the metrics, and under `texts` the first of them with prompts and references; a collective call."""
        return self.told(self.gather(collectives), engine, world, collectives, beat)[0]

    def told(
        self,
        samples: Sequence[HeldOutSample],
        engine: Engine,
        world: World,
        collectives: Collectives,
        beat: Callable[[], None] = lambda: None,
        section: Any = None,
    ) -> tuple[dict[str, Any], int]:
        """Return what `scores` does for `samples`, and how many tokens were made; `section`: another strategy."""
        from dist_ft.model.generation import GenerationRequest, TextGenerator

        decoder = TextGenerator(section or self._section.decoding, self._tokenizer, self._ends(samples))
        asked = [GenerationRequest(one.prompt, one.sample) for one in samples]
        made = generate_distributed(decoder, engine, asked, world, collectives, beat)
        texts = [[decoder.decode_text(ids) for ids in each] for each in made]
        references = [decoder.decode_text(one.target.tolist()) for one in samples]
        found: dict[str, Any] = text_scores.compute_text_metrics(
            self._section.text_metrics,
            [each[0] for each in texts],
            references,
            self._section.text_tokenizer,
        )
        kept = [
            {
                "sample": one.sample,
                "prompt": decoder.decode_text(one.prompt.tolist()),
                "reference": reference,
                "text": each[0],
                **({"others": each[1:]} if each[1:] else {}),
            }
            for one, reference, each in zip(samples, references, texts, strict=True)
        ]
        num_tokens = sum(len(ids) for each in made for ids in each)
        return {**found, "texts": kept[: self._section.keep_generations]}, num_tokens

    def _ends(self, samples: Sequence[HeldOutSample]) -> set[int]:
        """Return the special token that ends every reference (such as a template's end of turn), if there is one."""
        ends = {int(one.target[-1]) for one in samples if len(one.target)}
        return ends if len(ends) == 1 and ends <= set(self._tokenizer.all_special_ids) else set()


def iterate_samples(batch: Batch, both: bool) -> Iterator[HeldOutSample]:
    """Yield the samples in a batch, however they are packed; a part of a sample that goes on with another is left out.

    With `both` (an encoder-decoder) labels are the target's own tokens, else the tokens that follow.
    """
    row, at = 0, 0
    for sample, first, size, _ in batch.segments.tolist():
        if at == batch.row_sources[row, 1]:
            row, at = row + 1, 0
        ids, labels = (array[row, at : at + size] for array in (batch.input_ids, batch.target_ids))
        at += size
        wanted = np.flatnonzero(labels != IGNORE_INDEX)
        if first or not len(wanted):
            continue
        start = int(wanted[0])
        stop = start + int((np.append(labels[start:], IGNORE_INDEX) == IGNORE_INDEX).argmax())
        yield HeldOutSample(sample, ids[: start + (not both)].copy(), labels[start:stop].copy())
