"""causal_lm: continue text, answer, chat.

Rows are read as data.format says and the loss is computed in chunks of the vocabulary, so encoder
and module are those of `data.encoding.chat` and `model.causal_lm`, not the methods here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from typing_extensions import override

from dist_ft.config.schema import RunConfig
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.metrics.task_scores import TaskScores
from dist_ft.model.model_task import LossAndOutputs, TaskAbility, TaskInputs, TaskModule
from dist_ft.tasks.base import Task
from dist_ft.tasks.results import RowResult


class CausalLMTask(Task):
    """Continue text."""

    metrics = ("perplexity",)
    generates_text = True
    counts_tokens = True
    reads_formats = True
    has_probabilities = True
    virtual_token_type = "CAUSAL_LM"
    adapter_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    ability = TaskAbility("continue text", "causal language models")
    weights_are_complete = True

    @override
    @classmethod
    def check(cls, config: RunConfig) -> Iterator[str]:
        if config.task.objective == "minimum_risk" and config.data.pack:
            yield (
                "task.objective=minimum_risk: a row has one prompt and one generation, so samples "
                "cannot be packed. Set data.pack=false."
            )

    @override
    @classmethod
    def accepts(cls, is_encoder_decoder: bool, is_encoder: bool) -> bool:
        return not (is_encoder_decoder or is_encoder)

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        self._not_used()

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        self._not_used()

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        self._not_used()

    @override
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        self._not_used()

    def _not_used(self) -> NoReturn:
        raise NotImplementedError("causal_lm has an encoder and a module of its own")
