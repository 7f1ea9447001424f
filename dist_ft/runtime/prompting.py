"""Models asked for labels by prompts: their examples, and the model of a folder that was trained to be asked so.

Examples of few-shot prompts are drawn from the training data once and kept with the run: the same on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_ft.config.schema import DataSection, PromptingSection, RunConfig, TaskSection
from dist_ft.data import prompts, readers, task_rows
from dist_ft.data.batch import IGNORED
from dist_ft.data.source import Row, resolve
from dist_ft.data.task_rows import Sample
from dist_ft.errors import DataError
from dist_ft.storage import Store
from dist_ft.world import Collectives, World, on_rank0

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = "data/examples.json"


class Prompted:
    """A causal model that is asked for the label of texts, as it was in training."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: TaskSection,
        prompting: PromptingSection,
        length: int,
    ) -> None:
        """Wrap a loaded model; `prompting` has its examples in its templates, `length` is the longest prompt's."""
        from dist_ft.data.prompted import PromptEncoder
        from dist_ft.model.prompted import PromptModel
        from dist_ft.model.task_models import SpecialTokens

        data = DataSection.model_validate({"train": "unused", "overlong": "truncate"})
        self._encoder = PromptEncoder(tokenizer, data, task, prompting, length)
        self._model = PromptModel(
            model, task, SpecialTokens.of(tokenizer, model.config), self._encoder.words(), length
        )
        self._model.eval()

    def scores(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """Return the score of each label (B, K) of texts, and second ones if there are any."""
        import torch

        samples = [
            Sample(*both)
            for both in (zip(texts, pairs, strict=True) if pairs else zip(texts, strict=True))
        ]
        found = self._encoder.prompts(samples)
        if None in found:
            raise DataError(
                "prompting.templates: leave no room for a text in the model's sequence length; shorter "
                "ones are needed; show fewer examples"
            )
        rows = [torch.tensor(ids or []) for ids in found]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._model.model.device)
        sizes = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]).long()
        with torch.inference_mode():
            _, told = self._model(ids, mask, torch.full_like(ids, IGNORED), told=True)
        return told.float().cpu().numpy()


def with_examples(
    config: RunConfig, store: Store, world: World, collectives: Collectives
) -> RunConfig:
    """Return the config with its examples written into its templates; a collective call.

    The labels must be known. Raises DataError for a training row that can not be used (under data.bad_rows=error).
    """
    section = config.prompting
    if section.method != "likelihood" or not section.shots:
        return config
    templates = tuple(on_rank0(world, collectives, lambda: _kept(config, store)))
    return config.model_copy(
        update={"prompting": section.model_copy(update={"templates": templates, "shots": 0})}
    )


def _kept(config: RunConfig, store: Store) -> list[str]:
    """Return the templates the run began with; if it has not begun, make and keep them (rank 0 only)."""
    if store.exists(KEPT):
        return list(json.loads(store.read(KEPT)))
    section, labels = config.prompting, config.task.labels
    shown = examples(config, section.shots)
    found = [
        prompts.few_shot(
            template,
            [prompts.answered(template, sample, labels, section) for sample in shown],
            section.separator,
        )
        for template in section.templates
    ]
    store.write(KEPT, json.dumps(found, ensure_ascii=False).encode())
    return found


def examples(config: RunConfig, count: int) -> list[Sample]:
    """Return `count` rows of the training data, of each label or in all, in an order drawn by prompting.seed."""
    ids = {label: number for number, label in enumerate(config.task.labels)}

    def samples() -> Iterator[tuple[int, Sample]]:
        for url, number, row in rows(config):
            try:
                sample = task_rows.READERS[config.task.name](row, config.task, ids, url, number)
            except DataError:
                if config.data.bad_rows == "error":
                    raise
                continue
            yield sample.label if by_label else 0, sample

    by_label = (
        config.prompting.shots_by == "label" and config.task.name == "sequence_classification"
    )
    found = prompts.draw(samples(), count, config.prompting.seed)
    if not found:
        raise DataError(
            "data.train: has no row that prompting.shots could show; rows with a label are needed; set "
            "data.train, or prompting.shots=0"
        )
    return found


def rows(config: RunConfig) -> Iterator[tuple[str, int, Row]]:
    """Yield (shard, number, row) of the training data that could be decoded and are in scope."""
    outside, column = config.evaluation.robustness.out_of_scope_label, config.task.columns.label
    for shard in (shard for source in resolve(config.data.train) for shard in source):
        for number, row in enumerate(readers.rows_of(shard), 1):
            if isinstance(row, DataError):
                if config.data.bad_rows == "error":
                    raise row
            elif outside is None or str(row.get(column)) != outside:
                yield shard.url, number, row
