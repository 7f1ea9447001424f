"""Names that stand for a credential, and names that only look like one."""

from __future__ import annotations

import pytest

from dist_ft.config.error_messages import schema_paths
from dist_ft.core.secret_names import (
    as_set,
    is_plain_name,
    is_secret_name,
    is_secret_parameter,
    is_secret_variable,
    words_of,
)

SECRET = as_set(
    "key secret token password passwd pwd passphrase auth http_auth basicAuth Authorization "
    "Proxy-Authorization Cookie cookies Set-Cookie X-Api-Key x-auth-token api_key apikey api-key "
    "access_key access_key_id aws_secret_access_key aws_session_token secret_key SSECustomerKey "
    "CopySourceSSECustomerKey account_key application_key app_key pkey private_key private_key_id "
    "client_secret refresh_token access_token accessToken bearer_token sas_token connection_string "
    "shared_access_signature credential credentials jwt dsn webhook encryption_key userPassword "
    "password2 db_pass kerb_password signature session_token hf_token oauth_token"
)
HONEST = as_set(
    "max_new_tokens tokens num_tokens tokenizer tokenizer_processes token_uri token_classification "
    "eos_token pad_token bos_token unk_token mask_token eos_token_id cache_token page_token "
    "next_token prompt_key label_key sort_key primary_key partition_key cache_key public_key keys "
    "SSEKMSKeyId kms_key_id BucketKeyEnabled secret_name secretName password_file auth_mode "
    "auth_type auth_url credential_source token_ttl token_limit key_file key_filename keyboard "
    "monkey compass bypass forward_pass num_passes pass_through author authority encoder secretary "
    "signature_version requester_pays password_reset privacy key_value keep_last NCCL_IB_PKEY"
)


@pytest.mark.parametrize("name", sorted(SECRET))
def test_names_of_credentials(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", sorted(HONEST))
def test_names_of_other_things(name):
    assert not is_secret_name(name)


def test_no_field_of_the_schema_has_the_name_of_a_credential():
    """Then a misspelled section does not turn an honest field into a credential."""
    for path in schema_paths():
        assert not is_secret_name(path.rpartition(".")[2]), path


@pytest.mark.parametrize(
    "name",
    [
        "Policy",
        "sig",
        "X-Amz-Signature",
        "private_token",
        "jwt",
        "key",
        "x-api-key",
        "AWSAccessKeyId",
    ],
)
def test_parameters_of_urls_that_are_secret(name):
    assert is_secret_parameter(name)


@pytest.mark.parametrize(
    "name", ["versionId", "download", "format", "keys", "page", "revision", "se", "sv"]
)
def test_parameters_of_urls_that_are_not(name):
    assert not is_secret_parameter(name)


def test_words_of_names():
    assert words_of("SSECustomerKey") == ("sse", "customer", "key")
    assert words_of("X-Api-Key2") == ("x", "api", "key")
    assert words_of("aws_secret_access_key") == ("aws", "secret", "access", "key")
    assert words_of("123") == ()


def test_variables():
    assert is_secret_variable("AWS_ACCESS_KEY_ID") and is_secret_variable("SLACK_WEBHOOK_URL")
    for name in ("PWD", "TOKENIZERS_PARALLELISM", "RAY_AUTH_MODE", "HOME", "LS_COLORS", "RUN_ID"):
        assert not is_secret_variable(name)


def test_names_that_a_message_may_quote():
    for name in (
        "schedule.steps",
        "storage.options.s3.secret",
        "stage3_max",
        "data.train.0.path",
        "X-Api-Key",
    ):
        assert is_plain_name(name)
    for text in ("s3cr3t", "a=b", "a b", "Zq8x9", "x" * 200, "", "https://h"):
        assert not is_plain_name(text)
