"""A notice about a run, as a document that holds no credential."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypedDict

from dist_ft.config.sections.log import NotifyEvent
from dist_ft.core.logs import redact

MAX_MESSAGE = 2000
"""Characters of a message."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
VARIABLE_PREFIX = "DIST_FT_"


class NoticeDocument(TypedDict):
    """A notice as JSON; the keys are those of `Notice`."""

    event: NotifyEvent
    run: str
    storage: str
    step: int | None
    time: str
    message: str


class WebhookDocument(NoticeDocument):
    """What a webhook gets.

    Attributes:
        text: what Slack shows.
    """

    text: str


@dataclass(frozen=True)
class Notice:
    """A notice.

    Attributes:
        event: what happened.
        run: name of the run.
        storage: URL of the run's folder, without credentials.
        step: last step that is known; None before the first.
        time: when it happened, ISO 8601 in UTC.
        message: one line.
    """

    event: NotifyEvent
    run: str
    storage: str
    step: int | None
    time: str
    message: str

    def to_json(self) -> NoticeDocument:
        """Return the document that a command reads."""
        return {
            "event": self.event,
            "run": self.run,
            "storage": self.storage,
            "step": self.step,
            "time": self.time,
            "message": self.message,
        }

    def to_webhook(self) -> WebhookDocument:
        """Return the document that a webhook gets: also with `text`, which Slack shows."""
        # Slack reads <!channel> and <URL> in a text as commands of its own.
        text = f"dist_ft run {self.run}: {self.message}"
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return {"text": escaped, **self.to_json()}

    def to_environment(self) -> dict[str, str]:
        """Return the document as environment variables of a command."""
        variables = {}
        for name, value in self.to_json().items():
            variables[VARIABLE_PREFIX + name.upper()] = "" if value is None else str(value)
        return variables


def make_notice(
    event: NotifyEvent, run: str, storage: str, step: int | None, message: str
) -> Notice:
    """Return a notice of now, from a `message` and a `storage` URL of any content."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Notice(event, run, clean(storage), step, now, clean(message))


def clean(text: str) -> str:
    """Return `text` on one line, without credentials and control characters, and not too long."""
    # Redacted before the cut, which could leave a part of a credential that is not recognized.
    text = _CONTROL.sub(" ", redact(text)).strip()
    if len(text) <= MAX_MESSAGE:
        return text
    return text[: MAX_MESSAGE - 3] + "..."
