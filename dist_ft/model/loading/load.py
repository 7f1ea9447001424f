"""Finding and loading models and tokenizers: a folder, a bucket or the hub, once a node.

Guarantees: only safetensors are read (no pickles), code that comes with a model does not run unless the config says
so, and a weight that is missing, of another shape or freshly initialised is an error. Does not move anything to a GPU.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ft.config.schema import ModelSection, TaskSection
from dist_ft.core.errors import DistFtError, ModelError
from dist_ft.core.logs import redact
from dist_ft.model import heads
from dist_ft.model.adapters import adapter_files
from dist_ft.model.loading import replace_head
from dist_ft.model.loading.download import cache_folder, fetch_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("dist_ft.model")
CAUSAL_LM = TaskSection()
__all__ = [
    "cache_folder",
    "empty_model",
    "fetch",
    "load_for",
    "load_model",
    "load_tokenizer",
    "read_config",
]


@contextlib.contextmanager
def _explained(section: ModelSection, what: str) -> Any:
    """Turn whatever transformers raises into one line."""
    try:
        yield
    except DistFtError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        hint = "check that the folder holds what save_pretrained writes"
        if "trust_remote_code" in str(error):
            hint = "it wants to run code of its own: read that code, then set model.trust_remote_code=true"
        elif "flash" in str(error).lower():
            hint = "set model.attention=sdpa"
        elif "attn_implementation" in str(error):
            hint = "set model.attention=eager"
        raise ModelError(
            redact(
                f"model.path={section.path}: can not load the {what} "
                f"({type(error).__name__}: {first}); {hint}"
            )
        ) from error


def read_config(
    section: ModelSection, cache_dir: str | None = None, task: TaskSection = CAUSAL_LM
) -> PretrainedConfig:
    """Return the model's config, with the labels of `task`.

    Raises ModelError for a model that is absent, can not do the task, or has a head for other labels.
    """
    from transformers import AutoConfig

    folder = fetch_model(section.path, section.revision, cache_dir, weights=False)
    with _explained(section, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    if not heads.supports_task(config, task) and not (
        section.trust_remote_code and hasattr(config, "auto_map")
    ):
        raise ModelError(f"model.path={section.path}: {heads.unsupported_task_error(config, task)}")
    heads.set_labels(config, task, section.path)
    if section.dropout is not None:
        with _explained(section, f"config with model.dropout={section.dropout}"):
            set_dropout(config, section.dropout)
    return config


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout of a config and of the configs in it."""
    for name, value in list(vars(config).items()):
        if name.endswith(("dropout", "_pdrop", "dropout_prob")) and isinstance(value, int | float):
            exact = type(value)(
                probability
            )  # transformers refuses 0.0 where it declares a whole number
            setattr(config, name, exact if exact == probability else probability)
        elif hasattr(value, "to_diff_dict"):
            set_dropout(value, probability)


def load_tokenizer(section: ModelSection, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with the chat template the config names."""
    from transformers import AutoTokenizer

    folder = fetch_model(section.tokenizer or section.path, section.revision, cache_dir, weights=False)
    with _explained(section, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=section.trust_remote_code
        )
    if section.chat_template is not None:
        try:
            tokenizer.chat_template = Path(section.chat_template).read_text("utf-8")
        except OSError as error:
            raise ModelError(
                f"model.chat_template={section.chat_template}: can not read it ({error.strerror}); "
                "give a file with a Jinja template"
            ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.path={section.path}: its tokenizer has no fast version (tokenizer.json), which the "
            "masks need; convert it with transformers first"
        )
    return tokenizer


def load_causal_lm(section: ModelSection, cache_dir: str | None = None) -> PreTrainedModel:
    """Return the causal language model in `model.dtype` (see `load_for`)."""
    return load_task_model(CAUSAL_LM, section, cache_dir)[0]


def load_task_model(
    task: TaskSection, section: ModelSection, cache_dir: str | None = None
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Return the model for `task` and the names of its new weights, whose values mean nothing yet.

    In `model.dtype`, on the CPU or wherever the surrounding context (zero.Init) puts weights.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its report of the weights becomes ours, in one line
    folder = fetch_model(section.path, section.revision, cache_dir)
    said = adapter_files.read_adapter_info(folder)
    if said is not None:
        return _load_adapted(task, section, cache_dir, said, folder)
    config = read_config(section, cache_dir, task)
    with _explained(section, "weights"):
        loaded: Any = heads.auto_class(task).from_pretrained(
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
    model, info = loaded
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    new = _new_weights(model, task, info, names)
    check_loading_report(
        section.path,
        {
            kind: [found for found in info.get(kind) or () if names.get(_name(found)) not in new]
            for kind in ("missing_keys", "mismatched_keys", "error_msgs", "unexpected_keys")
        },
    )
    if new:
        log.info("new weights, drawn by run.seed: %s", ", ".join(sorted(new)))
    return _finish(model, section), new


def _load_adapted(
    task: TaskSection,
    section: ModelSection,
    cache_dir: str | None,
    said: dict[str, Any],
    folder: str,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Return the model an adapter's folder belongs to, with the adapter in it, and which weights are still new."""
    base = section.model_copy(update=said["base"])
    model, new = load_task_model(
        task.model_copy(update={"new_head": task.name in heads.LABELLED}), base, cache_dir
    )
    return model, new - adapter_files.load_adapter(model, folder, said, task)


def _new_weights(
    model: PreTrainedModel, task: TaskSection, info: dict[str, Any], names: dict[str, str]
) -> frozenset[str]:
    """Return the weights of a head that the files do not hold, or that a new head replaces.

    `names` maps every name of a weight to its first one, which tied weights are known by.
    """
    absent = {
        _name(found)
        for kind in ("missing_keys", "mismatched_keys")
        for found in info.get(kind) or ()
    }
    replaced = (
        {name for name in names.values() if heads.is_outside_base_model(name, model)}
        if task.new_head
        else set()
    )
    return frozenset(
        names[name]
        for name in (absent | replaced) & names.keys()
        if heads.may_be_new(name, model, task) and heads.may_be_new(names[name], model, task)
    )


def _name(found: Any) -> str:
    return str(found[0] if isinstance(found, tuple) else found)


def extra_model_kwargs(config: PretrainedConfig, task: TaskSection) -> dict[str, Any]:
    """Return what the class must be told besides: a pooler that nothing would use would not learn."""
    import inspect

    if task.name != "embedding" or type(config) not in heads.auto_class(task)._model_mapping:
        return {}
    kind: Any = heads.auto_class(task)._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    return (
        {"add_pooling_layer": False}
        if "add_pooling_layer" in inspect.signature(kind.__init__).parameters
        else {}
    )


def build_uninitialized_model(
    section: ModelSection, cache_dir: str | None = None, task: TaskSection = CAUSAL_LM
) -> PreTrainedModel:
    """Return the model with arbitrary weights, for a resumed run whose checkpoint fills all of them."""
    import torch

    config = read_config(section, cache_dir, task)
    with _explained(section, "structure"):
        model = model_from_config(
            config,
            task,
            getattr(torch, section.dtype),
            attn_implementation=section.attention,
            trust_remote_code=section.trust_remote_code,
        )
    if model.can_generate():
        from transformers import GenerationConfig

        with contextlib.suppress(
            OSError
        ):  # as from_pretrained: what ends a text may stand in a file of its own
            model.generation_config = GenerationConfig.from_pretrained(
                fetch_model(section.path, section.revision, cache_dir, weights=False)
            )
    return _finish(model, section)


def model_from_config(
    config: PretrainedConfig, task: TaskSection, dtype: Any, **given: Any
) -> PreTrainedModel:
    """Return a model for `task` with arbitrary weights."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = heads.auto_class(task).from_config(
            config, dtype=dtype, **given, **extra_model_kwargs(config, task)
        )
    model.tie_weights()
    return model


def probe_outputs(model: Any) -> Any:
    """Return, flat, all numbers a model tells of 24 token ids."""
    import torch

    tokens = (torch.arange(24) * 7919 + 11)[None] % model.config.get_text_config().vocab_size
    given = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        outputs = model(input_ids=tokens, **given)
    return torch.cat(
        [
            value.float().flatten()
            for value in outputs.values()
            if torch.is_tensor(value) and value.is_floating_point()
        ]
    )


def _finish(model: PreTrainedModel, section: ModelSection) -> PreTrainedModel:
    if getattr(model, "hf_quantizer", None) is not None:
        for parameter in model.parameters():
            parameter.requires_grad_(
                not hasattr(parameter, "qdata")
            )  # whole numbers have no gradient
    if section.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_loading_report(path: str, info: dict[str, Any]) -> None:
    """Raise ModelError if transformers reports weights it did not find or could not use."""
    kinds = {
        "missing_keys": "missing in the files",
        "mismatched_keys": "of another shape in the files",
        "error_msgs": "not readable",
    }
    for kind, what in kinds.items():
        names = sorted(_told(found) for found in info.get(kind) or ())
        if names:
            raise ModelError(
                f"model.path={path}: {len(names)} weights are {what}, such as {names[0]}; they would "
                "start from random values; check that config.json belongs to the *.safetensors"
            )
    unused = sorted(info.get("unexpected_keys") or ())
    if unused:
        log.warning(
            "model.path=%s: %d tensors of the files have no place in the model, such as %s",
            path,
            len(unused),
            unused[0],
        )


def _told(found: Any) -> str:
    """Return the name in an item of transformers' report, which for a mismatch is (name, shape found, shape wanted)."""
    if isinstance(found, tuple):
        return f"{found[0]} ({list(found[1])}, the model has {list(found[2])})"
    return str(found)
