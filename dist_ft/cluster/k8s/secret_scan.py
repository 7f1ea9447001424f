"""Secrets that stand in a manifest. Finds what it can recognise by name or form; values are never shown. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dist_ft.cluster.k8s.load_manifests import at
from dist_ft.core.logs import QUERY_SECRET, SECRET_NAME, USERINFO

FORM = re.compile(
    r"\b(AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{36}|xox[bp]-[0-9A-Za-z-]{20,})|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
LINE = re.compile(r"^\s*(?:export )?([A-Z][A-Z0-9_]+)\s*[:=]\s*['\"]?[^\s'\"{$]", re.MULTILINE)
"""A variable that is set in a text: NAME: value, NAME=value."""
TOLD = (
    "a secret in a file; take it out (and change it: it was seen), and name a Secret that is made apart: "
    "secretKeyRef, secretRef"
)


def problems(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, what is wrong) of literal secrets in an object."""
    if content.get("kind") == "Secret":
        for field in ("data", "stringData"):
            if at(content, field):
                yield (
                    field,
                    (
                        "a Secret with its values in a file; leave them out: kubectl create secret generic NAME "
                        "--from-literal=..."
                    ),
                )
        return
    for path, value, beside in _texts(content, "", ""):
        name = path.rpartition(".")[2]
        variable = beside if name == "value" else name
        if (
            (variable.isupper() and SECRET_NAME.search(variable))
            or name == "redis-password"
            or path.endswith("redisPassword.value")
            or any(form.search(value) for form in (FORM, USERINFO, QUERY_SECRET))
        ):
            yield path, TOLD
        else:
            for variable in LINE.findall(value):
                if SECRET_NAME.search(variable):
                    yield f"{path} ({variable})", TOLD


def _texts(value: Any, path: str, beside: str) -> Iterator[tuple[str, str, str]]:
    """Yield (path, text, the `name` beside it) of all texts that are not empty."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(
                inner, f"{path}.{key}" if path else str(key), str(value.get("name", ""))
            )
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{index}]", "")
    elif isinstance(value, str) and value:
        yield path, value, beside
