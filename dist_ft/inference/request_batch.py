"""Answers several requests for predictions as one batch, for servers.

Guarantees: a bad row fails its own request only, with one line that says what is wrong; the answer
to a request does not depend on the others in its batch; a fault of the server itself (out of
memory, a bug) is not blamed on a row. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dist_ft.core.errors import MAX_LINE, DistFtError
from dist_ft.core.json_documents import decode_json
from dist_ft.core.native_errors import is_panic
from dist_ft.core.printable import printable_line
from dist_ft.data.sources.discovery import Row

Prediction = dict[str, Any]
Predict = Callable[[Sequence[Row]], Sequence[Prediction]]
"""Returns a prediction for each row, in order; raises an error if one of them is bad."""

MAX_ROWS = 1024
"""Rows of a request; more would keep all other requests waiting."""
MAX_CHARACTERS = 1_000_000
"""Characters of the texts of a row, far above what any model reads."""
BODY_FORM = 'the body must be a JSON list of rows, such as [{"text": "..."}]'


class RequestError(DistFtError):
    """A request that cannot be answered, by its own fault; the text is one line."""


def parse_rows(body: bytes) -> list[Row]:
    """Return the rows of a request's body.

    Raises:
        RequestError: the body is no JSON list of objects, or a row cannot be used by any model.
    """
    try:
        rows = decode_json(body)
    except ValueError:
        raise RequestError(f"{BODY_FORM}. It is not valid JSON.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestError(f"{BODY_FORM}. Write it so.")

    if len(rows) > MAX_ROWS:
        raise RequestError(
            f"{len(rows)} rows: a request may have at most {MAX_ROWS}. Send several requests."
        )
    for number, row in enumerate(rows, 1):
        problem = find_row_problem(row)
        if problem:
            raise RequestError(f"row {number}: {problem}")
    return rows


def find_row_problem(row: Row) -> str | None:
    """Return what makes a row unusable for any tokenizer, or None."""
    num_characters = 0
    for column, text in _texts(row):
        num_characters += len(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can write half of a character that is a pair in UTF-16.
            code = ord(text[error.start])
            return (
                f"'{printable_line(column)}' has half a character (U+{code:04X}) at position "
                f"{error.start}, which is no text. Only whole characters are allowed. Remove it."
            )

    if num_characters > MAX_CHARACTERS:
        return (
            f"its texts have {num_characters:,} characters, at most {MAX_CHARACTERS:,} are "
            "allowed. Shorten it, or split it into several rows."
        )
    return None


def _texts(row: Row) -> Iterable[tuple[str, str]]:
    """Yield (column, text) of all texts of a row: names of columns, and values at any depth."""
    for column, value in row.items():
        yield column, column
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                yield column, item
            elif isinstance(item, list):
                pending.extend(item)
            elif isinstance(item, dict):
                pending.extend(item)
                pending.extend(item.values())


def answer_requests(
    predict: Predict, requests: Sequence[list[Row]]
) -> list[list[Prediction] | Exception]:
    """Return the predictions for each request, or the error that it alone failed with.

    That is a RequestError if it has a bad row, and any other one if the model failed in a way that
    no row explains.

    Args:
        predict: the model.
        requests: the rows of each request.
    """
    answers: list[list[Prediction] | Exception] = [[] for _ in requests]

    # A model may read rows of one batch differently if only some have a second text.
    groups: dict[tuple[frozenset[str], ...], list[int]] = {}
    for number, rows in enumerate(requests):
        columns = tuple(sorted({frozenset(row) for row in rows}, key=sorted))
        groups.setdefault(columns, []).append(number)

    for numbers in groups.values():
        rows_of_group = [row for number in numbers for row in requests[number]]
        try:
            predictions = iter(predict(rows_of_group))
            for number in numbers:
                answers[number] = [next(predictions) for _ in requests[number]]
        except BaseException as error:  # of one row or of the model: each request alone shows which
            _require_caught(error)
            for number in numbers:
                answers[number] = _answer_alone(predict, requests[number])
    return answers


def _answer_alone(predict: Predict, rows: list[Row]) -> list[Prediction] | Exception:
    try:
        return list(predict(rows))
    except DistFtError as error:
        return RequestError(printable_line(str(error)))
    except BaseException as error:
        _require_caught(error)
        if not _is_of_row(error):
            assert isinstance(error, Exception)
            return error
        first_line = (str(error).splitlines() or [""])[0]
        reason = printable_line(f"{type(error).__name__}: {first_line}"[:MAX_LINE])
        return RequestError(
            f"the model cannot read a row ({reason}). Check its columns and the type of their "
            "values."
        )


def _require_caught(error: BaseException) -> None:
    """Raise an error again that ends the process, such as KeyboardInterrupt."""
    if not isinstance(error, Exception) and not is_panic(error):
        raise error


def _is_of_row(error: BaseException) -> bool:
    """Return whether an error comes from what a row holds."""
    if isinstance(error, TypeError | ValueError | LookupError | OverflowError | AttributeError):
        return True

    # of a chat template, which may refuse messages
    is_of_template = any(base.__module__.startswith("jinja2") for base in type(error).__mro__)
    return is_of_template or is_panic(error)
