"""embedding: vectors that are close for related texts.

Dimensions: B rows of a batch, T tokens of a text, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from dist_ft.config.schema import RunConfig
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import task_rows
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.metrics import task_scores
from dist_ft.metrics.task_scores import TaskScores
from dist_ft.model.model_task import LossAndOutputs, TaskAbility, TaskInputs, TaskModule
from dist_ft.tasks.base import ModelRunner, Task
from dist_ft.tasks.inference_rows import read_inference_text
from dist_ft.tasks.results import RowResult


class Embedding(Task):
    """Embed texts. Outputs are the vectors of both texts of a row, (B, 2, H)."""

    fields = ("temperature", "pooling")
    metrics = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")
    virtual_token_type = "FEATURE_EXTRACTION"
    auto_class = "AutoModel"
    ability = TaskAbility("embed texts")
    uses_pooler = False
    keeps_texts_apart = True

    @override
    @classmethod
    def check(cls, config: RunConfig) -> Iterator[str]:
        if config.batch.micro_batch < 2:
            yield (
                f"batch.micro_batch={config.batch.micro_batch}: task.name=embedding compares each "
                "text with the others of its micro-batch. At least 2 are needed, more are better. "
                "Raise it."
            )

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        """Return two texts that belong together."""
        columns = self.columns
        text = task_rows.read_text(row, columns.text, "text", location)
        positive = task_rows.read_text(row, columns.pair or "positive", "pair", location)
        return Sample(text, positive)

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        import torch

        from dist_ft.model.losses import loss_sums

        first = model.embed_texts(inputs.ids, inputs.mask)  # (B, H)
        second = model.embed_texts(inputs.second_ids, inputs.second_mask)
        has_labels = (inputs.labels != IGNORE_INDEX).any(1)
        loss = loss_sums.contrastive(first, second, has_labels, self.section.temperature)
        return LossAndOutputs(loss, torch.stack([first, second], 1))

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Return the vectors (H,) of both texts."""
        return RowResult(output[0], output[1])

    @override
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        return task_scores.embedding(np.array(expected), np.array(predicted))

    @override
    def predict(self, model: ModelRunner, rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
        from dist_ft.model.task_models import pool_hidden_states

        texts = [read_inference_text(row, self.columns.text) for row in rows]
        encoded = model.encode(texts)
        outputs = model.forward(encoded)
        hidden = model.without_virtual(outputs.last_hidden_state).float().cpu()  # (B, T, H)
        vectors = pool_hidden_states(hidden, encoded["attention_mask"], self.section.pooling)
        for vector in (vectors / vectors.norm(dim=1, keepdim=True)).tolist():
            yield {"embedding": vector}
