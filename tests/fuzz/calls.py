"""Functions that a case can call in place of a command.

Each gets the project's folder, reads the mutated files in it, and yields what is wrong. An exception
that it does not expect ends the case as a crash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MUTATED = "mutated"
"""Folder of the files that a call reads, in the project."""
MAX_ROW_PROBLEM = 3000


def _each_file(
    project: Path, read: Callable[[Path], object], *allowed: type[Exception]
) -> Iterator[str]:
    """Read each mutated file; yield the errors whose text is not one clear line."""
    for path in sorted((project / MUTATED).iterdir()):
        try:
            read(path)
        except allowed as error:
            yield from unclear(error)


def unclear(error: Exception) -> Iterator[str]:
    """Yield what is wrong with the text of an error.

    The command line escapes control characters and shortens what is long.
    """
    from dist_ft.core.errors import ConfigError

    lines = list(error.problems) if isinstance(error, ConfigError) else [str(error)]
    for line in lines:
        if not line.strip():
            yield f"{type(error).__name__} without a text"
        if len(line.splitlines()) > 1 and not isinstance(error, ConfigError):
            yield f"{type(error).__name__} of several lines: {line[:300]!r}"


def _unclear_rows(bad_rows: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the problems of skipped rows, which are stored."""
    for line in bad_rows:
        if " row " not in line:
            yield f"a skipped row is not named: {line[:300]!r}"
        if len(line) > MAX_ROW_PROBLEM:
            yield f"the problem of a row has {len(line):,} characters: {line[:200]!r}"


def read_manifests(project: Path) -> Iterator[str]:
    """Parse manifests: damaged or newer ones are refused."""
    from dist_ft.checkpoint.manifest import parse_manifest
    from dist_ft.core.errors import CheckpointError

    yield from _each_file(
        project, lambda path: parse_manifest(path.read_bytes(), path.name), CheckpointError
    )


def read_ledgers(project: Path) -> Iterator[str]:
    """Unpack ledger segments."""
    from dist_ft.checkpoint.ledger import unpack_rows
    from dist_ft.core.errors import CheckpointError

    yield from _each_file(
        project, lambda path: unpack_rows(path.read_bytes(), path.name), CheckpointError
    )


def read_fragments(project: Path) -> Iterator[str]:
    """Read the headers of fragment files whose checksums fit."""
    from dist_ft.checkpoint.checked_reads import CheckedFiles
    from dist_ft.checkpoint.fragments import FragmentReader
    from dist_ft.checkpoint.manifest import file_entry
    from dist_ft.core.errors import CheckpointError
    from dist_ft.storage.filesystem import Store

    def read(path: Path) -> None:
        store = Store(str(path.parent))
        files = CheckedFiles(store, [file_entry(path.name, path.read_bytes())], store)
        reader = FragmentReader(files)
        for name, key in sorted(reader.keys()):
            reader.read(name, key, 0, 1)

    yield from _each_file(project, read, CheckpointError)


def read_blocks(project: Path) -> Iterator[str]:
    """Open cache files: a damaged one counts as absent, and no error is allowed."""
    from dist_ft.data.blocks.token_cache import load_block

    for path in sorted((project / MUTATED).iterdir()):
        block = load_block(path)
        if block is not None and len(block.tokens) != block.offsets[-1]:
            yield f"{path.name}: a block whose offsets do not fit its tokens was opened"


def read_indexes(project: Path) -> Iterator[str]:
    """Load indexes of blocks, and use what a run uses of them first."""
    from dist_ft.core.errors import DataError
    from dist_ft.data.blocks import index_file
    from dist_ft.storage.filesystem import Store

    def read(path: Path) -> None:
        os.rename(path, path.with_suffix(".json"))
        index = index_file.load(Store(str(path.parent)), path.stem)
        assert index is not None
        index.total("num_segments")

    yield from _each_file(project, read, DataError)


def read_metrics(project: Path) -> Iterator[str]:
    """Read files of metrics."""
    from dist_ft.core.errors import StorageError
    from dist_ft.storage.filesystem import Store
    from dist_ft.training.metrics_log import FILE, read_metrics

    def read(path: Path) -> None:
        folder = path.parent.parent / f"run-{path.name}"
        folder.mkdir()
        os.rename(path, folder / FILE)
        read_metrics(Store(str(folder)))

    yield from _each_file(project, read, StorageError)


def encode_rows(project: Path) -> Iterator[str]:
    """Encode a shard, once refusing bad rows and once skipping them: both must agree."""
    from dist_ft.config.schema import DataSection, TaskSection
    from dist_ft.core.errors import DataError
    from dist_ft.data.encoding.make_encoder import make_encoder

    question = json.loads((project / "question.json").read_bytes())
    task = TaskSection.model_validate(_task(question))
    tokenizer = _tokenizer(project)

    refusal: DataError | None = None
    num_skipped = 0
    for bad_rows in ("error", "skip"):
        values = {"train": question["shard"], **question["data"], "bad_rows": bad_rows}
        data = DataSection.model_validate(values)
        try:
            for shard, rows in _read(data):
                encoded = make_encoder(tokenizer, data, task, 32).encode(rows, shard.url)
                num_skipped += len(encoded.bad_rows)
                if len(encoded.offsets) != len(rows) + 1:
                    yield f"{len(rows)} rows became {len(encoded.offsets) - 1} samples"
                yield from _unclear_rows(encoded.bad_rows)
        except DataError as error:
            yield from unclear(error)
            if bad_rows == "skip":
                return  # the whole shard is refused
            refusal = error

    if bool(refusal) != bool(num_skipped):
        yield f"bad_rows=error gives {refusal!r}, bad_rows=skip skips {num_skipped} rows"


def _task(question: dict[str, Any]) -> dict[str, Any]:
    """Return the section `task`."""
    from dist_ft.config.task_facts import task_class

    section: dict[str, Any] = {"name": question["task"]}
    if task_class(question["task"]).has_labels:
        section["labels"] = question["labels"]
    if question["task"] == "question_answering":
        section["stride"] = 4
    return section


def _read(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each shard with all its rows."""
    from dist_ft.data.sources import readers
    from dist_ft.data.sources.discovery import discover_shards

    for shards in discover_shards(data.train):
        for shard in shards:
            yield shard, list(readers.iter_rows(shard))


def _tokenizer(project: Path) -> Any:
    from dist_ft.config.schema import ModelSection
    from dist_ft.model.loading.load import load_tokenizer

    folder = next(name for name in ("model", "bert", "bart") if (project / name).exists())
    return load_tokenizer(ModelSection(path=folder))


def fill_templates(project: Path) -> Iterator[str]:
    """Use a template on rows; what it cannot do is refused as an error of the config or the row."""
    from dist_ft.core.errors import ConfigError, DataError, ModelError

    question = json.loads((project / "question.json").read_bytes())
    try:
        encoded = _fill(project, question["use"], question["template"])
    except (ConfigError, DataError, ModelError) as error:
        yield from unclear(error)
        return
    yield from _unclear_rows(encoded.bad_rows)


def _fill(project: Path, use: str, template: str) -> Any:
    from dist_ft.config.load import load_config
    from dist_ft.data.encoding.make_encoder import make_encoder
    from fuzz.documents import base_document

    task = "sequence_classification" if use == "label" else "causal_lm"
    document = base_document(task, "templates")
    document["model"]["path"] = "model"
    document["data"]["bad_rows"] = "skip"
    rows: list[Any] = [{"text": "the fox", "label": "animal"}]
    if use == "label":
        document["task"]["labels"] = ["animal", "food"]
        document["prompting"] = {"method": "likelihood", "templates": [template]}
    elif use == "prompt":
        document["data"]["prompt_template"] = template
        rows = [{"prompt": "say", "response": "the fox"}]
    else:
        turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "the fox"}]
        rows = [{"messages": turns * 2}]

    config = load_config(document)
    tokenizer = _tokenizer(project)
    tokenizer.chat_template = template if use == "chat" else None
    encoder = make_encoder(tokenizer, config.data, config.task, 32, config.prompting)
    return encoder.encode(rows, "rows.jsonl")
