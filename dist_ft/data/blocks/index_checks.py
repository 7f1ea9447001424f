"""Checks that an indexed data set can be trained on; errors name shard and row. Pure."""

from __future__ import annotations

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.blocks.index import Index

SPLITTABLE_FORMATS = ("text", "tokens", "question_answering", "masked_lm")
"""Formats whose samples may continue in a further sequence."""


def check_index(index: Index, data: DataSection, sequence_length: int) -> None:
    """Refuse a data set that cannot be trained on as it is.

    Raises:
        DataError: a shard has no row; a source has rows of several formats; too many rows are bad;
            samples are too long under a policy that does not handle them (names the longest); or a
            source has no target token.
    """
    _check_no_empty_shard(index)
    _check_one_format_per_source(index)
    _check_bad_rows(index, data)
    _check_lengths(index, data, sequence_length)
    _check_targets(index, sequence_length)


def _check_no_empty_shard(index: Index) -> None:
    # Over all blocks: a shard may have its rows in several of them, and a range of it none (a long
    # line belongs to the range that it starts in).
    num_rows = dict.fromkeys(range(len(index.shards)), 0)
    for block, stats in zip(index.blocks, index.block_stats, strict=True):
        for shard_range, count in zip(block.ranges, stats.rows_per_range, strict=True):
            num_rows[shard_range.shard] += count

    for number, count in num_rows.items():
        if not count:
            raise DataError(
                redact(
                    f"{index.shards[number].url}: has no rows. Each shard needs at least one row. "
                    "Remove or fill it."
                )
            )


def _check_one_format_per_source(index: Index) -> None:
    first_seen: dict[int, tuple[str, str]] = {}  # format and URL by source
    for block, stats in zip(index.blocks, index.block_stats, strict=True):
        # a block without rows has no format
        if not stats.format:
            continue

        url = index.shards[block.ranges[0].shard].url
        row_format, first_url = first_seen.setdefault(block.source, (stats.format, url))
        if row_format != stats.format:
            raise DataError(
                redact(
                    f"{url}: its rows are {stats.format}, but those of {first_url} are "
                    f"{row_format}. All shards of a source must have one format. Configure them as "
                    "separate sources, or set data.format."
                )
            )


def _check_bad_rows(index: Index, data: DataSection) -> None:
    num_bad = index.total("num_bad")
    if num_bad > data.max_bad_rows:
        raise DataError(
            f"data.max_bad_rows={data.max_bad_rows}: {num_bad} of {index.num_samples} rows cannot "
            f"be used; the first: {index.first_bad_row()}. Repair them, or raise data.max_bad_rows."
        )


def _check_lengths(index: Index, data: DataSection, sequence_length: int) -> None:
    # the format decides: `split` handles text, but not the chats of another source
    refused = []
    for number, stats in enumerate(index.block_stats):
        if stats.num_too_long and not _is_handled(data.overlong, stats.format):
            refused.append(number)
    if not refused:
        return

    # the longest, as it says which batch.sequence_length would be enough
    worst = max(refused, key=lambda number: index.block_stats[number].longest)
    longest = index.block_stats[worst].longest
    longest_sample = int(index.first_samples[worst]) + index.block_stats[worst].longest_row
    shard, row = index.locate_sample(longest_sample)
    count = sum(index.block_stats[number].num_too_long for number in refused)

    samples = "samples"
    policies = "truncate or drop (or split for plain text)"
    if data.overlong == "split":
        samples = "samples that are not plain text"
        policies = "truncate or drop"

    raise DataError(
        redact(
            f"data.overlong={data.overlong}: {count} of {index.num_samples} {samples} are longer "
            f"than batch.sequence_length={sequence_length} (the longest has {longest} tokens: "
            f"{shard.url} row {row + 1}). Set data.overlong to {policies}, or raise "
            "batch.sequence_length."
        )
    )


def _is_handled(overlong: str, row_format: str) -> bool:
    """Whether a policy says what to do with samples that are too long."""
    if overlong == "split":
        return row_format in SPLITTABLE_FORMATS
    return overlong != "error"


def _check_targets(index: Index, sequence_length: int) -> None:
    if not index.num_samples:
        raise DataError("data: has no samples. At least one is needed. Check the sources.")

    for source in range(max(index.shard_sources) + 1):
        num_rows = 0
        num_sequences = 0
        for block, stats in zip(index.blocks, index.block_stats, strict=True):
            if block.source == source:
                num_rows += stats.num_rows
                num_sequences += stats.num_sequences

        # max_samples may end before this source, which then has no rows and is not refused
        if num_rows and not num_sequences:
            url = index.shards[index.shard_sources.index(source)].url
            raise DataError(
                redact(
                    f"data: none of the {num_rows} samples of {url} and its neighboring shards has "
                    f"a target token within batch.sequence_length={sequence_length}. Raise it, or "
                    "check data.targets, data.overlong and the chat template."
                )
            )
