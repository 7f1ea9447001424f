"""Credentials are found in files of any length, in any encoding; examples and patterns are not."""

from __future__ import annotations

import base64
import json
import random
import string
import tracemalloc
from urllib.parse import quote

import pytest

from dist_ft.cluster.jobs import package, secret_content
from dist_ft.cluster.jobs.secret_content import SecretScanner, variable_spellings

# Written in two parts, so that this file holds none of them.
MARKER = "-----BEGIN RSA PRIVATE " + "KEY-----"
rng = random.Random(3)


def letters(count, alphabet=string.ascii_letters + string.digits):
    return "".join(rng.choice(alphabet) for _ in range(count))


BODY = "\n".join(letters(64) for _ in range(8))
KEY = f"{MARKER}\n{BODY}\n-----END RSA PRIVATE " + "KEY-----\n"
TOKENS = {
    "a Hugging Face token": "hf_" + letters(34),
    "an AWS access key": "AKIA" + letters(16, string.ascii_uppercase + string.digits),
    "an AWS secret key": "aws_secret_access_key = " + letters(40),
    "a GitHub token": "ghp_" + letters(36),
    "a GitLab token": "glpat-" + letters(20),
    "a Slack token": "xoxb-" + letters(30),
    "a Slack webhook": "https://hooks.slack.com/services/T0AAAAAAA/B0AAAAAAA/" + letters(24),
    "a Google API key": "AIza" + letters(35),
    "an OpenAI key": "sk-" + letters(20) + "T3BlbkFJ" + letters(20),
    "an Anthropic key": "sk-ant-" + letters(90),
    "an npm token": "npm_" + letters(36),
    "a PyPI token": "pypi-AgEI" + letters(60),
    "a Databricks token": "dapi" + letters(32, "0123456789abcdef"),
    "an Azure storage key": "AccountKey=" + letters(86) + "==",
    "an age key": "AGE-SECRET-KEY-1" + letters(58, string.ascii_uppercase + string.digits),
    "a JSON web token": f"eyJ{letters(20)}.eyJ{letters(60)}.{letters(43)}",
    "a Vault token": "hvs." + letters(30),
}


def scan(name, content, variables=None, chunk=1000):
    scanner = SecretScanner(name, variables or {})
    for start in range(0, len(content), chunk):
        scanner.feed(content[start : start + chunk])
    return scanner.found


@pytest.mark.parametrize("kind", TOKENS)
def test_token_of_a_known_service(kind):
    token = TOKENS[kind].encode()
    assert scan("notes.txt", b"x = '" + token + b"'\n") == kind
    assert scan("train.py", b"\n" * 500 + b'x = "' + token + b'"\n') == kind
    assert scan("a.json", json.dumps({"a": token.decode() + "\n"}).encode()) == kind


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("cut", [1, 5, 20])
def test_token_between_two_chunks(kind, cut):
    token = TOKENS[kind].encode()
    scanner = SecretScanner("a.bin", {})
    scanner.feed(bytes(1000) + token[:cut])
    scanner.feed(token[cut:] + bytes(10))
    assert scanner.found == kind


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_token_in_utf_16(encoding):
    content = f"\ufeff token: {TOKENS['a GitHub token']}\n".encode(encoding)
    assert scan("notes.txt", content, chunk=7) == "a GitHub token"


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "x" * 34,
        "token: hf_your_token",
        "AKIAIOSFODNN7EXAMPLE",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "hf_hub_download(repo_id, filename)",
        "os.environ['AWS_SECRET_ACCESS_KEY']",
        "sk-learn",
        "npm_config_registry=https://registry.npmjs.org",
        "xoxb-...",
        "re.compile(r'ghp_[A-Za-z0-9]{36}')",
        "the key eyJ is how a JSON web token starts",
    ],
)
def test_example_is_no_token(text):
    assert scan("readme.md", text.encode()) is None and scan("a.txt", text.encode()) is None


@pytest.mark.parametrize(
    "content",
    [
        KEY,
        KEY.replace("\n", "\r\n"),
        json.dumps({"key": KEY}),
        json.dumps({"cells": [{"source": [line + "\n" for line in KEY.split("\n")]}]}),
        json.dumps(json.dumps({"key": KEY})),
        f'KEY = """{KEY}"""',
        f"KEY = {KEY!r}",
        KEY.replace("RSA ", ""),
        KEY.replace("RSA", "OPENSSH"),
        KEY.replace("RSA", "EC"),
        KEY.replace("RSA", "ENCRYPTED"),
        MARKER + "\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0123456789ABCDEF\n\n" + BODY,
        "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----\nVersion: GnuPG v2\n\n" + BODY,
        "---- BEGIN SSH2 ENCRYPTED PRIVATE " + "KEY ----\nComment: mine\n" + BODY,
        "client-key-data: " + base64.b64encode(KEY.encode()).decode(),
    ],
)
@pytest.mark.parametrize("name", ["a.py", "notebook.ipynb", "data.json", "notes", "x.md"])
@pytest.mark.parametrize("offset", [0, 999, 5 * 2**20])
def test_private_key_in_any_file_at_any_place(name, content, offset):
    found = scan(name, b"\n" * offset + content.encode(), chunk=2**20 if offset > 1000 else 1000)
    assert found == "a private key"


def test_private_key_in_utf_16():
    assert scan("key.txt", KEY.encode("utf-16")) == "a private key"


@pytest.mark.parametrize(
    "code",
    [
        'PATTERN = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")\n',
        f'if "{MARKER}" in text:\n    raise ValueError("a private key")\n',
        f"Paste the key:\n\n    {MARKER}\n    ...\n",
    ],
)
def test_code_and_documentation_may_name_the_marker(code):
    assert scan("check.py", code.encode()) is None and scan("keys.md", code.encode()) is None
    if MARKER in code:
        assert scan("key.txt", code.encode()) == "a private key", "but other files may not"


VALUE = 'hush/hush+"hush"\\ütf\nöß=='


@pytest.mark.parametrize(
    "written",
    [
        VALUE,
        json.dumps(VALUE),
        json.dumps(VALUE, ensure_ascii=False),
        quote(VALUE, safe=""),
        quote(VALUE, safe="")
        .replace("%2F", "%2f")
        .replace("%2B", "%2b")
        .replace("%C3", "%c3")
        .replace("%BC", "%bc")
        .replace("%0A", "%0a")
        .replace("%B6", "%b6")
        .replace("%9F", "%9f")
        .replace("%3D", "%3d")
        .replace("%5C", "%5c"),
        base64.b64encode(VALUE.encode()).decode(),
        base64.b64encode(b"user:" + VALUE.encode() + b" and more").decode(),
        base64.b64encode(b"a" + VALUE.encode()).decode(),
        VALUE.encode().hex(),
        VALUE.encode("utf-16-le"),
    ],
)
def test_value_of_a_secret_variable_in_any_encoding(monkeypatch, written):
    monkeypatch.setenv("MY_STORE_SECRET", VALUE)
    content = written if isinstance(written, bytes) else written.encode()
    for filler in (b"", b"x" * 995, bytes(3 * 2**20)):
        content_of_file = b"before " + filler + content + b" after"
        found = scan("a.py", content_of_file, variable_spellings(), chunk=2**20)
        assert found == "the value of MY_STORE_SECRET"
    assert scan("a.py", b"hush/hush", variable_spellings()) is None


def test_short_values_and_paths_are_not_secret(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "short")
    monkeypatch.setenv("MY_TOKEN_PATH", "/home/me/token-file")
    names = secret_content.secret_variables()
    assert "MY_SECRET" not in names and "MY_TOKEN_PATH" not in names


def test_large_file_is_searched_to_its_end_in_little_memory(tmp_path):
    with open(tmp_path / "large.bin", "wb") as file:
        for _ in range(48):
            file.write(rng.randbytes(2**20))
        file.write(KEY.encode())
    tracemalloc.start()
    try:
        [line] = package.find_problems(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "large.bin contains a private key" in line
    assert peak < 12 * 2**20


def test_random_bytes_are_no_credential():
    content = rng.randbytes(16 * 2**20)
    assert scan("model.safetensors", content, chunk=2**20) is None
