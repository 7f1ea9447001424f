"""Which texts are credentials by their form: keys of well-known services, private keys, URLs.

`secret_spans` finds the parts of a text that must not be shown; `redaction` hides them, and
`config.credentials` refuses a config that has any. Random text alone is no credential: hashes,
revisions and ids are random too. Pure.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from dist_ft.core.secret_names import (
    as_set,
    is_secret_name,
    is_secret_parameter,
    is_strong_secret_name,
    words_of,
)


class Span(NamedTuple):
    """A part of a text: [start, end)."""

    start: int
    end: int


# --- keys of services. Each starts with a mark of its own, so that no other text has this form.

KNOWN_FORMS = re.compile(
    r"""(?x)(?<![A-Za-z0-9])(?:
      (?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA|A3T[A-Z0-9])[A-Z0-9]{16}(?![A-Za-z0-9])  # AWS
    | (?:hf|api_org)_[A-Za-z0-9]{20,}                       # Hugging Face
    | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,}
    | gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat)-[A-Za-z0-9_.-]{16,}         # GitLab
    | xox[a-z]-[A-Za-z0-9-]{10,} | xapp-[0-9]-[A-Za-z0-9-]{10,}                 # Slack
    | sk-(?:proj|svcacct|admin|ant|or|live|test|lf)-[A-Za-z0-9_-]{16,}          # OpenAI, Anthropic
    | sk-(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}
    | (?:sk|rk|pk|whsec)_(?:live|test)_[A-Za-z0-9]{10,}     # Stripe
    | AIza[A-Za-z0-9_-]{30,} | ya29\.[A-Za-z0-9_-]{20,} | GOCSPX-[A-Za-z0-9_-]{20,}  # Google
    | wandb_v1_[A-Za-z0-9_]{20,} | local-[0-9a-f]{40}(?![0-9a-f])               # W&B
    | npm_[A-Za-z0-9]{30,} | pypi-AgE[A-Za-z0-9_-]{20,} | dckr_pat_[A-Za-z0-9_-]{20,}
    | do[oprt]_v1_[0-9a-f]{40,} | dapi[0-9a-f]{32} | nvapi-[A-Za-z0-9_-]{20,}
    | r8_[A-Za-z0-9]{30,} | gsk_[A-Za-z0-9]{30,} | xai-[A-Za-z0-9]{40,} | pul-[0-9a-f]{40}
    | hv[sbr]\.[A-Za-z0-9_-]{20,} | SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}
    | AGE-SECRET-KEY-1[A-Z0-9]{20,} | lin_api_[A-Za-z0-9]{30,} | shp(?:at|ca|pa|ss)_[0-9a-f]{32}
    | eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+){0,2}   # JWT
    | [A-Za-z0-9+/]{86}==(?![A-Za-z0-9+/=])                 # account keys of Azure
    )"""
)
WEBHOOK = re.compile(
    r"(?i)(?<=://)(?:hooks\.slack\.com/(?:services|workflows|triggers)/"
    r"|(?:[a-z]+\.)?discord(?:app)?\.com/api/webhooks/"
    r"|[a-z0-9.-]*webhook\.office\.com/|outlook\.office\.com/webhook/"
    r"|api\.telegram\.org/bot)[^\s'\"<>]+"
)
"""Addresses to which anyone who knows them can send."""

# To the end of the text if the last line is missing: a cut key is still most of a key. Escaped
# line breaks are part of it; `LS0tLS1CRUdJTi` is the base64 of its first line.
PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?s:.*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|.*)"
    r"|PuTTY-User-Key-File-[0-9](?s:.*)"
    r"|LS0tLS1CRUdJTi[A-Za-z0-9+/=_-]{16,}"
)

# --- URLs

_BUCKETS = (
    "s3",
    "s3a",
    "s3n",
    "gs",
    "gcs",
    "r2",
    "oss",
    "cos",
    "b2",
    "minio",
    "abfs",
    "abfss",
    "az",
)
_NO_PORT = "".join(rf"|(?<={scheme}://)[^/@\s:]*:(?!:)[^@\s]*(?=@)" for scheme in _BUCKETS)
USERINFO = re.compile(
    # user:password@host, where the password may hold an @
    r"(?i)(?<=://)[^/@\s:]*:(?!:)[^/\s'\"]+(?=@)"
    # the same with a slash in the password, as keys of AWS have; host:port/path@x is none
    r"|(?<=://)(?!\[?[0-9A-Za-z.-]+\]?:[0-9]{1,5}/)[^/@\s:]*:(?!:)[^@\s'\"]+(?=@)"
    + _NO_PORT
    +
    # a token as the user
    r"|(?<=http://)[^/@\s:]+(?=@)|(?<=https://)[^/@\s:]+(?=@)"
)
"""Credentials before the host of a URL."""

_PARAMETER = re.compile(r"([?&;#])([A-Za-z0-9_.%-]+)=([^&\s'\"<>;#]*)")

# --- headers and assignments in texts

_SCHEMES = r"(?:bearer|basic|token|digest|negotiate|apikey|splunk|key)"
_AUTHORIZATION = re.compile(
    r"(?i)(?<![A-Za-z0-9-])(?:proxy-|x-)?authorization(?:['\"]?\s*[:=]|['\"]\s*,)\s*(?:b?['\"])?"
    rf"(?!(?:{_SCHEMES}\s+)?<)(?P<scheme>{_SCHEMES}\s+)?(?P<value>[^\s'\"\\,}}\]]+)"
)
_COOKIE = re.compile(
    r"(?i)(?<![A-Za-z0-9-])(?:set-)?cookie(?:['\"]?\s*[:=]|['\"]\s*,)\s*(?:b?['\"])?"
    r"(?!<)(?P<value>[^\r\n'\"\\}\]]*=[^\r\n'\"\\}\]]*|[^\s'\"\\}\]]+)"
)
_BEARER = re.compile(
    r"(?<![A-Za-z0-9])(?i:bearer|basic)\s+(?P<value>[A-Za-z0-9+/_.~=-]{6,})(?![A-Za-z0-9])"
)
_ASSIGNMENT = re.compile(
    r"(?<![A-Za-z0-9_.])(?<![A-Za-z0-9]-)(?P<name>[A-Za-z][A-Za-z0-9_.-]{0,80})['\"]?(?P<sign>\s?(?:=>|=|:)\s?)"
    r"(?P<value>\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|[^\s,;&'\"<>(){}\[\]]+)"
)
"""`name=value`, `name: value`, `"name": "value"`."""
# --token VALUE on a command line, ['--token', 'VALUE'] in its list.
_OPTION = re.compile(
    r"(?<![A-Za-z0-9-])--?(?P<name>[A-Za-z][A-Za-z0-9_-]{1,40})['\"]?,?[ \t]+['\"]?"
    r"(?P<value>[^\s'\"<-][^\s'\"]{5,})"
)
NOTHING = frozenset({"none", "null", "true", "false", "yes", "no", "on", "off"})
"""Values under any name that are no credential."""


def url_spans(text: str) -> Iterator[Span]:
    """Yield the credentials in URLs: user info, secret parameters, webhooks."""
    if "://" in text:
        for match in USERINFO.finditer(text):
            yield Span(*match.span())
        for match in WEBHOOK.finditer(text):
            yield Span(*match.span())

    for match in _PARAMETER.finditer(text):
        if match[3] and is_secret_parameter(match[2]):
            yield Span(*match.span(3))


def key_spans(text: str) -> Iterator[Span]:
    """Yield the keys of well-known services and private keys."""
    for match in KNOWN_FORMS.finditer(text):
        yield Span(*match.span())
    if "-----BEGIN" in text or "PuTTY-" in text or "LS0tLS1" in text:
        for match in PRIVATE_KEY.finditer(text):
            yield Span(*match.span())


def header_spans(text: str) -> Iterator[Span]:
    """Yield the values of headers that hold a credential."""
    for match in _AUTHORIZATION.finditer(text):
        # "authorization: check ..." is a sentence.
        if match["scheme"] or not _is_word(match["value"]):
            yield Span(*match.span("value"))

    for form in (_BEARER, _COOKIE):
        for match in form.finditer(text):
            # "Basic authentication" as well.
            if not _is_word(match["value"]):
                yield Span(*match.span("value"))


def assignment_spans(text: str) -> Iterator[Span]:
    """Yield the values that are assigned to names of credentials within a text."""
    position = 0
    while match := _ASSIGNMENT.search(text, position):
        # The value may be an assignment itself, as in storage.options=secret=...
        position = match.start("value")
        name = match["name"].rpartition(".")[2] or match["name"]
        if "=" in match["sign"] and is_secret_name(match["name"]):
            name = match["name"]  # fs.s3a.secret.key=...
        start, end = match.span("value")
        value = match["value"]
        is_quoted = value[0] in "'\""
        if is_quoted and len(value) > 1:
            value, start, end = value[1:-1], start + 1, end - 1

        if value and is_secret_name(name) and _is_assigned(name, match["sign"], value, is_quoted):
            position = end
            yield Span(start, end)

    for match in _OPTION.finditer(text):
        if is_secret_name(match["name"]) and _has_letters_and_digits(match["value"]):
            yield Span(*match.span("value"))


def _is_assigned(name: str, sign: str, value: str, is_quoted: bool) -> bool:
    """Whether the value after the name of a credential and this sign is the credential itself."""
    if value[0] in "<$" or value.lower() in NOTHING:
        return False
    if not is_strong_secret_name(name):
        # HF_TOKEN=..., token='...': what has letters and digits is no word. key=name, token: 3 are
        # options of many things.
        is_certain = name.isupper() or words_of(name)[-1] in ("token", "jwt", "pat")
        is_set = "=" in sign or is_quoted
        if is_certain and is_set and len(value) >= 8 and _has_letters_and_digits(value):
            return True
        return is_random_value(value)

    # In prose a colon ends a clause: "your password: the link ...". Headers are no prose.
    is_clause = ":" in sign and not is_quoted and not name.lower().startswith("x-")
    return not is_clause or (len(value) >= 6 and _is_mixed(value))


def content_spans(text: str) -> list[Span]:
    """Return the parts of data or generated text that are credentials by form in any context."""
    return [*url_spans(text), *key_spans(text)]


def secret_spans(text: str) -> list[Span]:
    """Return all parts of `text` that are credentials by form, not sorted; they may overlap."""
    return [*content_spans(text), *header_spans(text), *assignment_spans(text)]


# --- single values

CHOICES = as_set(
    "true false yes no on off none null auto default required optional enabled disabled anon "
    "anonymous google_default cloud cache browser sigv4 s3v4 basic bearer token env environment "
    "iam instance metadata"
)
"""Values of options named token, auth or key that choose a method and are no credential."""

_HEX = re.compile(r"(?:0x)?[0-9a-fA-F]+")
_UUID = re.compile(r"(?i)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_AWS_SECRET = re.compile(r"(?<![A-Za-z0-9/+=_.-])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=_.-])")
_KEY_FILE = re.compile(r"(?:[/~]|\.{1,2}/)[^\s:]*\.(?:json|pem|key|crt|p12|txt|ya?ml)")
_LOWER_RUN = re.compile(r"[a-z]{7}")


def is_key_file(value: str) -> bool:
    """Whether a text is the path of a file with a key, and not the key."""
    return _KEY_FILE.fullmatch(value) is not None


def is_aws_secret(text: str) -> bool:
    """Whether `text` holds a secret access key of AWS: 40 random letters of base64."""
    for match in _AWS_SECRET.finditer(text):
        # A path of 40 characters has words, and changes between cases and digits seldom.
        value = match[0]
        if _num_class_changes(value) >= 12 and _is_spread(value, min_entropy=4.2):
            return True
    return False


def is_random_value(value: str) -> bool:
    """Whether a text looks like a random key: long, without spaces, of many different characters.

    Hashes (hexadecimal), UUIDs, paths, URLs and names of words are not.
    """
    if len(value) < 16 or any(character.isspace() for character in value):
        return False
    if _HEX.fullmatch(value) or _UUID.fullmatch(value) or "://" in value or value[0] in "/~.":
        return False
    return _num_class_changes(value) >= len(value) / 5 and _is_spread(value, min_entropy=3.5)


def entropy(text: str) -> float:
    """Return the bits per character of a text, by how often each of its characters is in it."""
    bits = 0.0
    for count in Counter(text).values():
        share = count / len(text)
        bits -= share * math.log2(share)
    return bits


def _is_spread(value: str, min_entropy: float) -> bool:
    """Whether a text has lower case, upper case and digits, no word, and this many bits."""
    for test in (str.islower, str.isupper, str.isdigit):
        if not any(map(test, value)):
            return False
    return not _LOWER_RUN.search(value) and entropy(value) >= min_entropy


def _is_word(value: str) -> bool:
    """Whether a text is a word of a sentence: letters in one case, perhaps with a capital."""
    letters = value.rstrip(".,:;!?")
    return letters.isalpha() and letters[1:].islower()


def _has_letters_and_digits(value: str) -> bool:
    return any(map(str.isalpha, value)) and any(map(str.isdigit, value))


def _is_mixed(value: str) -> bool:
    """Whether a text has letters together with digits or signs, as few words have."""
    letters = value.strip(".,:;!?-")
    return any(map(str.isalpha, letters)) and any(not c.isalpha() and c != "-" for c in letters)


def _num_class_changes(text: str) -> int:
    """Return how often neighboring characters differ in kind: lower, upper, digit, other."""
    kinds = []
    for character in text:
        if character.islower():
            kinds.append("a")
        elif character.isupper():
            kinds.append("A")
        else:
            kinds.append("0" if character.isdigit() else "-")
    return sum(first != second for first, second in pairwise(kinds))
