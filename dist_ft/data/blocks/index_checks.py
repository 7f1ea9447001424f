"""What an index says against training on it: one error, which names shard and row, for the whole data set. Pure."""

from __future__ import annotations

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.blocks.index import Index

SPLIT = ("text", "tokens", "question_answering", "masked_lm")
"""Formats that can go on in a further sequence."""


def judge(index: Index, data: DataSection, sequence_length: int) -> None:
    """Refuse a data set that can not be trained on as it is.

    Raises:
        DataError: samples too long where the policy does not say what to do with them (names the longest), rows of
            several formats in one source, too many bad rows, a source without a shard's row or a token to learn.
    """
    _refuse_empty(index)
    _refuse_mixed(index)
    bad = index.total("num_bad")
    if bad > data.max_bad_rows:
        first = next(measure.first_bad for measure in index.measures if measure.first_bad)
        raise DataError(
            f"data.max_bad_rows={data.max_bad_rows}: {bad} of {index.num_samples} rows can not be used; "
            f"the first: {first}; repair them, or raise data.max_bad_rows"
        )
    _refuse_long(index, data, sequence_length)
    _refuse_nothing(index, sequence_length)


def _refuse_empty(index: Index) -> None:
    rows = dict.fromkeys(range(len(index.shards)), 0)
    for block, measure in zip(index.blocks, index.measures, strict=True):
        for part, count in zip(block.parts, measure.part_rows, strict=True):
            rows[part.shard] += count
    for number, count in rows.items():
        if not count:
            raise DataError(
                redact(
                    f"{index.shards[number].url}: holds no row; each shard must hold one; remove or "
                    "fill it"
                )
            )


def _refuse_mixed(index: Index) -> None:
    seen: dict[int, tuple[str, str]] = {}
    for block, measure in zip(index.blocks, index.measures, strict=True):
        if not measure.format:
            continue
        url = index.shards[block.parts[0].shard].url
        kind, first = seen.setdefault(block.source, (measure.format, url))
        if kind != measure.format:
            raise DataError(
                redact(
                    f"{url}: its rows are {measure.format}, those of {first} are {kind}; shards of one "
                    "source must hold one kind; name them as separate sources, or set data.format"
                )
            )


def _refuse_long(index: Index, data: DataSection, sequence_length: int) -> None:
    split = data.overlong == "split"
    refused = [
        number
        for number, measure in enumerate(index.measures)
        if measure.num_too_long
        and (measure.format not in SPLIT if split else data.overlong == "error")
    ]
    if not refused:
        return
    worst = max(refused, key=lambda number: index.measures[number].longest)
    shard, row = index.place(int(index.first_samples[worst]) + index.measures[worst].longest_row)
    count = sum(index.measures[number].num_too_long for number in refused)
    what = "samples that are not plain text" if split else "samples"
    ways = "data.overlong=truncate or drop" + ("" if split else ", or split for text,")
    raise DataError(
        redact(
            f"data.overlong={data.overlong}: {count} of {index.num_samples} {what} are longer than "
            f"batch.sequence_length={sequence_length} (longest {index.measures[worst].longest} tokens, {shard.url} row "
            f"{row + 1}); set {ways} or raise batch.sequence_length"
        )
    )


def _refuse_nothing(index: Index, sequence_length: int) -> None:
    if not index.num_samples:
        raise DataError("data: holds no sample; at least one is needed; check the sources")
    for source in range(max(index.shard_sources) + 1):
        own = [
            measure
            for block, measure in zip(index.blocks, index.measures, strict=True)
            if block.source == source
        ]
        rows = sum(
            measure.num_rows for measure in own
        )  # none where max_samples ends before this source
        if rows and not sum(measure.num_sequences for measure in own):
            url = index.shards[index.shard_sources.index(source)].url
            raise DataError(
                redact(
                    f"data: none of the {rows} samples of {url} and the shards beside "
                    f"it has a token to learn within batch.sequence_length={sequence_length}; raise it, or check "
                    "data.targets, data.overlong and the chat template"
                )
            )
