"""Which names stand for a credential: of environment variables, options, parameters and headers.

A name is compared by its words (`aws_secret_access_key`, `X-Api-Key`, `SSECustomerKey`), because a
part of a word says nothing: `max_new_tokens`, `tokenizer` and `compass` hold no credential. Pure.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise


def as_set(words: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(words.split())


# customerKey, SSECustomerKey, api-key, api_key2: the words of a name, without digits at their ends.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

ALWAYS = as_set(
    "secret secrets password passwords passwd passphrase passwort pwd pw pass passcode credential "
    "credentials creds authorization auth cookie cookies jwt bearer apikey apikeys apitoken "
    "accesskey secretkey privatekey accountkey authtoken accesstoken pkey pat sas dsn webhook "
    "pgpass pgpassword connstr totp otp hmac signature sig awsaccesskeyid jsessionid"
)
"""Words that stand for a credential as the last word of a name."""

ANYWHERE = as_set(
    "secret secrets password passwords passwd passphrase credential credentials apikey accesskey "
    "secretkey privatekey accountkey pgpass pgpassword webhook"
)
"""Words that stand for a credential wherever they are in a name, unless a `REFERENCE` is last."""

COMPOUNDS = (
    ("access", "key"),
    ("secret", "key"),
    ("api", "key"),
    ("account", "key"),
    ("private", "key"),
    ("application", "key"),
    ("app", "key"),
    ("customer", "key"),
    ("master", "key"),
    ("signing", "key"),
    ("encryption", "key"),
    ("subscription", "key"),
    ("shared", "key"),
    ("storage", "key"),
    ("connection", "string"),
    ("conn", "str"),
    ("shared", "access"),
    ("access", "token"),
    ("auth", "token"),
    ("bearer", "token"),
    ("refresh", "token"),
    ("session", "token"),
    ("security", "token"),
    ("private", "token"),
    ("sas", "token"),
    ("key", "pair"),
    ("auth", "config"),
)
"""Pairs of words that stand for a credential anywhere in a name, unless a `REFERENCE` is last."""

REFERENCES = as_set(
    "file files path paths dir folder sock socket arn env var variable name names uri url urls "
    "endpoint host type types mode provider format algorithm method scheme version ttl timeout "
    "expiry expires expiration expire enabled enable disabled disable required optional size "
    "length len limit count num max min interval retries source process helper command cmd region "
    "scope scopes audience issuer store backend manager parallelism prompt template column field "
    "label labels class policy rotation policies service server check pattern regex prefix suffix "
    "reset change changed expired help filename filenames fd descriptor days hours minutes "
    "seconds ms refresh chain"
)
"""Last words of names that refer to a credential, or describe it, without holding it."""

_VOCABULARY = as_set(
    "eos bos pad unk mask cls sep special image audio video start end stop begin prompt decoder "
    "forced first last next per sequence additional new target cache think thinking system user "
    "assistant tool eot eom fim input output label text word sub single num max min total page "
    "continuation suffix prefix separator boundary class pooling vision placeholder"
)
"""Words before `token` in names of tokens of text, or of pages of a listing."""

_PLAIN_KEYS = as_set(
    "prompt text label labels image audio sort primary partition column group dataset feature "
    "target input output source data row id index cache public join foreign object hash dict json "
    "meta metadata answer answers response question context title message messages content role "
    "sample record field document doc entity tag tags category class query passage chosen rejected "
    "completion instruction system user name time date order map lookup unique composite natural "
    "weight weights state param parameter model tensor layer config env value bucket path file "
    "any other kms"
)
"""Words before `key` in names of columns and of entries of mappings."""

_PASSES = as_set(
    "forward backward first second third one two single multi all per low high band num max min "
    "last next eval train test by"
)
"""Words before `pass` where it is not a password."""

# HTTP headers that hold a credential and have no word for it.
_HEADERS = frozenset({"x-amz-content-sha256-key", "set-cookie", "x-functions-key", "x-csrf"})

# Parameters of URLs that are secret in a URL only: CloudFront's policy, keys of web services,
# tokens of content delivery networks.
_URL_PARAMETERS = as_set(
    "key policy code-verifier hdnea hdnts hdntl sid sessionid phpsessid access-token sign "
    "x-goog-credential x-amz-credential googleaccessid key-pair-id"
)


# Words with digits at their ends only, as names of fields have: no random text.
_PLAIN_NAME = re.compile(r"(?:(?:[A-Za-z]{1,30}[0-9]{0,4}|[0-9]{1,4})(?:[_./-]+|$)){1,16}")


def is_plain_name(text: str) -> bool:
    """Whether a message may quote `text`: a name, or a dotted path of names, and no random text."""
    return len(text) <= 100 and _PLAIN_NAME.fullmatch(text) is not None


def words_of(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case: (sse, customer, key) of SSECustomerKey."""
    return tuple(word.lower() for word in _WORD.findall(name))


@lru_cache(maxsize=8192)
def is_secret_name(name: str) -> bool:
    """Whether an option, field or header of this name holds a credential."""
    words = words_of(name)
    if not words:
        return False

    last = words[-1]
    if name.lower() in _HEADERS:
        return True

    # password_file, token_uri, auth_mode: where or how, and not the credential itself.
    if last in REFERENCES:
        return False
    if last in ("pass", "passes") and len(words) > 1:
        return words[-2] not in _PASSES
    # NCCL_IB_PKEY is the number of a partition of InfiniBand.
    if last == "pkey" and "ib" in words:
        return False
    if last in ALWAYS or not ANYWHERE.isdisjoint(words):
        return True

    pairs = tuple(pairwise(words))
    if any(compound in pairs for compound in COMPOUNDS):
        return True

    previous = words[-2] if len(words) > 1 else ""
    if last == "token":
        return previous not in _VOCABULARY
    if last == "key":
        # `key` alone is the access key of s3fs.
        return previous not in _PLAIN_KEYS
    return False


@lru_cache(maxsize=1024)
def is_strong_secret_name(name: str) -> bool:
    """Whether even a number or a short word under this name is a credential."""
    words = words_of(name)
    if not words or words[-1] in REFERENCES:
        return False

    pairs = tuple(pairwise(words))
    if any(compound in pairs for compound in COMPOUNDS):
        return True
    strong = ANYWHERE | {"pwd", "pw", "passcode", "pass", "authorization", "pkey", "pgpass"}
    if words[-1] == "pass":
        return len(words) == 1 or words[-2] not in _PASSES
    return not strong.isdisjoint(words)


@lru_cache(maxsize=1024)
def is_secret_parameter(name: str) -> bool:
    """Whether a parameter of a URL with this name (in its query or fragment) is a credential."""
    plain = name.lower().replace("_", "-").replace("%2d", "-").replace("%5f", "-")
    return plain in _URL_PARAMETERS or is_secret_name(name)


@lru_cache(maxsize=8192)
def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a credential."""
    # The working directories of a shell.
    if name in ("PWD", "OLDPWD"):
        return False

    words = words_of(name)
    if words and words[-1] in ("id", "base", "json", "b") and len(words) > 1:
        # AWS_ACCESS_KEY_ID, GOOGLE_CREDENTIALS_JSON, DEPLOY_KEY_BASE64: an encoding or a part.
        shorter = "_".join(words[:-1])
        return is_secret_name(shorter) or is_secret_name(name)
    if words and words[-1] in ("url", "uri", "endpoint") and "webhook" in words:
        return True
    if words and words[-1] in ("tokens", "keys") and len(words) > 1:
        return is_secret_name(name[:-1])
    return is_secret_name(name)
