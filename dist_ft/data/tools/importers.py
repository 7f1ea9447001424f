"""Import well-known formats as rows: tagged words, SQuAD, labeled or parallel files, pairs.

Reads whole files behind any fsspec URL. Every error names file and line. Nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.core.json_documents import parse_json
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line
from dist_ft.data.sources.discovery import Row
from dist_ft.storage.single_files import read_file

COMMENT = re.compile(r"# ?(\S+ = |newdoc|newpar)")
"""A line about a sentence, before its words, in CoNLL-U files."""
MAX_FILE_BYTES = 2 * 2**30
"""Bytes of a file: all of it is in memory."""
MAX_LINE_SHOWN = 40
"""Characters of a line in an error message."""


def read_conll(
    paths: Sequence[str], encoding: str = "utf-8", part: str | None = None
) -> Iterator[Row]:
    """Yield {tokens, tags} of files with one word per line and blank lines between sentences.

    The word is in the first column and its tag in the last.
    """
    for path in paths:
        words: list[str] = []
        tags: list[str] = []
        # an empty line at the end, so that the last sentence ends like all others
        for number, line in enumerate([*_read_lines(path, encoding), ""], 1):
            if not line.strip():
                if words:
                    yield {"tokens": words, "tags": tags}
                words = []
                tags = []
                continue

            # only before the first word: "# " may also be a word of the sentence
            is_comment = not words and COMMENT.match(line)
            if line.startswith("-DOCSTART-") or is_comment:
                continue

            # with tabs, a word may hold blanks
            columns = line.split()
            if "\t" in line:
                columns = line.split("\t")

            if len(columns) < 2:
                raise _line_error(
                    path,
                    number,
                    f"has one column ({line.strip()[:MAX_LINE_SHOWN]}). A word and its tag are "
                    "needed. Repair the line.",
                )

            words.append(columns[0])
            tags.append(columns[-1].strip())


def read_squad(
    paths: Sequence[str], encoding: str = "utf-8", part: str | None = None
) -> Iterator[Row]:
    """Yield {id, title, question, context, answers: {text, answer_start}} of SQuAD files.

    Reads the formats 1.1 and 2.0.
    """
    for path in paths:
        try:
            articles = _read_json(path, encoding)["data"]
            for number, article in enumerate(articles):
                for paragraph in article["paragraphs"]:
                    for question in paragraph["qas"]:
                        # questions of 2.0 that have no answer
                        answers = question.get("answers") or []
                        yield {
                            "id": question.get("id"),
                            "title": article.get("title") or f"article-{number}",
                            "question": question["question"],
                            "context": paragraph["context"],
                            "answers": {
                                "text": [answer["text"] for answer in answers],
                                "answer_start": [answer["answer_start"] for answer in answers],
                            },
                        }
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                redact(
                    f"{path}: is not in SQuAD's format ({type(error).__name__}: {error}). It must "
                    "be {data: [{paragraphs: [{context, qas}]}]}. Repair the file."
                )
            ) from error


def read_labeled(
    paths: Sequence[str], encoding: str = "utf-8", part: str | None = None
) -> Iterator[Row]:
    """Yield {text, label} of files with one text per line, each given as PATH=LABEL."""
    for argument in paths:
        # the last "=": paths of partitioned data hold others (lang=en/reviews.pos=positive)
        path, equals, label = argument.rpartition("=")
        if not equals or not path or not label:
            raise DataError(
                redact(
                    f"{argument}: has no label. It must be PATH=LABEL (reviews.pos=positive). Add "
                    "the label."
                )
            )

        for line in _read_lines(path, encoding):
            if line.strip():
                yield {"text": line.strip(), "label": label}


def read_parallel(
    paths: Sequence[str], encoding: str = "utf-8", part: str | None = None
) -> Iterator[Row]:
    """Yield {source, target} of two files whose lines belong together."""
    if len(paths) != 2:
        raise DataError(
            f"parallel: {len(paths)} files. Two are needed, of sources and of targets. Name both."
        )

    sources, targets = (_read_lines(path, encoding) for path in paths)
    if len(sources) != len(targets):
        raise DataError(
            redact(
                f"{paths[0]} has {len(sources)} lines but {paths[1]} has {len(targets)}. The "
                "number must be the same. Repair the files."
            )
        )

    for source, target in zip(sources, targets, strict=True):
        yield {"source": source.strip(), "target": target.strip()}


def read_pairs(
    paths: Sequence[str], encoding: str = "utf-8", part: str | None = None
) -> Iterator[Row]:
    """Yield {text, label} of JSON files with a list of [text, label].

    A file may hold several such lists by name; `part` is the name of one.
    """
    for path in paths:
        pairs = _read_json(path, encoding)

        if isinstance(pairs, dict):
            if part not in pairs:
                raise DataError(
                    redact(
                        f"{path}: --part={part}: unknown part. Choose one of {', '.join(pairs)}."
                    )
                )

            pairs = pairs[part]

        if not isinstance(pairs, list):
            raise DataError(
                redact(f"{path}: is no list. It must be a list of [text, label]. Repair the file.")
            )

        # JSON has no line numbers: errors name the number of the pair
        for number, pair in enumerate(pairs, 1):
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise _line_error(path, number, "is not [text, label]. Repair it.")
            yield {"text": pair[0], "label": pair[1]}


IMPORTERS: dict[str, Callable[..., Iterator[Row]]] = {
    "conll": read_conll,
    "squad": read_squad,
    "labelled": read_labeled,
    "parallel": read_parallel,
    "pairs": read_pairs,
}
"""The reader of each format."""


def _read_lines(path: str, encoding: str) -> list[str]:
    """Return the lines of a file."""
    try:
        text = read_file(path, MAX_FILE_BYTES).decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(
            redact(
                f"{path}: --encoding={encoding} cannot decode it ({error}). Set the encoding of "
                "the file, such as latin-1."
            )
        ) from error

    # Not `splitlines`: it also splits at characters that occur within texts, such as U+2028.
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def _read_json(path: str, encoding: str) -> Any:
    """Return the JSON value in a file."""
    name = printable_line(redact(path))
    return parse_json("\n".join(_read_lines(path, encoding)), name, "Repair the file.")


def _line_error(path: str, number: int, problem: str) -> DataError:
    return DataError(redact(f"{path} line {number}: {problem}"))
