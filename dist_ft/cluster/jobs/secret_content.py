"""Finds credentials in the content of files, however long a file is.

A file is fed in chunks, so the memory does not depend on its size, and chunks overlap, so nothing
hides between two of them. Found are: values of secret variables of this process's environment,
private keys, and tokens that have the form of a known service. Guarantees: what is found is named,
never shown.
"""

from __future__ import annotations

import base64
import json
import os
import re
from typing import NamedTuple
from urllib.parse import quote

from dist_ft.core.secret_names import is_secret_variable

CHUNK_BYTES = 2**20
"""How much of a file is in memory at once."""
OVERLAP_BYTES = 8 * 2**10
"""How much of a chunk, at least, is searched again with the next one: more than a token is long."""
MIN_VALUE_LENGTH = 8
"""A shorter value of a variable would be found in any file."""

_MARKER = rb"-{4,5} ?BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)? ?-{4,5}"
_PRIVATE_KEY = re.compile(_MARKER)
# The marker and, after headers or escaped line ends, the first line of the key.
_WHOLE_PRIVATE_KEY = re.compile(_MARKER + rb"(?:(?!-----)[\s\S]){0,400}?[A-Za-z0-9+/]{32}")


class _Form(NamedTuple):
    """The form of a credential.

    Attributes:
        kind: what it is, for people.
        start: text that it contains; searching for it is fast.
        pattern: the whole credential; its last group, or all of it, is the secret part.
    """

    kind: str
    start: bytes
    pattern: re.Pattern[bytes]


def _form(kind: str, start: bytes, pattern: bytes) -> _Form:
    # not in the middle of a longer word, such as random base64
    return _Form(kind, start, re.compile(rb"(?<![A-Za-z0-9+/_-])(?:" + pattern + rb")"))


_END = rb"(?![A-Za-z0-9_-])"
# it has no form of its own, so the name in front of it counts
_AWS_SECRET_KEY = re.compile(
    rb"(?i:aws_?secret_?(?:access_?)?key)[\"'\\]*\s*[:=]\s*[\"'\\]*([A-Za-z0-9/+]{40})"
    rb"(?![A-Za-z0-9/+=])"
)
_FORMS = (
    _form("a Hugging Face token", b"hf_", rb"hf_([A-Za-z0-9]{34,40})" + _END),
    _form("a Hugging Face token", b"api_org_", rb"api_org_([A-Za-z0-9]{34})" + _END),
    _form("an AWS access key", b"AKIA", rb"AKIA([0-9A-Z]{16})" + _END),
    _form("an AWS access key", b"ASIA", rb"ASIA([0-9A-Z]{16})" + _END),
    _Form("an AWS secret key", b"SECRET", _AWS_SECRET_KEY),
    _Form("an AWS secret key", b"ecret", _AWS_SECRET_KEY),
    *(
        _form("a GitHub token", start, start + rb"([A-Za-z0-9]{36,251})" + _END)
        for start in (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_")
    ),
    _form("a GitHub token", b"github_pat_", rb"github_pat_([A-Za-z0-9]{22}_[A-Za-z0-9]{59})"),
    _form("a GitLab token", b"glpat-", rb"glpat-([A-Za-z0-9_-]{20,})"),
    _form("a Slack token", b"xox", rb"xox[abeoprs]-([A-Za-z0-9-]{24,})"),
    _form(
        "a Slack webhook",
        b"hooks.slack.com/services/",
        rb"https://hooks\.slack\.com/services/(T[A-Z0-9]{6,}/B[A-Z0-9]{6,}/[A-Za-z0-9]{20,})",
    ),
    _form("a Google API key", b"AIza", rb"AIza([A-Za-z0-9_-]{35})" + _END),
    _form("an OpenAI key", b"T3BlbkFJ", rb"sk-([A-Za-z0-9_-]{16,}T3BlbkFJ[A-Za-z0-9_-]{16,})"),
    _form("an Anthropic key", b"sk-ant-", rb"sk-ant-([A-Za-z0-9_-]{40,})"),
    _form("a Stripe key", b"k_live_", rb"[sr]k_live_([A-Za-z0-9]{24,})"),
    _form("an npm token", b"npm_", rb"npm_([A-Za-z0-9]{36})" + _END),
    _form("a PyPI token", b"pypi-AgEI", rb"pypi-AgEI([A-Za-z0-9_-]{40,})"),
    _form("a Databricks token", b"dapi", rb"dapi([0-9a-f]{32}(?:-\d)?)" + _END),
    _form("a SendGrid key", b"SG.", rb"SG\.([A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})"),
    _form("a Vault token", b"hvs.", rb"hvs\.([A-Za-z0-9_-]{24,})"),
    _form("an Azure storage key", b"AccountKey=", rb"AccountKey=([A-Za-z0-9+/]{86}==)"),
    _form("an age key", b"AGE-SECRET-KEY-1", rb"AGE-SECRET-KEY-1([A-Z0-9]{50,})"),
    _form("a PuTTY key", b"PuTTY-User-Key-File-", rb"PuTTY-User-Key-File-\d: ([\s\S]{16})"),
    _form(
        "a JSON web token",
        b"eyJ",
        rb"eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.([A-Za-z0-9_-]{32,})",
    ),
)
_PLACEHOLDER = re.compile(rb"(?i)example|placeholder|redacted|dummy|your[-_]?|x{6}|0{8}|12345678")


def _encoded_markers() -> tuple[bytes, ...]:
    """Return how PEM files of private keys start in base64, as in a kubeconfig, and in UTF-16."""
    markers = ["PRIVATE KEY".encode("utf-16-le")]
    for kind in ("", "RSA ", "EC ", "DSA ", "OPENSSH ", "ENCRYPTED "):
        marker = f"-----BEGIN {kind}PRIVATE KEY-----".encode()
        # without the end, which depends on what follows
        markers.append(base64.b64encode(marker)[: len(marker) // 3 * 4])
    return tuple(markers)


_ENCODED_MARKERS = _encoded_markers()
_CODE = (".py", ".pyi", ".ipynb", ".md", ".rst", ".js", ".ts", ".go", ".rs", ".c", ".cpp", ".java")


def secret_variables() -> dict[str, str]:
    """Return {name: value} of the environment variables that look like credentials."""
    variables = {}
    for name, value in os.environ.items():
        # a path is public
        is_path = name.endswith(("_PATH", "_FILE"))
        if len(value) >= MIN_VALUE_LENGTH and is_secret_variable(name) and not is_path:
            variables[name] = value
    return variables


def spellings(value: str) -> set[bytes]:
    """Return how a value may be written in a file: plain, escaped, encoded."""
    plain = os.fsencode(value)
    percent_encoded = quote(plain, safe="")
    texts = {
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        percent_encoded,
        quote(plain),
        re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), percent_encoded),
    }
    found = {os.fsencode(text) for text in texts}
    found.add(value.encode("utf-16-le", "surrogateescape"))
    found.add(plain.hex().encode())

    # In base64 a text looks different at each of three offsets; its ends depend on its neighbors.
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + plain)
        if encoded.endswith(b"="):
            encoded = encoded[:-4]
        first = (0, 2, 3)[offset]  # characters with bits of what comes before
        if len(encoded) - first >= MIN_VALUE_LENGTH:
            found.add(encoded[first:])
    return found


class SecretScanner:
    """Searches a file, chunk by chunk.

    Attributes:
        found: what the file contains, such as "a private key"; None: nothing so far.
    """

    def __init__(self, name: str, variables: dict[bytes, str]) -> None:
        """Search a file called `name` for credentials, and for the keys of `variables`.

        `variables`: {spelling of a value: name of its variable}.
        """
        self.found: str | None = None
        self._variables = variables
        self._end = b""
        self._is_utf16: bool | None = None  # not known before the first chunk
        self._overlap = max(OVERLAP_BYTES, *map(len, variables)) if variables else OVERLAP_BYTES

        # Code and texts may contain the marker as a pattern, as this module does.
        self._key = _PRIVATE_KEY
        if name.lower().endswith(_CODE):
            self._key = _WHOLE_PRIVATE_KEY

    def feed(self, chunk: bytes) -> None:
        """Search the next part of the file; parts are of any size."""
        if self.found:
            return
        if self._is_utf16 is None:
            self._is_utf16 = chunk.startswith((b"\xff\xfe", b"\xfe\xff"))
        if self._is_utf16:
            # as a text of one byte a character, in which all credentials are written
            chunk = chunk.replace(b"\0", b"")
        content = self._end + chunk
        self.found = self._search(content)
        self._end = content[-self._overlap :]

    def _search(self, content: bytes) -> str | None:
        for value, name in self._variables.items():
            if value in content:
                return f"the value of {name}"

        # `in` is far faster than a pattern, and nearly all files contain none of these.
        if b"PRIVATE KEY" in content and self._key.search(content):
            return "a private key"
        if any(marker in content for marker in _ENCODED_MARKERS):
            return "a private key"

        for form in _FORMS:
            if form.start not in content:
                continue
            for match in form.pattern.finditer(content):
                if _is_random(match[0], match[match.lastindex or 0]):
                    return form.kind
        return None


def _is_random(text: bytes, secret: bytes) -> bool:
    """Return whether a text of a token's form is one, and not an example such as hf_xxxxxx."""
    return len(set(secret)) >= 8 and not _PLACEHOLDER.search(text)


def variable_spellings() -> dict[bytes, str]:
    """Return {spelling of a value: name of its variable} of this process's secret variables."""
    found = {}
    for name, value in secret_variables().items():
        for spelling in spellings(value):
            found[spelling] = name
    return found
