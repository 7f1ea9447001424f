"""Fake credentials in the form of real ones, and the data files that use them.

The values are assembled here from random letters of a fixed seed: no file of the project holds one.
"""

from __future__ import annotations

import base64
import json
import random
import re
import string
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent / "secret_data"

_BASE62 = string.ascii_letters + string.digits
_BASE64 = _BASE62 + "+/"


def _random(length: int, letters: str = _BASE62, seed: int = 0) -> str:
    """Return random letters, of all three kinds if `letters` has them."""
    rng = random.Random(f"{seed} {length} {letters}")
    text = "".join(rng.choice(letters) for _ in range(length))
    return text


def _base64_url(document: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


_PEM_BODY = "\n".join(_random(64, _BASE64, seed) for seed in range(4))
_BEGIN, _END = "-----BEGIN " + "PRIVATE KEY-----", "-----END " + "PRIVATE KEY-----"

VALUES = {
    # A password that no form gives away.
    "V": "n0t-A-real-" + "s3cret_7f3a",
    "SHORT": "pw" + "-7q",
    "NUMBER": 8 * "4" + "1977",
    "AWS_ID": "AKIA" + _random(16, string.ascii_uppercase + string.digits),
    "AWS_TEMPORARY_ID": "ASIA" + _random(16, string.ascii_uppercase + string.digits, 1),
    "AWS_SECRET": "Ab1/" + _random(36, _BASE64, 2),
    "AWS_SECRET_WITH_SLASHES": "x7/Qw/" + _random(30, _BASE62, 3) + "/9zB",
    "HUGGING_FACE": "hf_" + _random(34, seed=4),
    "GITHUB": "ghp_" + _random(36, seed=5),
    "GITHUB_FINE": "github_pat_" + _random(22, seed=6) + "_" + _random(59, seed=6),
    "GITLAB": "glpat-" + _random(20, seed=7),
    "SLACK": "xoxb-" + "1234567890-" + _random(24, seed=8),
    "OPENAI": "sk-" + "proj-" + _random(48, seed=9),
    "OPENAI_OLD": "sk-" + "A1b" + _random(45, seed=10),
    "ANTHROPIC": "sk-" + "ant-api03-" + _random(40, seed=11),
    "GOOGLE": "AIza" + _random(35, seed=12),
    "GOOGLE_OAUTH": "ya29." + _random(60, seed=13),
    "WANDB": "wandb_v1_" + _random(40, seed=14),
    "WANDB_LOCAL": "local-" + _random(40, "0123456789abcdef", 15),
    "NPM": "npm_" + _random(36, seed=16),
    "STRIPE": "sk_" + "live_" + _random(24, seed=17),
    "VAULT": "hvs." + _random(90, seed=18),
    "DATABRICKS": "dapi" + _random(32, "0123456789abcdef", 19),
    "SENDGRID": "SG." + _random(22, seed=20) + "." + _random(43, seed=20),
    "AZURE_KEY": _random(86, _BASE64, 21) + "==",
    "AZURE_SIGNATURE": _random(43, seed=22) + "%3D",
    "JWT": ".".join(
        (
            _base64_url({"alg": "HS256", "typ": "JWT"}),
            _base64_url({"sub": "nobody", "iat": 1}),
            _random(43, seed=23),
        )
    ),
    "PEM": f"{_BEGIN}\n{_PEM_BODY}\n{_END}\n",
    "RSA_PEM": f"{_BEGIN}\n{_PEM_BODY}\n{_END}\n".replace("PRIVATE KEY", "RSA PRIVATE KEY"),
    "PEM_BASE64": base64.b64encode(f"{_BEGIN}\n{_PEM_BODY}\n{_END}\n".encode()).decode(),
    "RANDOM": "Zq8" + _random(29, seed=24),
    "SLACK_HOOK": "https://hooks.slack.com/" + "services/T0/B0/" + _random(24, seed=25),
    "BASIC": base64.b64encode(b"nobody:" + b"n0t-A-real-" + b"s3cret_7f3a").decode(),
}
"""Name in the data files -> value."""

_MARK = re.compile(r"@([A-Z][A-Z0-9_]*)@")


def fill(value: Any) -> Any:
    """Return nested data with the values in place of their marks, in keys too."""
    if isinstance(value, str):
        return _MARK.sub(lambda match: VALUES[match[1]], value)
    if isinstance(value, dict):
        return {fill(key): fill(item) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item) for item in value]
    return value


def marks(value: Any) -> list[str]:
    """Return the names of the values that nested data has marks of."""
    return sorted(set(_MARK.findall(json.dumps(value, default=str))))


def load(name: str) -> list[dict[str, Any]]:
    """Return the entries of a data file, with marks."""
    return yaml.safe_load((FOLDER / name).read_text("utf-8"))


def leaks(text: str, names: list[str], length: int = 7) -> list[str]:
    """Return the parts of the values `names` that are in `text`: `length` letters in a row or more.

    Part of a value is a leak, too: a message that is cut must not hold its start. Marks that the
    values begin with ("https://hooks.slack.com/") are no secret.
    """
    found = []
    for name in names:
        secret = VALUES[name].removeprefix("https://hooks.slack.com/services/")
        secret = re.sub(r"-----(BEGIN|END) [A-Z ]*PRIVATE KEY-----", "", secret).strip()
        secret = re.sub(
            r"^(LS0tLS1CRUdJTi\w{20}|wandb_v1_|github_pat_|sk-ant-api03-|eyJ\w{30})", "", secret
        )
        pieces = {secret[i : i + length] for i in range(max(1, len(secret) - length + 1))}
        found += [piece for piece in sorted(pieces) if piece.strip() and piece in text]
    return found
