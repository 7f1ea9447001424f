"""What a notice contains, and what it never contains."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from dist_ft.training.notify.notice import MAX_MESSAGE, Notice, clean, make_notice


def notice(message: str = "complete", step: int | None = 7) -> Notice:
    return Notice("end", "r", "s3://bucket/r", step, "2026-01-01T00:00:00+00:00", message)


def test_document_has_all_fields() -> None:
    expected = {
        "event": "end",
        "run": "r",
        "storage": "s3://bucket/r",
        "step": 7,
        "time": "2026-01-01T00:00:00+00:00",
        "message": "complete",
    }
    assert notice().to_json() == expected
    assert notice().to_webhook() == {"text": "dist_ft run r: complete", **expected}
    assert notice().to_environment() == {
        "DIST_FT_EVENT": "end",
        "DIST_FT_RUN": "r",
        "DIST_FT_STORAGE": "s3://bucket/r",
        "DIST_FT_STEP": "7",
        "DIST_FT_TIME": "2026-01-01T00:00:00+00:00",
        "DIST_FT_MESSAGE": "complete",
    }
    assert notice(step=None).to_environment()["DIST_FT_STEP"] == ""
    assert notice(step=None).to_json()["step"] is None


def test_text_of_slack_has_no_commands() -> None:
    document = notice("<!channel> a & <http://x|y>").to_webhook()
    assert document["text"] == "dist_ft run r: &lt;!channel&gt; a &amp; &lt;http://x|y&gt;"
    assert document["message"] == "<!channel> a & <http://x|y>"


def test_new_notice_is_redacted_and_has_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    made = make_notice("give_up", "r", "s3://key:pw@bucket/r", 3, "failed with hf_0123456789")
    content = json.dumps(made.to_webhook())
    assert "hf_0123456789" not in content and "key:pw" not in content
    assert made.message == "failed with <HF_TOKEN>"
    assert datetime.fromisoformat(made.time).tzinfo is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\r\n three", "one two  three"),
        ("\x1b]0;title\x07 red \x1b[31m", "]0;title  red  [31m"),
        ("nul\x00 \u2028 \ud800", "nul"),
        ("x" * (MAX_MESSAGE + 1), "x" * (MAX_MESSAGE - 3) + "..."),
    ],
)
def test_text_is_one_line_without_control_characters(text: str, expected: str) -> None:
    assert clean(text) == expected
