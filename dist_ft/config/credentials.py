"""Detection of credentials in a config, which is stored with the run and shown to people.

Guarantees: a credential is named by its field and never printed; in URLs it is what `logs.redact`
removes. Detects credentials by name or form, so not every possible secret. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dist_ft.config.schema import RunConfig, Section
from dist_ft.core.logs import QUERY_SECRET, USERINFO

# `key` counts only as a whole name: it is the access key of s3fs.
_NAME = re.compile(
    r"(?i)^(key|.*(secret|token|passw|pwd|credential|account_key|access_key|api_key"
    r"|connection_string|authorization).*)$"
)
# Options whose names look like those of a credential, but which hold none.
_NOT_SECRET = frozenset({"requester_pays", "token_uri", "cache_token"})
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_CONNECTION_STRING",
    "az": "AZURE_STORAGE_CONNECTION_STRING",
}


def secret_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for each credential in `config`, without its value."""
    # By name only in storage.options, which goes to libraries as it is. Fields of the schema have
    # harmless names such as max_new_tokens.
    for protocol, options in config.storage.options.items():
        for path, _ in _leaves(options, f"storage.options.{protocol}"):
            name = path.rpartition(".")[2]
            if _NAME.match(name) and name not in _NOT_SECRET:
                variable = _VARIABLES.get(protocol, f"FSSPEC_{protocol.upper()}_{name.upper()}")
                yield (
                    f"{path}: looks like a credential, and a config is stored with the run. "
                    f"Credentials come from the environment. Remove it and set {variable}."
                )

    # By form everywhere: a URL may be in any text.
    for path, value in _leaves(config, ""):
        if isinstance(value, str) and USERINFO.search(value):
            yield (
                f"{path}: the URL has a user name, password or token before its host. Allowed: "
                "URLs without one. Remove it and set the credentials in the environment."
            )
        elif isinstance(value, str) and QUERY_SECRET.search(value):
            yield (
                f"{path}: the URL has a signature, token or key. Allowed: URLs without one. Remove "
                "it and set the credentials in the environment."
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of all values that are no section, mapping or list."""
    # vars, as a broken field is absent: its neighbors still have to be searched.
    if isinstance(value, Section):
        fields = vars(value)
        value = {name: fields[name] for name in type(value).model_fields if name in fields}

    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value
