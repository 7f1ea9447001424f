"""Batch arithmetic written out, for a person to check before a long run. Pure."""

from __future__ import annotations

from dist_ft.config.schema import RunConfig


def batch_arithmetic(config: RunConfig) -> list[tuple[str, str]]:
    """Return (name, arithmetic) rows: the sequences and tokens of a step, and the run's length."""
    batch = config.batch
    tokens_per_step = batch.global_batch * batch.sequence_length

    # "at most": sequences may be padded
    global_batch = (
        f"{batch.global_batch} sequences = {_count(config.num_lanes, 'lane')} × micro-batch "
        f"{batch.micro_batch}"
    )
    tokens = (
        f"{batch.global_batch:,} sequences × {batch.sequence_length:,} tokens = "
        f"{tokens_per_step:,} at most"
    )

    return [
        ("global batch", global_batch),
        ("lanes", _describe_lanes(config)),
        ("step tokens", tokens),
        ("length", _describe_length(config, tokens_per_step)),
    ]


def _describe_lanes(config: RunConfig) -> str:
    """Return how lanes are divided among the most and, in an elastic run, the fewest workers."""
    if config.max_workers == 0:
        return f"{_count(config.num_lanes, 'lane')} in this process, one after another"

    # the two are the same number for a run of fixed size, and it is described once
    num_workers = dict.fromkeys([config.max_workers, config.min_workers])
    return "; ".join(_describe_division(config.num_lanes, number) for number in num_workers)


def _describe_division(num_lanes: int, num_workers: int) -> str:
    lanes_per_worker, num_with_one_more = divmod(num_lanes, num_workers)
    if not num_with_one_more:
        return f"{num_lanes} = {_count(num_workers, 'worker')} × {_count(lanes_per_worker, 'lane')}"

    num_others = num_workers - num_with_one_more
    return (
        f"{num_lanes} = {_count(num_with_one_more, 'worker')} × "
        f"{_count(lanes_per_worker + 1, 'lane')} + "
        f"{_count(num_others, 'worker')} × {_count(lanes_per_worker, 'lane')}"
    )


def _describe_length(config: RunConfig, tokens_per_step: int) -> str:
    schedule = config.schedule
    # an epoch's sequences are only known once the data was indexed, which planning does not do
    if schedule.steps is None:
        epochs = _count(schedule.epochs or 0, "epoch")
        return f"{epochs}; the number of steps follows from the data's index"

    total = schedule.steps * tokens_per_step
    return f"{_count(schedule.steps, 'step')} × {tokens_per_step:,} tokens = {total:,} at most"


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "s"
    return f"{number:,} {noun}{plural}"
