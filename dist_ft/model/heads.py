"""Which transformers class does a task, what its head is, and how a new head begins.

A head is what lies outside the base model. A new one is drawn by the run's seed and the weight's own name, so every
engine and world begins with the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

from dist_ft.config.sections.task import LABELLED, TaskSection
from dist_ft.core.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "multi_label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked_lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
}
WHAT = {
    "causal_lm": ("continue text", "causal language models"),
    "sequence_classification": ("classify texts", ""),
    "multi_label": ("classify texts", ""),
    "regression": ("score texts", ""),
    "token_classification": ("tag words", ""),
    "question_answering": ("mark answers", ""),
    "seq2seq": ("make a text from a text", "encoder-decoders"),
    "masked_lm": ("tell masked tokens", "encoders such as BERT"),
    "embedding": ("embed texts", ""),
}
"""What a task does, and which models can, where that is a kind of its own."""
OFFSET_POSITION_MODELS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "xmod",
    "mra",
)
"""Types of models whose first place is pad_token_id + 1."""
TASKS_WITH_HEAD = (*LABELLED, "regression", "question_answering", "masked_lm")
"""Tasks whose head is their own: it always learns."""


def auto_class(task: TaskSection) -> Any:
    """Return the transformers class that does `task`."""
    import transformers

    return getattr(transformers, AUTO_CLASSES[task.name])


def supports_task(config: PretrainedConfig, task: TaskSection) -> bool:
    """Tell whether a model of this config can do `task`."""
    if type(config) not in auto_class(task)._model_mapping:
        return False
    both = bool(getattr(config, "is_encoder_decoder", False))
    if task.name == "causal_lm":
        return not (both or _sees_what_follows(config))
    return both if task.name == "seq2seq" else not both


def longest_input(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model of this config can take; None: it names no limit.

    RoBERTa and its kind count places from the pad token's number on, so that 514 of them are 512 tokens.
    """
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(inner, "max_position_embeddings", None)
    if longest and inner.model_type in OFFSET_POSITION_MODELS:
        return int(longest) - int(inner.pad_token_id if inner.pad_token_id is not None else 1) - 1
    return longest


def length_error(config: PretrainedConfig, length: int, path: str, virtual: int = 0) -> str | None:
    """Return what to say if sequences of `length` tokens, behind `virtual` ones, are longer than the model can take."""
    longest = longest_input(config)
    if longest is None or length + virtual <= longest:
        return None
    more = f" with the {virtual} of tuning.prompt.tokens before it" if virtual else ""
    return (
        f"batch.sequence_length={length}: longer{more} than the model can take; at most {longest - virtual} "
        f"(max_position_embeddings of {path}); shorten it, or choose another model"
    )


def unsupported_task_error(config: PretrainedConfig, task: TaskSection) -> str:
    """Return what to say of a model that can not do `task`."""
    what, which = WHAT[task.name]
    return (
        f"a {config.model_type} model can not {what}; {which or 'encoders and causal models of usual kinds'} are "
        f"allowed; choose another model{'' if task.name == 'causal_lm' else ', or another task.name'}"
    )


def _sees_what_follows(config: PretrainedConfig) -> bool:
    """Tell whether this is an encoder, whose attention sees the tokens it should predict.

    transformers lists BERT and its kind as causal models too; they are, if their config says `is_decoder`.
    """
    from transformers import AutoModelForMaskedLM

    return type(config) in AutoModelForMaskedLM._model_mapping and not getattr(
        config, "is_decoder", False
    )


def set_labels(config: PretrainedConfig, task: TaskSection, path: str) -> None:
    """Give a config the labels of `task`, in place.

    Raises ModelError if the model in `path` has a head of the same kind for other labels.
    """
    if task.name == "question_answering":
        config.num_labels = (
            2  # where an answer begins, and where it ends; a folder may have had a head for others
        )
    if task.name not in LABELLED and task.name != "regression":
        return
    labels = task.labels if task.name in LABELLED else ("score",)
    own = [label for _, label in sorted((config.id2label or {}).items())]
    kind = AUTO_CLASSES[task.name].removeprefix("AutoModel")
    if (
        has_head(config, task)
        and task.name in LABELLED
        and own != list(labels)
        and not task.new_head
    ):
        raise ModelError(
            f"task.labels: the model in model.path={path} has a head for {_some(own)}, and the labels are "
            f"{_some(labels)}; the same in the same order are allowed; set task.labels so, or "
            f"task.new_head=true to begin a new {kind} head"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    if AUTO_CLASSES[task.name].endswith("SequenceClassification"):
        config.problem_type = {  # type: ignore[assignment]
            "multi_label": "multi_label_classification",
            "regression": "regression",
        }.get(task.name, "single_label_classification")


def has_head(config: PretrainedConfig, task: TaskSection) -> bool:
    """Tell whether a model's files hold a head of the kind `task` needs."""
    kind = AUTO_CLASSES[task.name].removeprefix("AutoModel")
    return any(name.endswith(kind) for name in config.architectures or ())


def is_outside_base_model(name: str, model: PreTrainedModel) -> bool:
    """Tell whether a weight belongs to no part of the base model."""
    prefix = model.base_model_prefix
    return bool(prefix) and hasattr(model, prefix) and not name.startswith(f"{prefix}.")


def is_head(name: str, model: PreTrainedModel) -> bool:
    """Tell whether a weight is a head's, or of the pooler, which only feeds one and is often new with it."""
    return is_outside_base_model(name, model) or ".pooler." in f".{name}"


def may_be_new(name: str, model: PreTrainedModel, task: TaskSection) -> bool:
    """Tell whether a weight may be absent from a model's files: that of a new head."""
    return task.name not in ("causal_lm", "seq2seq") and is_head(name, model)


def initialize_new_weights(
    slots: Callable[[], Iterable[Any]],
    new: Set[str],
    shapes: Mapping[str, tuple[int, ...]],
    config: PretrainedConfig,
    seed: int,
) -> None:
    """Write the first values of the weights `new` into an engine's slots: each rank the elements it holds.

    `slots` iterates over them; `shapes` are those of whole weights. None of them has an adapter: a head learns itself.
    """
    std = float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)
    for slot in slots() if new else ():
        if slot.name in new and slot.key in ("param", "frozen"):
            whole = initial_values(slot.name, shapes[slot.name], std, seed).reshape(-1)
            slot.write(whole[slot.offset : slot.offset + slot.numel])


def initial_values(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    """Return how a new weight begins, float32: matrices normal, biases 0, scales of norms 1."""
    import torch

    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * std


def _some(labels: Any, most: int = 6) -> str:
    return ", ".join(labels[:most]) + (f", ... ({len(labels)})" if len(labels) > most else "")
