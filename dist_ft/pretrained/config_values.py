"""Values of a model's files of settings that would hang, exhaust memory, or point elsewhere.

transformers believes them: it creates a layer for each of `num_hidden_layers`, opens the files that
tokenizer_config.json names, and downloads the kernels that config.json names. What is merely wrong
is left to transformers, which refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dist_ft.core.errors import MAX_LINE, ModelError

MAX_LAYERS = 2048
MAX_EXPERTS = 8192
MAX_EXPERTS_IN_ALL_LAYERS = 2**18
MAX_LABELS = 1_000_000
MAX_SIZE = 2**40
"""Largest number of anything; vocabularies have 10**6 entries, contexts 10**7 tokens."""
MAX_LIST_LENGTH = MAX_LABELS
MAX_WIDTH = 2**22
_LAYER_KEY = re.compile(
    r"(?:^|_)(?:layers?|depths?|n_blocks?|num_blocks?|hidden_groups|group_num)$"
)
_EXPERT_KEY = re.compile(r"experts?$")
_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size")
_TOKEN_KEY = re.compile(r"_token_ids?$")
_CODE_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_FILE_LISTS = ("fast_tokenizer_files",)
_PRETRAINED_PART = "use_pretrained_backbone"


class _Value(NamedTuple):
    """A value anywhere in a JSON object, with its key."""

    key: str
    value: Any


def _walk(value: Any, key: str = "") -> Iterator[_Value]:
    """Yield all values in a JSON value; those of a list have the list's key."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield _Value(name, part)
            yield from _walk(part, name)
    elif isinstance(value, list):
        for part in value:
            yield _Value(key, part)
            yield from _walk(part, key)


def _refuse(shown: str, key: str, value: Any, problem: str, allowed: str) -> ModelError:
    text = str(value)[:MAX_LINE]
    return ModelError(f"{shown}: {key}={text}: {problem}. {allowed}. Correct the file.")


def check_model_config(config: Mapping[str, Any], shown: str) -> None:
    """Check config.json, as parsed.

    Args:
        config: its content.
        shown: names the file in errors.

    Raises:
        ModelError: a number is absurd, or a value names code or weights that are not in the folder.
    """
    num_layers = num_experts = 1
    for key, value in _walk(config):
        if isinstance(value, list | dict) and len(value) > MAX_LIST_LENGTH:
            raise _refuse(shown, key, f"{len(value)} values", "too many", "1,000,000 are allowed")
        if isinstance(value, float):
            continue
        if isinstance(value, int):
            _check_number(key, value, shown)
            if _LAYER_KEY.search(key):
                num_layers = max(num_layers, value)
            elif _EXPERT_KEY.search(key):
                num_experts = max(num_experts, value)

        is_code = key in _CODE_KEYS and isinstance(value, str) and "/" in value
        if is_code or (key == _PRETRAINED_PART and value is True):
            raise _refuse(
                shown,
                key,
                value,
                "would download code or weights from elsewhere",
                "Implementations of transformers are allowed",
            )

    if num_layers * num_experts > MAX_EXPERTS_IN_ALL_LAYERS:
        raise ModelError(
            f"{shown}: {num_layers} layers of {num_experts} experts are absurd. Up to "
            f"{MAX_EXPERTS_IN_ALL_LAYERS:,} experts are allowed. Correct the file."
        )
    _check_auto_map(config.get("auto_map"), shown)
    architectures = config.get("architectures")
    is_list = isinstance(architectures, list | None)
    if not is_list or not all(isinstance(name, str) for name in architectures or ()):
        raise _refuse(shown, "architectures", architectures, "names no classes", "A list is needed")
    for name in ("quantization_config", "text_config", "vision_config", "id2label", "label2id"):
        if not isinstance(config.get(name, {}), dict | None):
            raise _refuse(shown, name, config[name], "is not a JSON object", "One is needed")
    check_token_ids(config, shown)


def _check_number(key: str, value: int, shown: str) -> None:
    """Check an integer of config.json by the kind of its key."""
    largest = MAX_SIZE
    if _LAYER_KEY.search(key):
        largest = MAX_LAYERS
    elif _EXPERT_KEY.search(key):
        largest = MAX_EXPERTS
    elif key == "num_labels":
        largest = MAX_LABELS
    elif key in _WIDTH_KEYS:
        largest = MAX_WIDTH
    if not -largest <= value <= largest:
        raise _refuse(shown, key, value, "an absurd number", f"Up to {largest:,} are allowed")


def _check_auto_map(auto_map: Any, shown: str) -> None:
    """Check that `auto_map` names classes; whether their code runs, the user's config decides."""
    if auto_map is None:
        return
    is_mapping = isinstance(auto_map, dict)
    for value in auto_map.values() if is_mapping else ():
        names = value if isinstance(value, list) else [value]
        is_mapping = is_mapping and all(isinstance(name, str | None) for name in names)
    if not is_mapping:
        raise _refuse(shown, "auto_map", auto_map, "names no classes", "Names by class are allowed")


def check_token_ids(settings: Mapping[str, Any], shown: str) -> None:
    """Check the token ids in config.json or generation_config.json: integers, or lists of them.

    Raises:
        ModelError: one is something else.
    """
    for key, value in settings.items():
        # A few models number the token of padding -1.
        values = value if isinstance(value, list) else [value]
        if not _TOKEN_KEY.search(key) or value is None:
            continue
        for token in values:
            is_id = isinstance(token, int) and not isinstance(token, bool) and -1 <= token < 2**31
            if not is_id:
                raise _refuse(shown, key, value, "is no token id", "Integers from 0 are allowed")


def check_tokenizer_config(config: Mapping[str, Any], shown: str) -> list[str]:
    """Check tokenizer_config.json, as parsed; return the files of the folder that it names.

    Raises:
        ModelError: the chat template, the classes or the files are none.
    """
    for key in ("tokenizer_class", "processor_class"):
        if not isinstance(config.get(key), str | None):
            raise _refuse(shown, key, config[key], "is no class", "The name of one is allowed")

    auto_map = config.get("auto_map")
    if isinstance(auto_map, list):  # an older form: the classes of the slow and the fast tokenizer
        auto_map = {"AutoTokenizer": auto_map}
    _check_auto_map(auto_map, shown)
    if isinstance(auto_map, dict) and "AutoTokenizer" in auto_map:
        names = auto_map["AutoTokenizer"]
        if not isinstance(names, list) or len(names) != 2:
            raise _refuse(shown, "auto_map", auto_map, "names no tokenizer", "Two are needed")

    if not _is_template(config.get("chat_template")):
        raise ModelError(
            f"{shown}: chat_template is neither a text nor a list of named ones. A Jinja template "
            "is needed. Correct the file, or set model.chat_template."
        )

    names = []
    for key in _FILE_LISTS:
        value = config.get(key, [])
        if not isinstance(value, list):
            raise _refuse(shown, key, value, "is no list of files", "Names are allowed")
        names += value
    return names


def _is_template(value: Any) -> bool:
    """Whether a value is a chat template, or several by name."""
    if isinstance(value, dict):
        return all(isinstance(template, str) for template in value.values())
    if isinstance(value, list):
        return all(
            isinstance(item, dict)
            and isinstance(item.get("name"), str)
            and isinstance(item.get("template"), str)
            for item in value
        )
    return isinstance(value, str | None)
