"""No credential reaches a log line; ranks other than 0 log only warnings."""

from __future__ import annotations

import logging

import pytest

from dist_ft.core import logs
from dist_ft.core.logs import redact


@pytest.fixture(autouse=True)
def _restored_loggers():
    """Restore the process's loggers."""
    logger = logging.getLogger("dist_ft")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_SAS_TOKEN",
        "db_password",
        "WANDB_API_KEY",
        "SSH_PRIVATE_KEY",
    ],
)
def test_values_of_secret_variables_are_redacted(name, monkeypatch):
    monkeypatch.setenv(name, "s3cr3t/value+1")
    assert redact("it is s3cr3t/value+1.") == f"it is <{name}>."
    assert redact("url?x=s3cr3t%2Fvalue%2B1") == f"url?x=<{name}>"


def test_a_secret_inside_another_is_redacted(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    assert redact("abcdefgh-and-more abcdefgh") == "<B_TOKEN> <A_TOKEN>"


def test_other_text_is_not_redacted(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for text in (
        "false",
        "10.0.0.1:6379",
        "s3://bucket/a/b?versionId=3",
        "abfss://container@account.net/x",
        "http://127.0.0.1:5000/x",
        "a:b@c",
        "keep=1&keys=2",
    ):
        assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://user:pass@host/x", "s3://<redacted>@host/x"),
        ("redis://:pass@host/x", "redis://<redacted>@host/x"),
        ("https://ghp_token@github.com/x", "https://<redacted>@github.com/x"),
        ("https://x/y?sig=abc&se=1", "https://x/y?sig=<redacted>&se=1"),
        (
            "https://x/y?a=1&X-Amz-Signature=abc&X-Amz-Credential=k/1",
            "https://x/y?a=1&X-Amz-Signature=<redacted>&X-Amz-Credential=<redacted>",
        ),
        ("https://x/y?X-Goog-Signature=abc", "https://x/y?X-Goog-Signature=<redacted>"),
        ("https://x/y?access_token=abc'", "https://x/y?access_token=<redacted>'"),
        ("https://x/y?api_key=abc d", "https://x/y?api_key=<redacted> d"),
    ],
)
def test_credentials_in_urls_are_redacted(text, expected):
    assert redact(text) == expected


def test_log_lines_and_tracebacks_are_redacted(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    logs.setup_logging()
    try:
        raise ValueError("with hf_0123456789 inside")
    except ValueError:
        logging.getLogger("dist_ft.x").exception("failed at %s", "s3://u:p@h")
    output = capsys.readouterr().err
    assert output.startswith("ERROR failed at s3://<redacted>@h\nTraceback")
    assert "ValueError: with <HF_TOKEN> inside" in output and "hf_0" not in output


def test_other_ranks_log_only_warnings(capsys):
    for rank in (0, 1):
        logs.setup_logging(rank, 2)
        logging.getLogger("dist_ft.x").info("news")
        logging.getLogger("dist_ft.x").warning("trouble")
    assert (
        capsys.readouterr().err
        == "[rank 0] INFO news\n[rank 0] WARNING trouble\n[rank 1] WARNING trouble\n"
    )


def test_setting_up_again_replaces_level_and_handler(capsys):
    logs.setup_logging(level="debug")
    logs.setup_logging(level="warning")
    logging.getLogger("dist_ft.x").info("news")
    logging.getLogger("dist_ft.x").warning("once")
    assert capsys.readouterr().err == "WARNING once\n"


def test_third_parties_are_silenced_by_name_even_if_they_set_their_level_later(caplog):
    logs.quiet_third_parties()
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("httpx").setLevel(logging.INFO)
        logging.getLogger("httpx").info("one line per request")
        logging.getLogger("httpx").error("it broke")
        logging.getLogger("somebody.else").info("heard")
    assert [record.message for record in caplog.records] == ["it broke", "heard"]
