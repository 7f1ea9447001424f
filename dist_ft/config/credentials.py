"""Finds credentials in a config, which is stored with the run and shown to people.

A credential is found by the name of its key, anywhere in the document as the user wrote it, also
under a misspelled section, and by the form of a text, in values and in keys. Guarantees: a line
names the field and never holds the value; `Masked.mapping` is the document without the values, so
that no later message can quote them. Detects names and forms, so not every possible secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_ft.config import renames
from dist_ft.config.error_messages import schema_paths
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError
from dist_ft.core.redaction import REDACTED, holds_variable
from dist_ft.core.secret_forms import (
    CHOICES,
    NOTHING,
    USERINFO,
    assignment_spans,
    header_spans,
    is_aws_secret,
    is_key_file,
    is_random_value,
    key_spans,
    url_spans,
)
from dist_ft.core.secret_names import as_set, is_secret_name, is_strong_secret_name, words_of

_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "s3a": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_CONNECTION_STRING",
    "abfss": "AZURE_STORAGE_CONNECTION_STRING",
    "az": "AZURE_STORAGE_CONNECTION_STRING",
    "hf": "HF_TOKEN",
}
"""Where the packages of a protocol look for credentials, for those that do not use fsspec's."""

# Fields whose keys are labels of the data, and those whose texts are prose: a prompt may say
# "password: ...", and a label may be `secret`.
_LABELS = "prompting.verbalizers"
_LABEL_KEYS = (_LABELS, *(old for old, new in renames.RUN.fields.items() if new == _LABELS))
_PROSE = (
    "data.prompt_template",
    "data.system_prompt",
    "model.chat_template",
    "prompting.templates",
    *_LABEL_KEYS,
    "prompting.separator",
    "tuning.prompt.text",
    "task.labels",
)

_FREE = ("storage.options", "zero.deepspeed", "cluster.network_variables")
"""Fields that go to libraries as they are; without a credential they are still complete."""

# Names that stand for a credential if the value is random.
_RANDOM_NAMES = as_set(
    "session sid code license keys tokens login cert certificate user username account pin "
    "subscription client value"
)

_LOGIN = re.compile(
    r"[^\s:@/]+:[^\s/@]+@(?:localhost|[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}|[\w.-]+:[0-9]+)(?:/.*)?"
)

# Accounts of Google in the form of their JSON files.
_ACCOUNT_TYPES = ("service_account", "authorized_user", "external_account_authorized_user")


class Finding(NamedTuple):
    """A credential in a document.

    Attributes:
        path: keys and indices to its value; the last is the key itself if that is one.
        line: what is wrong, what is allowed, what to do.
    """

    path: tuple[Any, ...]
    line: str


@dataclass(frozen=True)
class Masked:
    """A document without its credentials.

    Attributes:
        mapping: the document; a mark stands in place of each credential.
        problems: one line for each.
        paths: keys and indices of each.
    """

    mapping: dict[str, Any]
    problems: list[str]
    paths: list[tuple[Any, ...]]


def mask_credentials(document: Mapping[str, Any]) -> Masked:
    """Return `document` without credentials, and a line for each that was in it. Pure."""
    findings = list(find_credentials(document))
    if not findings:
        return Masked(dict(document), [], [])

    masked = _masked(document, (), {finding.path for finding in findings})
    # A mapping under `credentials` gives a line for each of its values; one text, one line.
    lines = list(dict.fromkeys(finding.line for finding in findings))
    return Masked(masked, lines, [finding.path for finding in findings])


def credential_problems(config: RunConfig) -> list[str]:
    """Return a line for each credential in a config that Python code may have made."""
    # Such a config was not searched when it was loaded.
    return mask_credentials(config.model_dump(mode="json")).problems


def require_no_credentials(config: RunConfig, source: str = "config") -> None:
    """Raise ConfigError if `config` holds a credential; see `credential_problems`."""
    lines = credential_problems(config)
    if lines:
        raise ConfigError(lines, source)


def find_credential(name: str, value: str) -> bool:
    """Whether an option `name` with this `value` holds a credential, by its name or its form."""
    return any(find_credentials({name: value}))


def find_credentials(document: Any, path: tuple[Any, ...] = ()) -> Iterator[Finding]:
    """Yield the credentials in a document of mappings, lists and plain values. Pure."""
    yield from _find(document, path, secret_key=None)


def _find(value: Any, path: tuple[Any, ...], secret_key: str | None) -> Iterator[Finding]:
    """Yield the credentials in `value`.

    `secret_key`: the key above it that stands for a credential, which makes all below it secret.
    """
    if isinstance(value, Mapping):
        yield from _find_in_mapping(value, path, secret_key)
    elif isinstance(value, list | tuple):
        # ["X-Api-Key", value]: a header in the form that some HTTP clients take.
        is_header = len(value) == 2 and isinstance(value[0], str) and _is_header(value[0])
        for index, item in enumerate(value):
            key = value[0] if is_header and index == 1 else secret_key
            yield from _find(item, (*path, index), key)
    else:
        yield from _find_in_value(value, path, secret_key)


def _find_in_mapping(
    mapping: Mapping[Any, Any], path: tuple[Any, ...], secret_key: str | None
) -> Iterator[Finding]:
    # {name: X-Api-Key, value: ...}: the name of the value is a value itself.
    named = mapping.get("name", mapping.get("key"))
    is_account = mapping.get("type") in _ACCOUNT_TYPES and len(mapping) > 1

    for key, item in mapping.items():
        inner = (*path, key)
        form = _form_of(str(key), is_prose=_is_within(_dotted(path), _LABEL_KEYS))
        if form:
            yield Finding(inner, f"{_shown(path)}: a key {form} {_REMEDY}")
            continue

        inner_key = secret_key
        if is_account and key != "type":
            inner_key = "service_account"
        elif _names_credential(key, path):
            inner_key = str(key)
        elif key in ("value", "values") and isinstance(named, str) and is_secret_name(named):
            inner_key = named
        elif isinstance(key, str) and _is_dotted(key) and is_secret_name(key.rpartition(".")[2]):
            # Overrides of a stage and the space of a search: storage.options.s3.secret.
            inner_key = key.rpartition(".")[2]
        yield from _find(item, inner, inner_key)


def _is_header(name: str) -> bool:
    """Whether a text is the name of a header that holds a credential, and no label of the data."""
    words = name.split("-")
    is_named_so = all(map(str.isalpha, words)) and (len(words) > 1 or words[0].istitle())
    return is_named_so and is_strong_secret_name(name)


def _names_credential(key: Any, path: tuple[Any, ...]) -> bool:
    """Whether the key at `path` stands for a credential."""
    if not isinstance(key, str) or not is_secret_name(key):
        return False
    return _dotted((*path, key)) not in schema_paths() and not _is_within(
        _dotted(path), _LABEL_KEYS
    )


def _find_in_value(value: Any, path: tuple[Any, ...], secret_key: str | None) -> Iterator[Finding]:
    if isinstance(value, bytes):
        value = value.decode("latin-1")

    if secret_key is not None and _is_credential(value, secret_key):
        yield Finding(
            path,
            f"{_shown(path)}: looks like a credential, and a config is stored with the run. "
            f"Credentials come from the environment. {_remedy(path)}",
        )
        return
    if not isinstance(value, str):
        return

    # A JSON document in a text, such as the account of a service.
    if value.lstrip().startswith("{"):
        document = _parse_json(value)
        if any(find_credentials(document, path)):
            yield Finding(path, f"{_shown(path)}: {_HOLDS} {_REMEDY}")
            return

    form = _form_of(value, is_prose=_is_within(_dotted(path), _PROSE))
    is_random = _has_random_name(path) and is_random_value(value)
    if not form and (is_random or _is_wandb_key(path, value)):
        form = _HOLDS
    if form:
        yield Finding(path, f"{_shown(path)}: {form} {_REMEDY}")


def _is_credential(value: Any, name: str) -> bool:
    """Whether a value under the name of a credential is one, and no choice or path of a file."""
    is_strong = is_strong_secret_name(name) or name == "service_account"
    if isinstance(value, str):
        text = value.strip()
        if not text or is_key_file(text):
            return False
        return text.lower() not in (NOTHING if is_strong else CHOICES)

    # A switch is no credential, and a number only under a certain name: `token: 3` may count them.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and is_strong


_HOLDS = "holds a credential, and a config is stored with the run."
_REMEDY = "Remove it and set the credentials in the environment."


def _form_of(text: str, is_prose: bool) -> str | None:
    """Return what is wrong with a text that holds a credential by its form; else None."""
    if len(text) < 6:
        return None
    if "://" in text and USERINFO.search(text):
        return (
            "the URL has a user name, password or token before its host. Allowed: URLs without one."
        )
    if any(not is_prose or _is_in_url(text, span.start) for span in url_spans(text)):
        return "the URL has a signature, token or key. Allowed: URLs without one."

    is_secret = any(key_spans(text)) or is_aws_secret(text)
    if not is_secret and not is_prose:
        is_secret = any(header_spans(text)) or any(assignment_spans(text)) or _is_login(text)

    # The shell may have put the value of a variable here: storage.options.x.y=$MY_TOKEN.
    if is_secret or holds_variable(text):
        return _HOLDS
    return None


def _is_in_url(text: str, start: int) -> bool:
    """Whether `start` is in a URL: a prompt such as "a&key=b" is none."""
    before = re.split(r"\s", text[:start])
    return "://" in before[-1]


def _is_login(text: str) -> bool:
    """Whether a text is user:password@host, as in a URL without its protocol."""
    # Not org/image:tag@sha256:..., not models:/name@alias.
    return _LOGIN.fullmatch(text) is not None


def _has_random_name(path: tuple[Any, ...]) -> bool:
    keys = [key for key in path if isinstance(key, str)]
    if not keys or _dotted(path) in schema_paths():
        return False
    words = words_of(keys[-1])
    return bool(words) and (words[-1] in _RANDOM_NAMES or is_secret_name(keys[-1]))


def _is_wandb_key(path: tuple[Any, ...], value: str) -> bool:
    """Whether a text is a key of W&B in a field of W&B; elsewhere it would be a revision of git."""
    return path[:2] == ("log", "wandb") and re.fullmatch(r"[0-9a-f]{40}", value) is not None


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _remedy(path: tuple[Any, ...]) -> str:
    """Return what to do about a credential at `path`."""
    if len(path) > 3 and path[:2] == ("storage", "options"):
        protocol = str(path[2])
        variable = _VARIABLES.get(protocol)
        if variable is None and protocol.isidentifier():
            variable = f"FSSPEC_{protocol.upper()}_{str(path[3]).upper()}"
        if variable:
            return f"Remove it and set {variable}."
    return _REMEDY


def _shown(path: tuple[Any, ...]) -> str:
    """Return a path for a message, without keys that are credentials themselves."""
    parts = []
    for key in path:
        text = str(key)
        if _form_of(text, is_prose=False) or len(text) > 60 or not text.isprintable():
            text = "<key>"
        parts.append(text)
    return ".".join(parts) or "config"


def _is_dotted(key: str) -> bool:
    return "." in key and all(part.replace("_", "a").isalnum() for part in key.split("."))


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _is_within(dotted: str, fields: tuple[str, ...]) -> bool:
    """Whether a path is one of `fields` or below it, also in a stage's overrides or a search."""
    return any(f".{field}." in f".{dotted}." for field in fields)


def _masked(value: Any, path: tuple[Any, ...], secret_paths: set[tuple[Any, ...]]) -> Any:
    """Return `value` with a mark at each of `secret_paths`."""
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            inner = (*path, key)
            if inner not in secret_paths:
                result[key] = _masked(item, inner, secret_paths)
            # Left out, where that leaves a valid config: its other problems are then found too.
            elif not _is_within(_dotted(path), _FREE):
                is_secret_key = bool(_form_of(str(key), is_prose=True))
                result[REDACTED if is_secret_key else key] = REDACTED
        return result
    if path in secret_paths:
        return REDACTED
    if isinstance(value, list | tuple):
        return [_masked(item, (*path, index), secret_paths) for index, item in enumerate(value)]
    return value
