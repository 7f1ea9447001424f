"""The only door to what others trained: models, configs, tokenizers and adapters of a folder.

Everything is a local folder here; `model.loading.download` fetches it. Guarantees: code that comes
with a model runs only if the caller passes the user's own permission; nothing is ever read from
standard input; no file outside of the folder is read; only safetensors are read; each failure,
native code included, is one `ModelError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_ft.core.errors import DistFtError, ModelError
from dist_ft.core.logs import redact
from dist_ft.core.native_errors import first_line, is_panic
from dist_ft.pretrained import config_values, folder_files, model_size, weight_files

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATE_FOLDER = "additional_chat_templates"
MAX_TOKENIZER_BYTES = 2**30


@dataclass(frozen=True)
class Source:
    """A folder to read from.

    Attributes:
        folder: local folder.
        shown: what the user called it, for errors; starts with the option.
        trust_remote_code: the user's own config allows code that comes with the model. Never a
            value that a folder holds.
    """

    folder: str
    shown: str
    trust_remote_code: bool = False


@contextlib.contextmanager
def loading_errors(shown: str, what: str) -> Iterator[None]:
    """Convert any error of transformers, and any panic of native code, into one ModelError."""
    try:
        yield
    except DistFtError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise  # Ctrl-C, or the end of the process
        raise ModelError(_explain(shown, what, error)) from error


def _explain(shown: str, what: str, error: BaseException) -> str:
    """Return the text for an error of transformers, which has no types for them, only texts."""
    message = str(error)
    hint = "Check that the folder holds what save_pretrained writes."
    if "trust_remote_code" in message and shown.startswith("model."):
        hint = (
            "It needs to run code of its own: read that code, then set "
            "model.trust_remote_code=true."
        )
    elif "trust_remote_code" in message:
        hint = "Models that need to run code of their own are not allowed here. Use another one."
    elif "flash" in message.lower():
        hint = "Set model.attention=sdpa."
    elif "attn_implementation" in message:
        hint = "Set model.attention=eager."
    return redact(
        f"{shown}: cannot load the {what} ({type(error).__name__}: {first_line(error)}). {hint}"
    )


def not_a_model_error(error: ModelError, shown: str, needed: str) -> ModelError:
    """Return the error of `read_config` for a command that may get any folder.

    `error` itself, if it says more than that the folder holds no model.
    """
    cause = error.__cause__
    if not isinstance(cause, OSError | ValueError) or "trust_remote_code" in str(cause):
        return error
    return ModelError(
        f"{shown}: is not a model folder ({first_line(cause)[:100]}). {needed} is needed. Export "
        "the run first, or correct the path."
    )


def file_names(source: Source) -> list[str]:
    """Return the names of the model's files in the folder, checked; other folders in it are not.

    Raises:
        ModelError: a file leads out of the folder.
    """
    folder = folder_files.require_folder(source.folder, source.shown)
    names = []
    for pattern in ("*", f"{TEMPLATE_FOLDER}/*.jinja"):
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if not path.is_dir():
                folder_files.resolve_in_folder(folder, name, source.shown)
                names.append(name)
    return names


def read_config(source: Source) -> Any:
    """Return the config of transformers in config.json.

    Raises:
        ModelError: it is absent or damaged, or needs code that is not allowed to run.
    """
    from transformers import AutoConfig

    _check_config(source)
    with loading_errors(source.shown, "config"):
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)


def _check_config(source: Source) -> dict[str, Any]:
    """Check config.json, if there is one, and return its content."""
    folder = folder_files.require_folder(source.folder, source.shown)
    if not _exists(folder, CONFIG):
        return {}  # transformers reports it
    config = folder_files.read_json(folder, CONFIG, source.shown)
    config_values.check_model_config(config, f"{source.shown}: {CONFIG}")
    weights = config.get("transformers_weights")
    if weights is not None:
        folder_files.resolve_in_folder(folder, weights, f"{source.shown}: {CONFIG}")
    return config


def _exists(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of this name, whatever it is."""
    path = folder / name
    return path.exists() or path.is_symlink()


def read_tokenizer(source: Source) -> Any:
    """Return the tokenizer of the folder.

    Raises:
        ModelError: it is absent or damaged, or needs code that is not allowed to run.
    """
    from transformers import AutoTokenizer

    _check_config(source)
    _check_tokenizer_files(source)
    with loading_errors(source.shown, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code
        )
        length = tokenizer.model_max_length
        if isinstance(length, bool) or not isinstance(length, int | float) or not length > 0:
            raise ValueError(f"model_max_length={str(length)[:40]} is no number of tokens")

        # A row is tokenized much later: a tokenizer that cannot do that is reported here.
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.encode("a b")
    return tokenizer


def _check_tokenizer_files(source: Source) -> None:
    """Check the files that a tokenizer is read from."""
    folder = Path(source.folder)
    names = [name for name in TOKENIZER_FILES if _exists(folder, name)]
    if _exists(folder, TOKENIZER_CONFIG):
        config = folder_files.read_json(folder, TOKENIZER_CONFIG, source.shown)
        names += config_values.check_tokenizer_config(config, f"{source.shown}: {TOKENIZER_CONFIG}")
    for template in (folder / TEMPLATE_FOLDER).glob("*.jinja"):
        names.append(f"{TEMPLATE_FOLDER}/{template.name}")

    for name in names:
        path = folder_files.resolve_in_folder(folder, name, source.shown)
        if path.exists() and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ModelError(
                f"{source.shown}: {name} has {path.stat().st_size / 2**30:.1f} GiB. Files of a "
                "tokenizer are smaller. Download it again."
            )


def read_generation_config(source: Source) -> Any:
    """Return generation_config.json as transformers' config; None if the folder has none.

    Raises:
        ModelError: it is damaged.
    """
    from transformers import GenerationConfig

    if not _check_generation_config(source):
        return None
    with loading_errors(source.shown, "generation config"):
        return GenerationConfig.from_pretrained(source.folder)


def _check_generation_config(source: Source) -> bool:
    """Check generation_config.json; return whether there is one."""
    folder = Path(source.folder)
    if not _exists(folder, GENERATION_CONFIG):
        return False
    config = folder_files.read_json(folder, GENERATION_CONFIG, source.shown)
    config_values.check_token_ids(config, f"{source.shown}: {GENERATION_CONFIG}")
    return True


def check_weights(source: Source) -> None:
    """Check the weights of a whole model: their files, and that they fit config.json.

    Raises:
        ModelError: a file leads out of the folder or is damaged, or there is an adapter of peft.
    """
    config = _check_config(source)
    _check_generation_config(source)
    folder = Path(source.folder)
    if _exists(folder, ADAPTER_CONFIG):
        # transformers would read it, and the weights of any model that it names.
        raise ModelError(
            f"{source.shown}: holds an adapter of peft ({ADAPTER_CONFIG}). Whole models and "
            "adapters that dist_ft exported are allowed. Merge it into its model first "
            "(merge_and_unload of peft)."
        )
    model_size.check_size(config, weight_files.tensor_shapes(folder, source.shown), source.shown)


def read_model(source: Source, model_class: Any, what: str = "weights", **kwargs: Any) -> Any:
    """Return what `model_class.from_pretrained` returns for the folder.

    Args:
        source: the folder, of a whole model.
        model_class: an auto class of transformers.
        what: what is read, for errors.
        kwargs: further arguments.

    Raises:
        ModelError: the folder has no such model, or its files are damaged.
    """
    check_weights(source)
    with loading_errors(source.shown, what):
        return model_class.from_pretrained(
            source.folder,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            **kwargs,
        )


def model_from_config(
    config: Any, model_class: Any, trust_remote_code: bool = False, **kwargs: Any
) -> Any:
    """Return a model of this config, with weights that transformers initializes.

    Errors are those of transformers; the caller knows what to say about them.
    """
    return model_class.from_config(config, trust_remote_code=trust_remote_code, **kwargs)


def read_peft_adapter(model: Any, folder: Path, shown: str) -> Any:
    """Return peft's model around `model`, with the adapter that dist_ft wrote to `folder`.

    Raises:
        ModelError: peft cannot read it.
    """
    from peft import PeftModel

    folder_files.read_json(folder, ADAPTER_CONFIG, shown)
    weight_files.weight_files(folder, shown)
    with loading_errors(shown, "adapter"):
        return PeftModel.from_pretrained(model, str(folder))
