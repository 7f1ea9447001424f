"""What `redact` hides: secrets of the environment in any spelling, and credentials by their form."""

from __future__ import annotations

import base64
import html
import json
import os
import quopri
import re
import shlex
import textwrap
import time
from collections.abc import Callable
from urllib.parse import quote, quote_plus, urlencode
from xml.sax.saxutils import escape, quoteattr

import pytest
import secret_values
import yaml

from dist_ft.core import redaction
from dist_ft.core.errors import ConfigError, DataError, SentError
from dist_ft.core.redaction import redact, redact_values

SECRETS = {
    "plain": "s3cr3tValue1977",
    "url characters": "s3cr3t/va+lue=1&x",
    "quotes": "s3c\"r3t'va\\lue",
    "spaces": "s3cr3t pass phrase 7",
    "markup": "s3<cr3t>&va$lue{x}%",
    "percent": "s3cr3t%41%value%2F",
    "accents": "s3crét-größe-7",
    "emoji": "s3cr3t-\U0001f511-key7",
    "several lines": "s3cr3t first\nline two 2\nline three 3",
    "six letters": "q7x-9k",
    "five letters": "q7x9k",
    "four letters": "q7x9",
}


def percent(text: str, characters: Callable[[int, str], bool] = lambda _index, _char: True) -> str:
    return "".join(
        "".join(f"%{byte:02X}" for byte in char.encode()) if characters(index, char) else char
        for index, char in enumerate(text)
    )


def json_escapes(text: str) -> str:
    content = text.encode("utf-16-be").hex()
    return "".join(f"\\u{content[i : i + 4]}" for i in range(0, len(content), 4))


def base64_of(text: str, before: str = "", url_safe: bool = False) -> str:
    encode = base64.urlsafe_b64encode if url_safe else base64.b64encode
    return encode((before + text).encode()).decode()


ENCODINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "repr": repr,
    "repr of bytes": lambda text: repr(text.encode()),
    "ascii": ascii,
    "repr of a repr": lambda text: repr(repr(text)),
    "JSON": json.dumps,
    "JSON with other characters": lambda text: json.dumps(text, ensure_ascii=False),
    "JSON in JSON": lambda text: json.dumps(json.dumps({"a": text})),
    "JSON with all escaped": lambda text: json_escapes(text),
    "JSON with all escaped, upper case": lambda text: json_escapes(text).upper().replace("U", "u"),
    "hexadecimal escapes": lambda text: "".join(f"\\x{byte:02x}" for byte in text.encode()),
    "octal escapes": lambda text: "".join(f"\\{byte:03o}" for byte in text.encode()),
    "percent-encoded": lambda text: quote(text, safe=""),
    "percent-encoded, lower case": lambda text: re.sub(
        "%..", lambda match: match[0].lower(), quote(text, safe="")
    ),
    "percent-encoded but slashes": lambda text: quote(text),
    "percent-encoded but signs": lambda text: quote(text, safe="/+=&:@"),
    "percent-encoded form": quote_plus,
    "percent-encoded in full": percent,
    "percent-encoded in full, lower case": lambda text: percent(text).lower(),
    "percent-encoded in part": lambda text: percent(text, lambda index, _char: index % 3 == 0),
    "percent-encoded twice": lambda text: quote(quote(text, safe=""), safe=""),
    "query": lambda text: urlencode({"x": text}),
    "base64": base64_of,
    "base64 after a user": lambda text: base64_of(text, "user:"),
    "base64 after a longer user": lambda text: base64_of(text, "someone:"),
    "base64 after another user": lambda text: base64_of(text, "nobody1:"),
    "base64 in the middle": lambda text: base64_of(text + ":after it", "before:"),
    "base64 for URLs": lambda text: base64_of(text, url_safe=True),
    "base64 for URLs after a user": lambda text: base64_of(text, "user:", url_safe=True),
    "base64 without padding": lambda text: base64_of(text).rstrip("="),
    "base64 over lines": lambda text: "\n".join(textwrap.wrap(base64_of(text), 5)),
    "basic authentication": lambda text: "Authorization: Basic " + base64_of(text, "user:"),
    "base32": lambda text: base64.b32encode(text.encode()).decode(),
    "hexadecimal": lambda text: text.encode().hex(),
    "hexadecimal, upper case": lambda text: text.encode().hex().upper(),
    "hexadecimal with colons": lambda text: text.encode().hex(":"),
    "hexadecimal dump": lambda text: text.encode().hex(" "),
    "HTML": html.escape,
    "HTML without quotes": lambda text: html.escape(text, quote=False),
    "XML": escape,
    "XML attribute": quoteattr,
    "HTML numbers": lambda text: "".join(f"&#{ord(char)};" for char in text),
    "HTML hexadecimal numbers": lambda text: "".join(f"&#x{ord(char):X};" for char in text),
    "shell": shlex.quote,
    "shell with backslashes": lambda text: "".join(
        char if char.isalnum() or char == "\n" else f"\\{char}" for char in text
    ),
    "shell in single quotes": lambda text: "'" + text.replace("'", "'\\''") + "'",
    "YAML": lambda text: yaml.safe_dump({"a": text}, width=1000),
    "YAML in double quotes": lambda text: yaml.safe_dump([text], default_style='"', width=1000),
    "YAML in single quotes": lambda text: "'" + text.replace("'", "''") + "'",
    "YAML folded": lambda text: yaml.safe_dump([text], default_style='"', width=10),
    "CSV": lambda text: '"' + text.replace('"', '""') + '"',
    "quoted-printable": lambda text: quopri.encodestring(text.encode()).decode(),
    "format string": lambda text: text.replace("{", "{{").replace("}", "}}"),
    "percent format": lambda text: text.replace("%", "%%"),
    "wrapped": lambda text: text[:3] + "\n" + text[3:],
    "wrapped with an indent": lambda text: text[:3] + "\n        " + text[3:],
    "wrapped in a table": lambda text: "| " + text[:3] + " |\n| " + text[3:] + " |",
    "wrapped by a box": lambda text: "│ " + text[:3] + " │\n│ " + text[3:] + " │",
    "wrapped with carriage returns": lambda text: text[:3] + "\r\n" + text[3:],
    "wrapped JSON": lambda text: json.dumps(text)[:4] + "\n" + json.dumps(text)[4:],
    "in a traceback": lambda text: f"ValueError: {text!r}",
    "assignment": lambda text: f"MY_PASSWORD={text}",
    "in a URL": lambda text: f"https://user:{quote(text, safe='')}@host/x",
    "in a query": lambda text: f"https://host/x?y={quote(text, safe='')}&z=1",
}


WITHIN_MORE = (
    "assignment",
    "basic authentication",
    "in a query",
    "in a traceback",
    "in a URL",
    "JSON in JSON",
    "query",
)
"""Encodings whose middle may be other text."""


def whole_secret(secret: str, encoding: str) -> bool:
    """Whether a secret this short is hidden in this encoding; see `secret_spellings`."""
    return len(secret) >= 6 or "over lines" not in encoding


def parts(secret: str) -> list[str]:
    """Return texts that must not be in a redacted text: lines of the secret, or most of it."""
    return [line for line in secret.split("\n") if line] if "\n" in secret else [secret]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_hidden_in_every_encoding(kind, encoding, monkeypatch):
    secret = SECRETS[kind]
    monkeypatch.setenv("MY_PASSWORD", secret)
    encoded = ENCODINGS[encoding](secret)
    redacted = redact(f"before {encoded} after")
    assert redacted.startswith("before ") and redacted.endswith(" after")
    if not whole_secret(secret, encoding):
        return

    assert "<MY_PASSWORD>" in redacted or "<redacted>" in redacted
    # The middle of the encoded text is a part of the secret.
    middle = encoded[len(encoded) // 2 - 3 : len(encoded) // 2 + 3]
    if sum(map(str.isalnum, middle)) >= 4 and encoding not in WITHIN_MORE:
        assert middle not in redacted
    for part in parts(secret):
        assert part not in redacted


def test_there_are_enough_encodings():
    assert len(ENCODINGS) >= 60


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "GITHUB_PAT",
        "PGPASS",
        "PGPASSWORD",
        "MYSQL_PWD",
        "DB_PASS",
        "SLACK_WEBHOOK",
        "SLACK_WEBHOOK_URL",
        "SENTRY_DSN",
        "REGISTRY_AUTH",
        "DOCKER_AUTH_CONFIG",
        "SSH_KEY_PASSPHRASE",
        "SESSION_COOKIE",
        "CI_JOB_JWT",
        "AZURE_STORAGE_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "GOOGLE_CREDENTIALS_JSON",
        "DEPLOY_KEY_BASE64",
        "SECRET_KEY_BASE",
        "API_TOKENS",
        "my_api_key",
        "awsSecretAccessKey",
        "LDAP_BIND_PW",
    ],
)
def test_names_of_secret_variables(name, monkeypatch):
    monkeypatch.setenv(name, "s3cr3tValue1977")
    assert redact("it is s3cr3tValue1977.") == f"it is <{name}>."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("RAY_AUTH_MODE", "token"),
        ("PWD", "/data/work"),
        ("OLDPWD", "/data/work"),
        ("SSH_AUTH_SOCK", "/tmp/agent.1"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token"),
        ("RAY_AUTH_TOKEN_PATH", "/etc/ray/token"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/gcs/account.json"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("MAX_NEW_TOKENS", "4096"),
        ("SORT_KEY", "name"),
        ("PASSWORD_STORE_DIR", "/data/store"),
        ("TOKEN_URI", "https://host/token"),
        ("MY_TOKEN", ""),
        ("MY_TOKEN", "abc"),
        ("USE_AUTH", "true"),
    ],
)
def test_variables_that_hold_no_secret(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    text = f"name token false /data/work 4096 {value} abc"
    assert redact(text) == text


def test_a_variable_that_is_no_text(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cr3t\udcff-1977")
    assert redact("a s3cr3t\udcff-1977 and s3cr3t%FF-1977") == "a <MY_TOKEN> and <MY_TOKEN>"
    assert redact("lone \ud800 surrogate %ff \\ud800") == "lone \ud800 surrogate %ff \\ud800"


def test_short_words_are_hidden_only_as_whole_words(monkeypatch):
    """A password such as `test` must not change `latest`."""
    monkeypatch.setenv("DB_PASSWORD", "test")
    assert redact("the latest tests: test, test_x 'test'") == (
        "the latest tests: <DB_PASSWORD>, test_x '<DB_PASSWORD>'"
    )
    monkeypatch.setenv("DB_PASSWORD", "1234")
    assert redact("step 12345 of 1234") == "step 12345 of <DB_PASSWORD>"


def test_values_of_any_length_are_hidden_after_their_name():
    assert redact("PGPASSWORD=ab psql") == "PGPASSWORD=<redacted> psql"
    assert redact('{"password": "x"}') == '{"password": "<redacted>"}'


def test_parts_of_a_secret_that_are_printed_alone(monkeypatch):
    monkeypatch.setenv("SSH_PRIVATE_KEY", secret_values.VALUES["PEM"])
    line = secret_values.VALUES["PEM"].splitlines()[2]
    assert redact(f"at {line}") == "at <SSH_PRIVATE_KEY>"

    account = {"type": "service_account", "private_key_id": "f00-1977-id", "project": "p-1977-x"}
    monkeypatch.setenv("GCP_CREDENTIALS", json.dumps(account))
    assert redact("f00-1977-id of p-1977-x") == "<GCP_CREDENTIALS> of p-1977-x"

    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=acc;AccountKey=k3y-1977/x=")
    assert redact("k3y-1977/x= of acc") == "<AZURE_STORAGE_CONNECTION_STRING> of acc"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://user:s3cr3t1977@proxy:3128"),
        ("DATABASE_URL", "postgres://user:s3cr3t1977@db/x"),
        ("PIP_INDEX_URL", "https://s3cr3t1977@index/simple"),
        ("DATA_URL", "https://host/x?sig=s3cr3t1977&se=1"),
    ],
)
def test_credentials_in_urls_of_any_variable(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert redact("with s3cr3t1977!") == f"with <{name}>!"


def test_remembered_secrets_are_hidden(monkeypatch):
    monkeypatch.setattr(redaction, "_remembered", {})
    redaction.remember_secret("RAY_AUTH_TOKEN", "f1le-token-1977")
    assert redact("Bearer-f1le-token-1977") == "Bearer-<RAY_AUTH_TOKEN>"


@pytest.mark.parametrize("text", secret_values.load("texts.yaml"))
def test_credentials_by_form_are_hidden(text):
    redacted = redact(secret_values.fill(text))
    assert not secret_values.leaks(redacted, secret_values.marks(text), length=5)
    assert "<redacted>" in redacted
    # Errors are redacted when they are made, logged, stored and printed: the second time changes nothing.
    assert redact(redacted) == redacted


@pytest.mark.parametrize("text", secret_values.load("honest_texts.yaml"))
def test_honest_texts_do_not_change(text):
    assert redact(text) == text


def test_values_are_redacted_and_stay_data(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "12345678")
    document = {
        "steps": 12345678,
        "text": 'with 12345678 "quoted"',
        "list": [1.5, None, True, "12345678"],
        "12345678": {"password": "a 12345678"},
    }
    assert redact_values(document) == {
        "steps": 12345678,
        "text": 'with <MY_TOKEN> "quoted"',
        "list": [1.5, None, True, "<MY_TOKEN>"],
        "<MY_TOKEN>": {"password": "a <MY_TOKEN>"},
    }


def test_errors_hold_no_credential(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cr3tValue1977")
    assert str(DataError("row with s3cr3tValue1977")) == "row with <MY_TOKEN>"
    error = ConfigError(["a=s3cr3tValue1977: wrong"], "s3://u:s3cr3tValue1977@b/x.yaml")
    assert "s3cr3t" not in f"{error} {error.problems} {error.source} {error!r}"
    sent = SentError("DataError", ["s3cr3tValue1977"])
    assert str(sent.restore(DataError)) == "<MY_TOKEN>"


def test_redaction_is_fast(monkeypatch):
    """A log line costs little, and a large log does not take minutes."""
    for number in range(20):
        monkeypatch.setenv(f"SERVICE_{number}_TOKEN", f"s3cr3t-{number}-" + os.urandom(12).hex())
    line = "step 120/2000 · loss 2.3145 · lr 1.9e-05 · s3://bucket/a?versionId=3 · 12,345 tokens/s"
    redact(line)

    start_s = time.perf_counter()
    for _ in range(200):
        redact(line)
    seconds_per_line = (time.perf_counter() - start_s) / 200
    assert seconds_per_line < 0.005

    start_s = time.perf_counter()
    redact(f"{line} %20 \\n &amp;\n" * 10_000)  # 1 MB, with escapes
    assert time.perf_counter() - start_s < 30
