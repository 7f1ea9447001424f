"""Load models and tokenizers from a folder, a bucket or the hub, downloaded once per node.

Guarantees: only safetensors are read (no pickles); code that comes with a model does not run unless
the config allows it; a weight that is missing, of another shape or freshly initialized is an error.
Does not move anything to a GPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_ft.config.schema import ModelSection, TaskSection
from dist_ft.core.errors import DistFtError, ModelError
from dist_ft.core.logs import redact
from dist_ft.model import heads
from dist_ft.model.adapters import adapter_files
from dist_ft.model.loading import replace_head
from dist_ft.model.loading.download import fetch_model, require_base_near
from dist_ft.model.model_task import model_task
from dist_ft.storage.local_files import read_regular

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("dist_ft.model")
CAUSAL_LM = TaskSection()
MAX_TEMPLATE_BYTES = 2**20
"""Bytes of a chat template; those of models have at most some tens of KiB."""


class LoadedModel(NamedTuple):
    """A model with its weights.

    Attributes:
        model: the transformers model.
        new_weights: names of the weights that the files do not hold; their values are arbitrary.
    """

    model: PreTrainedModel
    new_weights: frozenset[str]


@contextlib.contextmanager
def _loading_errors(section: ModelSection, what: str) -> Iterator[None]:
    """Convert any error of transformers into a ModelError of one line."""
    try:
        yield
    except DistFtError:
        raise
    except Exception as error:
        # transformers has no types for these errors; only their text differs.
        message = str(error)
        first_line = message.strip().split("\n")[0]
        hint = "Check that the folder holds what save_pretrained writes."
        if "trust_remote_code" in message:
            hint = (
                "It needs to run code of its own: read that code, then set "
                "model.trust_remote_code=true."
            )
        elif "flash" in message.lower():
            hint = "Set model.attention=sdpa."
        elif "attn_implementation" in message:
            hint = "Set model.attention=eager."

        raise ModelError(
            redact(
                f"model.path={section.path}: cannot load the {what} "
                f"({type(error).__name__}: {first_line}). {hint}"
            )
        ) from error


def read_config(
    section: ModelSection, cache_dir: str | None = None, task: TaskSection = CAUSAL_LM
) -> PretrainedConfig:
    """Return the model's config, with the labels of `task`.

    Raises:
        ModelError: the model is absent, cannot do the task, or has a head for other labels.
    """
    from transformers import AutoConfig

    folder = fetch_model(section.path, section.revision, cache_dir, weights=False)
    with _loading_errors(section, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)

    # A model with code of its own may do a task that transformers does not list.
    has_own_code = section.trust_remote_code and hasattr(config, "auto_map")
    if not heads.supports_task(config, task) and not has_own_code:
        message = heads.unsupported_task_error(config, task)
        raise ModelError(f"model.path={section.path}: {message}")

    heads.set_labels(config, task, section.path)
    if section.dropout is not None:
        with _loading_errors(section, f"config with model.dropout={section.dropout}"):
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
    from transformers import AutoTokenizer

    path = section.tokenizer or section.path
    folder = fetch_model(path, section.revision, cache_dir, weights=False)
    with _loading_errors(section, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=section.trust_remote_code
        )

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
    task: TaskSection, section: ModelSection, cache_dir: str | None = None
) -> LoadedModel:
    """Return the model for `task` in `model.dtype`.

    Its weights are on the CPU, or where the surrounding context (zero.Init) puts them.

    Raises:
        ModelError: the model cannot be loaded, or a weight that is not a new head's is missing.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # we report the weights ourselves, in one line

    folder = fetch_model(section.path, section.revision, cache_dir)
    info = adapter_files.read_adapter_info(folder)
    if info is not None:
        return _load_with_adapter(task, section, cache_dir, info, folder)

    # A head of another shape may be one that a new head replaces, so transformers must not raise an
    # error. Every problem is in the report, which is checked below.
    config = read_config(section, cache_dir, task)
    with _loading_errors(section, "weights"):
        result: Any = heads.auto_class(task).from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attention,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            key_mapping=replace_head.replaced_head_key_mapping(section, folder, config, task),
            **extra_model_kwargs(config, task),
        )
    model, report = result

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


def _load_with_adapter(
    task: TaskSection,
    section: ModelSection,
    cache_dir: str | None,
    info: adapter_files.AdapterInfo,
    folder: str,
) -> LoadedModel:
    """Return the base model of an adapter's folder, with the adapter in it."""
    # The base model may have a head for other labels, which the adapter's head replaces.
    base = section.model_copy(update=info["base"])
    require_base_near(base.path, section.path)
    base_task = task.model_copy(update={"new_head": model_task(task).has_labels})
    model, new_weights = load_task_model(base_task, base, cache_dir)
    loaded = adapter_files.load_adapter(model, folder, info, task)
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
    with _loading_errors(section, "structure"):
        model = model_from_config(
            config,
            task,
            getattr(torch, section.dtype),
            attn_implementation=section.attention,
            trust_remote_code=section.trust_remote_code,
        )

    if model.can_generate():
        from transformers import GenerationConfig

        # As from_pretrained does: end tokens may be in a file of their own.
        with contextlib.suppress(OSError):
            folder = fetch_model(section.path, section.revision, cache_dir, weights=False)
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return _finish(model, section)


def model_from_config(
    config: PretrainedConfig, task: TaskSection, dtype: Any, **kwargs: Any
) -> PreTrainedModel:
    """Return a model for `task` with arbitrary weights."""
    from transformers.initialization import no_init_weights

    # Every value is overwritten later, and drawing billions of them takes minutes.
    with no_init_weights():
        model = heads.auto_class(task).from_config(
            config, dtype=dtype, **kwargs, **extra_model_kwargs(config, task)
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
    """Freeze quantized weights, and enable activation checkpointing if configured."""
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
