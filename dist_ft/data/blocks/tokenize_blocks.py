"""Blocks to tokens, in this process or (run as a program) in one next to training.

As a program: the first line of standard input is a JSON `EncoderSetup`; each further line is a JSON
`BlockTask` (blocks of one pass over their shards). Each task is answered by one line: {} when the
blocks are in the cache, or {"error": `SentError`}. The program ends with its input, so it never
outlives its parent.

Arrays are those of `EncodedRows`: one dimension, of all tokens or of all rows.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from dist_ft.config import renames
from dist_ft.config.schema import DataSection, PromptingSection, TaskSection
from dist_ft.config.task_facts import allow_task
from dist_ft.core.errors import DataError, DistFtError, ModelError, SentError
from dist_ft.core.logs import redact
from dist_ft.core.output import redact_output
from dist_ft.data.block import Block, ShardRange
from dist_ft.data.blocks.token_cache import compute_fingerprint, write_block
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.encoding.encoded import EncodedRows
from dist_ft.data.encoding.make_encoder import make_encoder
from dist_ft.data.sources import lines, readers
from dist_ft.data.sources.discovery import Shard, Shards, require_unchanged


class EncoderSetup(TypedDict):
    """What a tokenizer process needs to create its parent's encoder, as JSON.

    Keys:
        tokenizer: folder with the saved tokenizer.
        data: the data section.
        limit_bytes: limit of the cache.
        options: `storage.options`.
        fingerprint: fingerprint of the parent's encoder, which that of the process must equal.
        recipe: what else decides the tokens (`Encoder.recipe`).
    """

    tokenizer: str
    data: dict[str, Any]
    limit_bytes: float
    options: dict[str, Any]
    fingerprint: str
    recipe: dict[str, Any]


class BlockTask(TypedDict):
    """Blocks to tokenize in one pass over their shards, as JSON.

    Keys:
        blocks: the blocks (`Block`).
        paths: the cache file of each block.
        check: whether shards must be as they were when they were listed.
        shards: the shards (`Shard`) by number, which JSON turns into a string.
    """

    blocks: list[dict[str, Any]]
    paths: list[str]
    check: bool
    shards: dict[int, dict[str, Any]]


class TaskResult(TypedDict, total=False):
    """A process's answer to a task; `error` is absent on success."""

    error: SentError


def iter_encoded_blocks(
    encoder: Encoder, blocks: Sequence[Block], shards: dict[int, Shard], check: bool = True
) -> Iterator[EncodedRows]:
    """Yield the tokens of each block; a shard with several ranges is read in one pass.

    With `check`, shards must be as they were when they were listed; without, the caller knows what
    the result must be.

    Raises:
        DataError: a shard vanished or changed, or a row cannot be used (with data.bad_rows=error).
        StorageError: storage does not respond.
    """
    numbered_ranges: list[tuple[int, ShardRange]] = []
    for number, block in enumerate(blocks):
        for shard_range in block.ranges:
            numbered_ranges.append((number, shard_range))

    # A block may span shards and a shard may span blocks, so a block is complete when none of its
    # ranges is left, not when a shard ends.
    num_ranges_left = [len(block.ranges) for block in blocks]
    encoded: list[EncodedRows] = []  # of the current block

    for shard_number, group in groupby(numbered_ranges, key=lambda item: item[1].shard):
        shard = shards[shard_number]
        own_ranges = list(group)
        ranges = [shard_range for _, shard_range in own_ranges]
        all_rows = readers.read_ranges(shard, ranges, encoder.data.max_row_bytes)
        first_of_read = readers.first_of_each_read(shard, ranges)

        for (number, shard_range), (_, rows) in zip(own_ranges, all_rows, strict=True):
            encoded.append(_encode(encoder, shard, shard_range, rows))
            num_ranges_left[number] -= 1

            # after reading: a change before or while the rows were read is noticed
            if check and shard_range in first_of_read:
                require_unchanged(shard)

            if not num_ranges_left[number]:
                yield _join(encoded, shard)
                encoded = []


def _encode(encoder: Encoder, shard: Shard, shard_range: ShardRange, rows: Any) -> EncodedRows:
    """Return the tokens of a range.

    Ranges by bytes do not know the number of their first row. Only an error needs it, and then the
    rows before are counted and the range is encoded again.
    """
    is_by_bytes = shard.kind == "jsonl" and not shard.codec and not lines.is_json_file(shard)
    if not is_by_bytes or shard_range.start == 0:
        # `start` is a row number, or byte 0, which is where row 0 starts
        return encoder.encode(rows, shard.url, shard_range.start + 1)

    try:
        encoded = encoder.encode(rows, shard.url)
        if not encoded.bad_rows:
            return encoded
    except DataError:
        pass

    # the second attempt fails or skips the same rows, now with their numbers
    first_row = 1 + lines.count_rows_before(shard, shard_range.start)
    return encoder.encode(rows, shard.url, first_row)


def _join(encoded: Sequence[EncodedRows], shard: Shard) -> EncodedRows:
    """Return the ranges of a block as one; `shard` is the last of its shards."""
    formats = sorted({rows.format for rows in encoded if rows.format})
    if len(formats) > 1:
        raise DataError(
            redact(
                f"{shard.url}: the rows of this shard and its neighbors are "
                f"{' and '.join(formats)}. All shards of a source must have one format. "
                "Configure them as separate sources, or set data.format."
            )
        )

    offsets = [np.zeros(1, dtype=np.int64)]
    rows_per_range: list[int] = []
    bad_rows: list[str] = []
    num_tokens = 0
    for rows in encoded:
        # the offsets of each range start at 0: continue where those before it end
        offsets.append(rows.offsets[1:] + num_tokens)
        num_tokens += len(rows.tokens)
        rows_per_range += rows.rows_per_range
        bad_rows += rows.bad_rows

    # ranges without rows have no format
    row_format = ""
    if formats:
        row_format = formats[0]

    return EncodedRows(
        tokens=np.concatenate([rows.tokens for rows in encoded]),
        targets=np.concatenate([rows.targets for rows in encoded]),
        offsets=np.concatenate(offsets),
        format=row_format,
        rows_per_range=tuple(rows_per_range),
        bad_rows=tuple(bad_rows),
    )


def create_task(
    blocks: Sequence[Block], shards: Shards, paths: Sequence[Path], check: bool
) -> BlockTask:
    """Return the task to write `blocks` to the cache files `paths`."""
    # A data set may have many thousands of shards: send only those that the blocks need.
    shard_numbers = sorted({part.shard for block in blocks for part in block.ranges})

    return BlockTask(
        blocks=[asdict(block) for block in blocks],
        paths=[str(path) for path in paths],
        check=check,
        shards={number: asdict(shards[number]) for number in shard_numbers},
    )


def run_task(encoder: Encoder, task: BlockTask, limit_bytes: float) -> None:
    """Write the blocks of a task to the cache."""
    # from another process, the numbers arrive as strings: keys of JSON are
    shards = {int(number): Shard(**values) for number, values in task["shards"].items()}

    blocks = []
    for values in task["blocks"]:
        ranges = tuple(ShardRange(**shard_range) for shard_range in values["ranges"])
        blocks.append(Block(values["source"], ranges))

    # one block at a time is in memory: each is written before the next is read
    encoded_blocks = iter_encoded_blocks(encoder, blocks, shards, task["check"])
    for path, encoded in zip(task["paths"], encoded_blocks, strict=True):
        write_block(Path(path), encoded, limit_bytes)


def main() -> None:
    """Run tasks from standard input until it ends."""
    redact_output()
    # Ctrl-C reaches the whole process group; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # What libraries print must not be read as an answer, so it goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    # training on the same cores comes first
    os.nice(5)

    setup: EncoderSetup = json.loads(sys.stdin.readline())
    encoder: Encoder | None = None
    for line in sys.stdin:
        result: TaskResult = {}
        try:
            # created here, so that an error of the setup is the answer to the first task
            encoder = encoder or load_encoder(setup)
            run_task(encoder, json.loads(line), setup["limit_bytes"])
        except DistFtError as error:
            result = {"error": SentError.from_error(error)}
        except OSError as error:
            result = {"error": SentError("OSError", [str(error)])}

        answers.write(json.dumps(result) + "\n")
        answers.flush()


def describe_encoder(
    encoder: Encoder, tokenizer_folder: str, limit_bytes: float, options: Any
) -> EncoderSetup:
    """Return what `load_encoder` needs to create `encoder` in another process.

    Args:
        encoder: the encoder.
        tokenizer_folder: folder with its saved tokenizer.
        limit_bytes: limit of the cache.
        options: `storage.options`.
    """
    return EncoderSetup(
        tokenizer=tokenizer_folder,
        data=encoder.data.model_dump(mode="json"),
        limit_bytes=limit_bytes,
        options=options,
        fingerprint=compute_fingerprint(encoder),
        recipe=dict(encoder.recipe),
    )


def load_encoder(setup: EncoderSetup) -> Encoder:
    """Create the parent's encoder from what it saved.

    Raises:
        ModelError: the saved tokenizer does not give the same tokens.
    """
    from dist_ft.core import logs
    from dist_ft.pretrained import pretrained_model
    from dist_ft.storage import filesystem

    # this process shares nothing with its parent but the environment
    logs.setup_logging(level="warning")
    filesystem.configure(setup["options"])
    data = DataSection.model_validate(setup["data"])
    tokenizer = pretrained_model.read_tokenizer(
        pretrained_model.Source(setup["tokenizer"], "model.tokenizer")
    )

    recipe = setup["recipe"]
    # The recipe has the field names of 0.1.0, as runs store a hash of it.
    task = TaskSection.model_validate(renames.RUN.migrate(recipe.get("task") or {}, "task"))
    allow_task(task.name)  # the parent uses it already
    prompting = PromptingSection.model_validate(
        renames.RUN.migrate(recipe.get("prompting") or {}, "prompting")
    )
    encoder = make_encoder(tokenizer, data, task, recipe.get("sequence_length", 0), prompting)

    # Some tokenizers lose a setting when they are saved. The cache files have the name that the
    # parent's fingerprint gives them, so other tokens would be taken for the parent's.
    if compute_fingerprint(encoder) != setup["fingerprint"]:
        raise ModelError(
            "model.tokenizer: it becomes another tokenizer when it is saved and loaded. Tokenizer "
            "processes need one that does not. Set data.tokenizer_processes=0."
        )
    return encoder


if __name__ == "__main__":
    main()
