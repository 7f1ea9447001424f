"""Load models and tokenizers from a folder, a bucket or the hub, downloaded once per node.

Guarantees, in addition to those of `pretrained_model`: a weight that is missing, of another shape
or freshly initialized is an error; an adapter and its base model are read with the user's own
options. Does not move anything to a GPU.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_ft.config.schema import ModelSection, TaskSection
from dist_ft.core.errors import ModelError
from dist_ft.core.logs import redact
from dist_ft.model import heads
from dist_ft.model.adapters import adapter_files
from dist_ft.model.experts import disable_layer_drop
from dist_ft.model.loading import replace_head
from dist_ft.model.loading.download import fetch_model, require_base_near
from dist_ft.model.model_task import model_task
from dist_ft.pretrained import export_info, pretrained_model
from dist_ft.pretrained.pretrained_model import Source, loading_errors
from dist_ft.storage.local_files import read_regular

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("dist_ft.model")
CAUSAL_LM = TaskSection()
MAX_TEMPLATE_BYTES = 2**20
"""Bytes of a chat template; those of models have at most some tens of KiB."""
MAX_ADAPTERS = 8
"""Adapters on top of each other."""


class LoadedModel(NamedTuple):
    """A model with its weights.

    Attributes:
        model: the transformers model.
        new_weights: names of the weights that the files do not hold; their values are arbitrary.
    """

    model: PreTrainedModel
    new_weights: frozenset[str]


def model_source(section: ModelSection, folder: str) -> Source:
    """Return the folder of a section's model, with the user's permission to run its code."""
    return Source(folder, redact(f"model.path={section.path}"), section.trust_remote_code)


def read_config(
    section: ModelSection, cache_dir: str | None = None, task: TaskSection = CAUSAL_LM
) -> PretrainedConfig:
    """Return the model's config, with the labels of `task`.

    Raises:
        ModelError: the model is absent, cannot do the task, or has a head for other labels.
    """
    folder = fetch_model(section.path, section.revision, cache_dir, weights=False)
    source = model_source(section, folder)
    config = pretrained_model.read_config(source)

    # A model with code of its own may do a task that transformers does not list.
    has_own_code = section.trust_remote_code and hasattr(config, "auto_map")
    if not heads.supports_task(config, task) and not has_own_code:
        message = heads.unsupported_task_error(config, task)
        raise ModelError(f"model.path={section.path}: {message}")

    with loading_errors(source.shown, "labels"):
        heads.set_labels(config, task, section.path)
    if section.dropout is not None:
        with loading_errors(source.shown, f"config with model.dropout={section.dropout}"):
            set_dropout(config, section.dropout)
    return config


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout of a config and of the configs in it."""
    for name, value in list(vars(config).items()):
        is_dropout = name.endswith(("dropout", "_pdrop", "dropout_prob"))
        if is_dropout and isinstance(value, int | float):
            # transformers refuses 0.0 where it declares an int.
            converted = type(value)(probability)
            if converted != probability:
                converted = probability
            setattr(config, name, converted)
        elif hasattr(value, "to_diff_dict"):
            set_dropout(value, probability)


def load_tokenizer(section: ModelSection, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with the chat template the config names.

    Raises:
        ModelError: the tokenizer or the template cannot be read, or the tokenizer has no fast
            version.
    """
    path = section.tokenizer or section.path
    folder = fetch_model(path, section.revision, cache_dir, weights=False)
    tokenizer = pretrained_model.read_tokenizer(model_source(section, folder))

    if section.chat_template is not None:
        try:
            template = read_regular(Path(section.chat_template), MAX_TEMPLATE_BYTES).decode()
            tokenizer.chat_template = template
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ModelError(
                f"model.chat_template={section.chat_template}: cannot read it ({reason}). "
                "Give a file with a Jinja template."
            ) from error

    # Slow tokenizers do not report which characters a token covers.
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.path={section.path}: its tokenizer has no fast version (tokenizer.json), which "
            "loss masks need. Convert it with transformers first."
        )
    return tokenizer


def load_causal_lm(section: ModelSection, cache_dir: str | None = None) -> PreTrainedModel:
    """Return the causal language model in `model.dtype` (see `load_task_model`)."""
    return load_task_model(CAUSAL_LM, section, cache_dir).model


def load_task_model(
    task: TaskSection,
    section: ModelSection,
    cache_dir: str | None = None,
    adapters: tuple[str, ...] = (),
) -> LoadedModel:
    """Return the model for `task` in `model.dtype`.

    Its weights are on the CPU, or where the surrounding context (zero.Init) puts them.

    Args:
        task: what the model is for.
        section: names the model.
        cache_dir: where downloads are stored.
        adapters: folders of the adapters whose base model this is.

    Raises:
        ModelError: the model cannot be loaded, or a weight that is not a new head's is missing.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # we report the weights ourselves, in one line

    folder = fetch_model(section.path, section.revision, cache_dir)
    source = model_source(section, folder)
    info = export_info.read_adapter_info(folder, source.shown)
    if info is not None:
        check_adapter_chain(folder, source.shown, adapters)
        return _load_with_adapter(task, section, cache_dir, info, (*adapters, folder))

    # A head of another shape may be one that a new head replaces, so transformers must not raise an
    # error. Every problem is in the report, which is checked below.
    config = read_config(section, cache_dir, task)
    model, report = pretrained_model.read_model(
        source,
        heads.auto_class(task),
        config=config,
        dtype=getattr(torch, section.dtype),
        attn_implementation=section.attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        key_mapping=replace_head.replaced_head_key_mapping(source, config, task),
        **extra_model_kwargs(config, task),
    )

    # Weights of a new head may be missing; all others are an error.
    first_names = _first_names(model)
    new_weights = _new_weights(model, task, report, first_names)
    unexplained: dict[str, list[Any]] = {}
    for kind in ("missing_keys", "mismatched_keys", "error_msgs", "unexpected_keys"):
        unexplained[kind] = []
        for item in report.get(kind) or ():
            if first_names.get(_name(item)) not in new_weights:
                unexplained[kind].append(item)
    check_loading_report(section.path, unexplained)
    if new_weights:
        log.info("new weights, initialized by run.seed: %s", ", ".join(sorted(new_weights)))
    return LoadedModel(_finish(model, section), new_weights)


def check_adapter_chain(folder: str, shown: str, adapters: tuple[str, ...]) -> None:
    """Raise ModelError if the adapter in `folder` is its own base model, or there are too many."""
    if any(os.path.samefile(folder, other) for other in adapters):
        raise ModelError(
            f"{shown}: the adapter is its own base model ({export_info.INFO_FILE}, base.path). A "
            "whole model is needed as the base. Correct base.path."
        )
    if len(adapters) >= MAX_ADAPTERS:
        raise ModelError(
            f"{shown}: more than {MAX_ADAPTERS} adapters on top of each other. Fewer are allowed. "
            "Export the run of one of them without --adapter."
        )


def _load_with_adapter(
    task: TaskSection,
    section: ModelSection,
    cache_dir: str | None,
    info: export_info.AdapterInfo,
    adapters: tuple[str, ...],
) -> LoadedModel:
    """Return the base model of the last of `adapters`, folders, with that adapter in it."""
    # Of the base model the folder gives path and revision. All other options stay the user's.
    base = section.model_copy(update={"path": info.base.path, "revision": info.base.revision})
    log.info("the adapter's base model: %s", redact(base.path))

    # The base model may have a head for other labels, which the adapter's head replaces.
    require_base_near(base.path, section.path)

    base_task = task.model_copy(update={"new_head": model_task(task).has_labels})
    model, new_weights = load_task_model(base_task, base, cache_dir, adapters)
    loaded = adapter_files.load_adapter(model, adapters[-1], info.tuning, task)
    return LoadedModel(model, new_weights - loaded)


def _first_names(model: PreTrainedModel) -> dict[str, str]:
    """Return for every name of a weight the first one, by which tied weights are known."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _new_weights(
    model: PreTrainedModel, task: TaskSection, report: dict[str, Any], first_names: dict[str, str]
) -> frozenset[str]:
    """Return the head's weights that the files do not hold, or that a new head replaces."""
    absent = set()
    for kind in ("missing_keys", "mismatched_keys"):
        for item in report.get(kind) or ():
            absent.add(_name(item))

    # With `new_head` the whole head is new, whether or not the files hold one.
    replaced = set()
    if task.new_head:
        for name in first_names.values():
            if heads.is_outside_base_model(name, model):
                replaced.add(name)

    # Both names must be a head's: a weight that is tied to the base model is not new.
    new_weights = set()
    for name in (absent | replaced) & first_names.keys():
        first_name = first_names[name]
        if heads.may_be_new(name, model, task) and heads.may_be_new(first_name, model, task):
            new_weights.add(first_name)
    return frozenset(new_weights)


def _name(item: Any) -> str:
    """Return the weight's name in an item of transformers' report."""
    if isinstance(item, tuple):
        return str(item[0])
    return str(item)


def extra_model_kwargs(config: PretrainedConfig, task: TaskSection) -> dict[str, Any]:
    """Return further arguments of the model class.

    A model whose task uses no pooler gets none, because nothing would train it.
    """
    import inspect

    if model_task(task).uses_pooler or type(config) not in heads.auto_class(task)._model_mapping:
        return {}
    model_class: Any = heads.auto_class(task)._model_mapping[type(config)]
    if isinstance(model_class, tuple | list):
        model_class = model_class[0]
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        return {"add_pooling_layer": False}
    return {}


def build_uninitialized_model(
    section: ModelSection, cache_dir: str | None = None, task: TaskSection = CAUSAL_LM
) -> PreTrainedModel:
    """Return the model with arbitrary weights, for a resumed run's checkpoint to fill."""
    import torch

    config = read_config(section, cache_dir, task)
    folder = fetch_model(section.path, section.revision, cache_dir, weights=False)
    source = model_source(section, folder)
    with loading_errors(source.shown, "structure"):
        model = model_from_config(
            config,
            task,
            getattr(torch, section.dtype),
            attn_implementation=section.attention,
            trust_remote_code=section.trust_remote_code,
        )

    if model.can_generate():
        # As from_pretrained does: end tokens may be in a file of their own.
        generation_config = pretrained_model.read_generation_config(source)
        if generation_config is not None:
            model.generation_config = generation_config
    return _finish(model, section)


def model_from_config(
    config: PretrainedConfig, task: TaskSection, dtype: Any, **kwargs: Any
) -> PreTrainedModel:
    """Return a model for `task` with arbitrary weights."""
    from transformers.initialization import no_init_weights

    # Every value is overwritten later, and drawing billions of them takes minutes.
    with no_init_weights():
        model = pretrained_model.model_from_config(
            config,
            heads.auto_class(task),
            dtype=dtype,
            **kwargs,
            **extra_model_kwargs(config, task),
        )
    model.tie_weights()  # skipped together with the initialization
    return model


def probe_outputs(model: Any) -> Any:
    """Return, flat, all floating-point outputs of a model for 24 token ids."""
    import torch

    vocab_size = model.config.get_text_config().vocab_size
    tokens = (torch.arange(24) * 7919 + 11)[None] % vocab_size  # (1, 24)
    kwargs = {}
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = tokens
    with torch.no_grad():
        outputs = model(input_ids=tokens, **kwargs)

    # The cache is an output too, but not a tensor.
    tensors = []
    for value in outputs.values():
        if torch.is_tensor(value) and value.is_floating_point():
            tensors.append(value.float().flatten())
    return torch.cat(tensors)


def _finish(model: PreTrainedModel, section: ModelSection) -> PreTrainedModel:
    """Freeze quantized weights, disable layer drop, and configure activation checkpointing."""
    disable_layer_drop(model)
    if getattr(model, "hf_quantizer", None) is not None:
        for parameter in model.parameters():
            is_integer = hasattr(parameter, "qdata")  # integers have no gradient
            parameter.requires_grad_(not is_integer)

    if section.activation_checkpointing:
        # The reentrant variant needs inputs with gradients, which frozen embeddings do not give.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_loading_report(path: str, report: dict[str, Any]) -> None:
    """Raise ModelError if transformers reports weights it did not find or could not use."""
    problems = {
        "missing_keys": "missing in the files",
        "mismatched_keys": "of another shape in the files",
        "error_msgs": "not readable",
    }
    for kind, problem in problems.items():
        names = sorted(_describe(item) for item in report.get(kind) or ())
        if names:
            raise ModelError(
                f"model.path={path}: {len(names)} weights are {problem}, such as {names[0]}. They "
                "would start from random values. Check that config.json belongs to the "
                "*.safetensors."
            )

    unused = sorted(report.get("unexpected_keys") or ())
    if unused:
        log.warning(
            "model.path=%s: %d tensors of the files have no place in the model, such as %s",
            path,
            len(unused),
            unused[0],
        )


def _describe(item: Any) -> str:
    """Return the text for an item of transformers' report.

    For a mismatch the item is (name, shape in the files, shape in the model).
    """
    if isinstance(item, tuple):
        return f"{item[0]} ({list(item[1])}, the model has {list(item[2])})"
    return str(item)
