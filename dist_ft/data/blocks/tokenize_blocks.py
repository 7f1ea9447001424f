"""Blocks to tokens, in this process or (run as a program) in one beside training.

As a program: the first line of standard input is a JSON `setup`, each further line a JSON task (blocks of one pass over
their shards); each is answered by one line: {} when the blocks lie in the cache, or {"error": [type, text]}. The end of
the input is the end of the program, so it never outlives whom it works for.
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
from typing import Any

import numpy as np

from dist_ft.config.schema import DataSection, TaskSection
from dist_ft.core import errors
from dist_ft.core.errors import DataError, DistFtError
from dist_ft.core.logs import redact
from dist_ft.data.block import Block, ShardRange
from dist_ft.data.blocks.token_cache import compute_fingerprint, write_block
from dist_ft.data.encoding.chat import (
    Encoder,
)
from dist_ft.data.encoding.encoded import (
    EncodedRows,
)
from dist_ft.data.encoding.make_encoder import (
    make_encoder,
)
from dist_ft.data.sources import lines, readers
from dist_ft.data.sources.discovery import Shard, require_unchanged


def tokenise(
    encoder: Encoder, blocks: Sequence[Block], shards: dict[int, Shard], check: bool = True
) -> Iterator[EncodedRows]:
    """Yield the tokens of each block; a shard that several have parts of is read in one pass.

    With `check` shards must be what they were when they were listed; without, the caller knows what must come out.

    Raises:
        DataError: a shard that vanished or changed, or a row that can not be used (under data.bad_rows=error).
        StorageError: storage that does not answer.
    """
    todo = [(number, part) for number, block in enumerate(blocks) for part in block.parts]
    left = [len(block.parts) for block in blocks]
    done: list[EncodedRows] = []
    for number, group in groupby(todo, key=lambda item: item[1].shard):
        wanted, shard = list(group), shards[number]
        for (block, part), (_, rows) in zip(
            wanted, readers.read_ranges(shard, [part for _, part in wanted]), strict=True
        ):
            done.append(_encode(encoder, shard, part, rows))
            left[block] -= 1
            if check:
                require_unchanged(shard)
            if not left[block]:
                yield _join(done, shard)
                done = []


def _encode(encoder: Encoder, shard: Shard, part: ShardRange, rows: Any) -> EncodedRows:
    """Return the tokens of a part. Where a cut by bytes hides the number of its first row, an error looks it up."""
    by_bytes = shard.kind == "jsonl" and not shard.codec and not lines.is_json_file(shard)
    if not by_bytes or part.start == 0:
        return encoder.encode(rows, shard.url, 1 if by_bytes else part.start + 1)
    try:
        found = encoder.encode(rows, shard.url)
        if not found.bad_rows:
            return found
    except DataError:
        pass
    return encoder.encode(rows, shard.url, 1 + lines.count_rows_before(shard, part.start))


def _join(parts: Sequence[EncodedRows], shard: Shard) -> EncodedRows:
    """Return the parts of a block as one."""
    formats = sorted({part.format for part in parts if part.format})
    if len(formats) > 1:
        raise DataError(
            redact(
                f"{shard.url}: its rows and those of shards beside it are {' and '.join(formats)}; shards of one source "
                "must hold one kind; name them as separate sources, or set data.format"
            )
        )
    offsets = [np.zeros(1, dtype=np.int64)]
    for part in parts:
        offsets.append(part.offsets[1:] + offsets[-1][-1])
    return EncodedRows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate(offsets),
        formats[0] if formats else "",
        tuple(rows for part in parts for rows in part.part_rows),
        tuple(text for part in parts for text in part.bad_rows),
    )


def pack_task(
    blocks: Sequence[Block], shards: Sequence[Shard], paths: Sequence[Path], check: bool
) -> dict[str, Any]:
    """Return a task as JSON values."""
    numbers = sorted({part.shard for block in blocks for part in block.parts})
    return {
        "blocks": [asdict(block) for block in blocks],
        "paths": [str(path) for path in paths],
        "check": check,
        "shards": {number: asdict(shards[number]) for number in numbers},
    }


def run_task(encoder: Encoder, task: dict[str, Any], limit_bytes: float) -> None:
    """Put the blocks of a task into the cache."""
    shards = {int(number): Shard(**values) for number, values in task["shards"].items()}
    blocks = [
        Block(values["source"], tuple(ShardRange(**part) for part in values["parts"]))
        for values in task["blocks"]
    ]
    for path, encoded in zip(
        task["paths"], tokenise(encoder, blocks, shards, task["check"]), strict=True
    ):
        write_block(Path(path), encoded, limit_bytes)


def main() -> None:
    """Serve tasks from standard input until it ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides what ends
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    os.nice(5)
    setup = json.loads(sys.stdin.readline())
    encoder: Encoder | None = None
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        try:
            encoder = encoder or _encoder(setup)
            run_task(encoder, json.loads(line), setup["limit_bytes"])
        except DistFtError as error:
            answer = {"error": [type(error).__name__, str(error)]}
        except OSError as error:
            answer = {"error": ["OSError", str(error)]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _encoder(setup: dict[str, Any]) -> Encoder:
    """Return the encoder the parent has, from what it saved."""
    from transformers import AutoTokenizer

    from dist_ft.core import logs
    from dist_ft.storage import filesystem

    logs.setup_logging(level="warning")
    filesystem.configure(setup["options"])
    data = DataSection.model_validate(setup["data"])
    tokenizer = AutoTokenizer.from_pretrained(setup["tokenizer"])
    task = TaskSection.model_validate(setup.get("task") or {})
    encoder = make_encoder(tokenizer, data, task, setup.get("sequence_length", 0))
    if compute_fingerprint(encoder) != setup["fingerprint"]:
        raise errors.ModelError(
            "model.tokenizer: saved and loaded again it is another tokenizer; only those that "
            "survive that can be used in processes; set data.tokenizer_processes=0"
        )
    return encoder


if __name__ == "__main__":
    main()
