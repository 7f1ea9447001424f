"""Task heads: the transformers class of a task, the weights of its head, their initial values.

A head is everything outside the base model. A new head is drawn by the run's seed and the weight's
own name, so every engine and world starts with the same values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import ModelError
from dist_ft.model.model_task import ModelTask, model_task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

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
"""Types of models whose first position is pad_token_id + 1."""
DEFAULT_INIT_STD = 0.02


def auto_class(task: TaskSection) -> Any:
    """Return the transformers class for `task`."""
    import transformers

    name = model_task(task).auto_class
    if not hasattr(transformers, name):
        raise ModelError(
            f"task.name={task.name}: transformers has no class {name}. A class such as "
            "AutoModelForSequenceClassification is needed. Correct auto_class of the task."
        )
    return getattr(transformers, name)


def supports_task(config: PretrainedConfig, task: TaskSection) -> bool:
    """Whether a model of this config can do `task`."""
    if type(config) not in auto_class(task)._model_mapping:
        return False
    is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    return model_task(task).accepts(is_encoder_decoder, _is_encoder(config))


def longest_input(config: PretrainedConfig) -> int | None:
    """Return the most tokens a model of this config accepts; None: it has no limit.

    RoBERTa and similar models count positions from the pad token's id on, so 514 positions hold 512
    tokens.
    """
    inner = config
    if hasattr(config, "get_text_config"):
        inner = config.get_text_config()
    longest = getattr(inner, "max_position_embeddings", None)
    if longest and inner.model_type in OFFSET_POSITION_MODELS:
        pad_id = 1 if inner.pad_token_id is None else int(inner.pad_token_id)
        return int(longest) - pad_id - 1
    return longest


def length_error(
    config: PretrainedConfig, length: int, path: str, num_virtual: int = 0
) -> str | None:
    """Return an error message if sequences are longer than the model accepts, else None.

    Args:
        config: config of the model.
        length: tokens of a sequence.
        path: path of the model, for the message.
        num_virtual: virtual tokens before each sequence.
    """
    longest = longest_input(config)
    if longest is None or length + num_virtual <= longest:
        return None

    with_virtual = ""
    if num_virtual:
        with_virtual = f" with the {num_virtual} virtual tokens of tuning.prompt.tokens before it"
    return (
        f"batch.sequence_length={length}: longer{with_virtual} than the model accepts. At most "
        f"{longest - num_virtual} tokens are allowed (max_position_embeddings of {path}). Lower "
        "it, or choose another model."
    )


def unsupported_task_error(config: PretrainedConfig, task: TaskSection) -> str:
    """Return the error message for a model that cannot do `task`."""
    ability = model_task(task).ability
    remedy = "Choose another model"
    if task.name != "causal_lm":
        remedy += ", or another task.name"
    return (
        f"a {config.model_type} model cannot {ability.action}. Only {ability.models} are allowed. "
        f"{remedy}."
    )


def _is_encoder(config: PretrainedConfig) -> bool:
    """Whether attention sees the tokens it should predict.

    transformers lists BERT and similar models as causal too; they are, if their config sets
    `is_decoder`.
    """
    from transformers import AutoModelForMaskedLM

    is_masked_lm = type(config) in AutoModelForMaskedLM._model_mapping
    return is_masked_lm and not getattr(config, "is_decoder", False)


def set_labels(config: PretrainedConfig, task: TaskSection, path: str) -> None:
    """Set the labels of `task` in a model's config, in place.

    Raises:
        ModelError: the model in `path` has a head of the same kind for other labels.
    """
    model = model_task(task)
    model.configure(config)
    names = model.output_names
    if not names and not model.has_labels:
        return

    if model.has_labels and not task.new_head and has_head(config, task):
        own = [label for _, label in sorted((config.id2label or {}).items())]
        if own != list(names):
            raise ModelError(
                f"task.labels: the model in model.path={path} has a head for {_shorten(own)}, but "
                f"the labels are {_shorten(names)}. The same labels in the same order are "
                f"allowed. Set task.labels so, or task.new_head=true to start a new "
                f"{_class_suffix(model)} head."
            )

    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    if model.auto_class.endswith("SequenceClassification"):
        default = "regression" if len(names) == 1 else "single_label_classification"
        problem_type: Any = model.problem_type or default
        config.problem_type = problem_type


def has_head(config: PretrainedConfig, task: TaskSection) -> bool:
    """Whether a model's files hold a head of the kind `task` needs."""
    suffix = _class_suffix(model_task(task))
    return any(name.endswith(suffix) for name in config.architectures or ())


def _class_suffix(task: ModelTask) -> str:
    """Return the end of the names of the task's classes, such as ForTokenClassification."""
    return task.auto_class.removeprefix("AutoModel")


def is_outside_base_model(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight belongs to no part of the base model."""
    prefix = model.base_model_prefix
    return bool(prefix) and hasattr(model, prefix) and not name.startswith(f"{prefix}.")


def is_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight belongs to a head, or to the pooler, which only feeds one."""
    return is_outside_base_model(name, model) or ".pooler." in f".{name}"


def may_be_new(name: str, model: PreTrainedModel, task: TaskSection) -> bool:
    """Whether a weight may be absent from a model's files: it belongs to a new head."""
    return not model_task(task).weights_are_complete and is_head(name, model)


def init_std(config: PretrainedConfig) -> float:
    """Return the standard deviation of a model's initial weights."""
    return float(getattr(config.get_text_config(), "initializer_range", None) or DEFAULT_INIT_STD)


def initialize_new_weights(
    slices: Callable[[], Iterable[Any]],
    new: Set[str],
    shapes: Mapping[str, tuple[int, ...]],
    config: PretrainedConfig,
    seed: int,
) -> None:
    """Write the initial values of the weights `new` into an engine, on each rank those it holds.

    Heads have no adapters, so the values go to the weights themselves.

    Args:
        slices: iterates over the engine's state slices.
        new: names of the new weights.
        shapes: shapes of whole weights, by name.
        config: config of the model.
        seed: the run's.
    """
    if not new:
        return

    std = init_std(config)
    for state_slice in slices():
        if state_slice.name in new and state_slice.key in ("param", "frozen"):
            values = initial_values(state_slice.name, shapes[state_slice.name], std, seed)
            start = state_slice.offset
            state_slice.write(values.reshape(-1)[start : start + state_slice.numel])


def initial_values(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    """Return the initial values of a weight, float32: matrices normal, biases 0, scales 1."""
    import torch

    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)

    # The name is part of the seed, so that a weight's values do not depend on other weights.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * std


def _shorten(labels: Sequence[str], limit: int = 6) -> str:
    """Return the first labels, and the number of all if there are more."""
    text = ", ".join(labels[:limit])
    return f"{text}, ... ({len(labels)})" if len(labels) > limit else text
