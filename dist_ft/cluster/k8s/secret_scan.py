"""Finds literal secrets in manifests, by name or form. Never shows their values. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from dist_ft.cluster.k8s.load_manifests import Problem, lookup
from dist_ft.core.secret_forms import is_aws_secret, key_spans, url_spans
from dist_ft.core.secret_names import is_secret_variable

ASSIGNMENT = re.compile(
    r"^\s*(?:export )?([A-Z][A-Z0-9_]+)\s*[:=]\s*['\"]?[^\s'\"{$]", re.MULTILINE
)
"""A variable that is set in a text: NAME: value, NAME=value."""
MESSAGE = (
    "a secret in a file. Remove and change it, as it was exposed, and refer to a Secret that is "
    "created separately (secretKeyRef, secretRef)."
)


class _Text(NamedTuple):
    """A string in an object.

    Attributes:
        path: path of the string.
        value: the string; not empty.
        sibling_name: the field `name` of the same mapping; empty: none.
    """

    path: str
    value: str
    sibling_name: str


def find_secrets(content: dict[str, Any]) -> Iterator[Problem]:
    """Yield the literal secrets of an object."""
    if content.get("kind") == "Secret":
        for field in ("data", "stringData"):
            if lookup(content, field):
                yield Problem(
                    field,
                    "a Secret with its values in a file. Remove them, and use: kubectl create "
                    "secret generic NAME --from-literal=...",
                )
        return

    for text in _iter_texts(content, "", ""):
        if _is_secret(text):
            yield Problem(text.path, MESSAGE)
            continue

        # configs and scripts in one string, such as the data of a ConfigMap
        for variable in ASSIGNMENT.findall(text.value):
            if is_secret_variable(variable):
                yield Problem(f"{text.path} ({variable})", MESSAGE)


def _is_secret(text: _Text) -> bool:
    field = text.path.rpartition(".")[2]
    variable = text.sibling_name if field == "value" else field

    # A field such as `secretName` refers to a secret and does not contain it, so
    # only upper-case names count: those of environment variables.
    if variable.isupper() and is_secret_variable(variable):
        return True

    if field == "redis-password" or text.path.endswith("redisPassword.value"):
        return True

    return any(url_spans(text.value)) or any(key_spans(text.value)) or is_aws_secret(text.value)


def _iter_texts(value: Any, path: str, sibling_name: str) -> Iterator[_Text]:
    """Yield all strings in a value that are not empty."""
    if isinstance(value, dict):
        # in a list of variables, {name: TOKEN, value: ...} are two fields of one mapping
        name = str(value.get("name", ""))
        for key, inner in value.items():
            inner_path = f"{path}.{key}" if path else str(key)
            yield from _iter_texts(inner, inner_path, name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _iter_texts(inner, f"{path}[{index}]", "")
    elif isinstance(value, str) and value:
        yield _Text(path, value, sibling_name)
