"""Well-known file formats to rows, so that they can be trained on: tagged words, SQuAD, labelled files, parallel files.

Reads whole files behind any fsspec URL; every refusal names file and line. Writes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.sources.discovery import Row
from dist_ft.storage import filesystem

COMMENT = re.compile(r"# ?(\S+ = |newdoc|newpar)")
"""A line about a sentence, before its words, in files of the CoNLL-U kind."""


def read_conll(paths: Sequence[str], encoding: str = "utf-8", part: str | None = None) -> Iterator[Row]:
    """Yield {tokens, tags} of files with a word and its tag a line (first, last column), blanks between sentences."""
    for path in paths:
        words: list[str] = []
        tags: list[str] = []
        for number, line in enumerate([*_lines(path, encoding), ""], 1):
            columns = line.split("\t") if "\t" in line else line.split()
            if not line.strip():
                if words:
                    yield {"tokens": words, "tags": tags}
                words, tags = [], []
            elif line.startswith("-DOCSTART-") or (not words and COMMENT.match(line)):
                continue
            elif len(columns) < 2:
                raise _error(
                    path,
                    number,
                    f"has one column ({line.strip()[:40]}); a word and its tag are needed; "
                    "repair it",
                )
            else:
                words.append(columns[0])
                tags.append(columns[-1].strip())


def read_squad(paths: Sequence[str], encoding: str = "utf-8", part: str | None = None) -> Iterator[Row]:
    """Yield {id, title, question, context, answers: {text, answer_start}} of files in SQuAD's format, 1.1 or 2.0."""
    for path in paths:
        try:
            articles = json.loads("\n".join(_lines(path, encoding)))["data"]
            for number, article in enumerate(articles):
                for paragraph in article["paragraphs"]:
                    for asked in paragraph["qas"]:
                        answers = asked.get("answers") or []
                        yield {
                            "id": asked.get("id"),
                            "title": article.get("title") or f"article-{number}",
                            "question": asked["question"],
                            "context": paragraph["context"],
                            "answers": {
                                "text": [found["text"] for found in answers],
                                "answer_start": [found["answer_start"] for found in answers],
                            },
                        }
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                redact(
                    f"{path}: is not in SQuAD's format ({type(error).__name__}: {error}); {{data: "
                    "[{paragraphs: [{context, qas}]}]}} is needed; repair it"
                )
            ) from error


def read_labeled(
    paths: Sequence[str], encoding: str = "utf-8", part: str | None = None
) -> Iterator[Row]:
    """Yield {text, label} of files with a text a line, each given as PATH=LABEL."""
    for given in paths:
        path, equals, label = given.rpartition("=")
        if not equals or not path or not label:
            raise DataError(
                redact(
                    f"{given}: has no label; PATH=LABEL is needed (reviews.pos=positive); name it"
                )
            )
        for line in _lines(path, encoding):
            if line.strip():
                yield {"text": line.strip(), "label": label}


def read_parallel(
    paths: Sequence[str], encoding: str = "utf-8", part: str | None = None
) -> Iterator[Row]:
    """Yield {source, target} of two files whose lines belong together."""
    if len(paths) != 2:
        raise DataError(
            f"parallel: {len(paths)} files; two are needed, of sources and of targets; name both"
        )
    source, target = (_lines(path, encoding) for path in paths)
    if len(source) != len(target):
        raise DataError(
            redact(
                f"{paths[0]} has {len(source)} lines and {paths[1]} {len(target)}; as many are needed; "
                "repair them"
            )
        )
    for first, second in zip(source, target, strict=True):
        yield {"source": first.strip(), "target": second.strip()}


def read_pairs(paths: Sequence[str], encoding: str = "utf-8", part: str | None = None) -> Iterator[Row]:
    """Yield {text, label} of JSON files with a list of [text, label], or several such lists by name (`part`)."""
    for path in paths:
        try:
            found = json.loads("\n".join(_lines(path, encoding)))
        except json.JSONDecodeError as error:
            raise DataError(redact(f"{path}: is no JSON ({error}); repair it")) from error
        if isinstance(found, dict):
            if part not in found:
                raise DataError(
                    redact(f"{path}: --part={part}: there are {', '.join(found)}; name one")
                )
            found = found[part]
        for number, item in enumerate(found, 1):
            if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
                raise _error(path, number, "is no [text, label]; repair it")
            yield {"text": item[0], "label": item[1]}


IMPORTERS: dict[str, Callable[..., Iterator[Row]]] = {
    "conll": read_conll,
    "squad": read_squad,
    "labelled": read_labeled,
    "parallel": read_parallel,
    "pairs": read_pairs,
}
"""Formats by name."""


def _lines(path: str, encoding: str) -> list[str]:
    folder, _, name = path.rpartition("/")
    try:
        text = filesystem.Store(folder or ".").read(name).decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(
            redact(
                f"{path}: --encoding={encoding} can not read it ({error}); name the file's own, such as "
                "latin-1"
            )
        ) from error
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def _error(path: str, number: int, problem: str) -> DataError:
    return DataError(redact(f"{path} line {number}: {problem}"))
