"""What models need of a task: the class of the model, its head and its loss.

Dimensions: B rows of a batch, T tokens of a row (T1 and T2 of its first and second text), H hidden
size, V vocabulary size, K labels, N tokens or masked positions of a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

from dist_ft.config.sections.task import TaskSection
from dist_ft.config.task_facts import task_class
from dist_ft.data.encoding.data_task import DataTask

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class TaskInputs(NamedTuple):
    """Tensors of one batch of a task.

    Attributes:
        ids: (B, T) token ids, padded on the right; of two texts a row the first, (B, T1).
        mask: int64, shape of `ids`: 1 where a token is, 0 in the padding.
        labels: (B, T) labels as the task encodes them, or `IGNORE_INDEX`; of two texts a row (B,
            T2).
        second_ids: (B, T2) the second text of each row (seq2seq: the target; embedding: the other
            text).
        second_mask: (B, T2) int64, as `mask`.
        positions: masked_lm: (N,) indices into B*T of the masked tokens.
    """

    ids: Any
    mask: Any
    labels: Any
    second_ids: Any = None
    second_mask: Any = None
    positions: Any = None


class LossAndOutputs(NamedTuple):
    """Result of a forward.

    Attributes:
        loss: summed over the samples or tokens of the batch, float32 ().
        outputs: predictions of the model (logits, scores, token ids or vectors), rows first.
    """

    loss: torch.Tensor
    outputs: torch.Tensor


class TaskModule(Protocol):
    """The module around a model (`TaskModel`), as the loss of a task uses it."""

    @property
    def smoothing(self) -> float:
        """Label smoothing of this forward: in training only."""

    def run_model(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """Return the model's output for `ids` (B, T), with the virtual tokens in front, if any."""

    def drop_virtual_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` (B, T, ...) of each token, without the virtual tokens in front."""

    def weighted_cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of logits (N, K) to targets (N,), summed."""

    def run_encoder_decoder(self, inputs: TaskInputs) -> torch.Tensor:
        """Return the logits (B, T2, V) of the second texts."""

    def embed_texts(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the vectors (B, H) of texts (B, T)."""


class TaskAbility(NamedTuple):
    """Words of an error message about a task.

    Attributes:
        action: what a model of the task does.
        models: the kind of models that can do it.
    """

    action: str
    models: str = "encoders and causal models of usual kinds"


class ModelTask(DataTask):
    """How a model does a task."""

    auto_class: ClassVar[str]
    """Name of the transformers class."""
    ability: ClassVar[TaskAbility] = TaskAbility("do the task")
    problem_type: ClassVar[str | None] = None
    """Of a sequence classification model's config; None: `regression` if it has one output."""
    head_outputs: ClassVar[tuple[str, ...]] = ()
    """Names of the head's outputs, for tasks without labels."""
    weights_are_complete: ClassVar[bool] = False
    """The files of a model must hold all its weights; else its head may be new."""
    uses_pooler: ClassVar[bool] = True
    """Something uses the pooler of an encoder; else it is left out."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the head's outputs (K,); empty: the model's config does not name them."""
        return self.labels if self.has_labels else self.head_outputs

    @classmethod
    def accepts(cls, is_encoder_decoder: bool, is_encoder: bool) -> bool:
        """Return whether a model of this kind can do the task.

        Args:
            is_encoder_decoder: it has an encoder and a decoder.
            is_encoder: its attention sees the tokens after a position.
        """
        return not is_encoder_decoder

    def configure(self, config: PretrainedConfig) -> None:
        """Set what else the task needs in a model's config, in place."""

    def check_model_config(self, config: PretrainedConfig) -> None:
        """Raise ModelError if the config lacks something that the loss needs."""

    @abstractmethod
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        """Return the loss, summed over rows or tokens, and the outputs of each row.

        Rows and tokens whose label is `IGNORE_INDEX` must not count. `model` has the methods that
        run it: `run_model`, `drop_virtual_tokens`, `weighted_cross_entropy`.
        """


def model_task(section: TaskSection) -> ModelTask:
    """Return the task of a section."""
    return cast("ModelTask", task_class(section.name)(section))
