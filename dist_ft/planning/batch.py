"""Batch arithmetic written out, for a person to check before hours are spent on it. Pure."""

from __future__ import annotations

from dist_ft.config.schema import RunConfig


def batch_arithmetic(config: RunConfig) -> list[tuple[str, str]]:
    """Return (name, arithmetic) rows: how a step's sequences are made up and dealt, and how many tokens that is."""
    batch = config.batch
    tokens = batch.global_batch * batch.sequence_length
    return [
        (
            "global batch",
            f"{batch.global_batch} sequences = {_count(config.num_lanes, 'lane')} × micro-batch "
            f"{batch.micro_batch}",
        ),
        ("lanes", _lanes(config)),
        (
            "tokens a step",
            f"{batch.global_batch:,} sequences × {batch.sequence_length:,} tokens = {tokens:,} at most",
        ),
        ("length", _length(config, tokens)),
    ]


def _lanes(config: RunConfig) -> str:
    """Say how lanes are dealt at the most and, for an elastic run, at the fewest workers."""
    if config.max_workers == 0:
        return f"{_count(config.num_lanes, 'lane')} in this process, one after another"
    worlds = dict.fromkeys([config.max_workers, config.min_workers])
    return "; ".join(_dealt(config.num_lanes, world) for world in worlds)


def _dealt(num_lanes: int, world: int) -> str:
    few, more = divmod(num_lanes, world)
    if not more:
        return f"{num_lanes} = {_count(world, 'worker')} × {_count(few, 'lane')}"
    return (
        f"{num_lanes} = {_count(more, 'worker')} × {_count(few + 1, 'lane')} + "
        f"{_count(world - more, 'worker')} × {_count(few, 'lane')}"
    )


def _length(config: RunConfig, tokens: int) -> str:
    schedule = config.schedule
    if schedule.steps is not None:
        return f"{_count(schedule.steps, 'step')} × {tokens:,} tokens = {schedule.steps * tokens:,} at most"
    return f"{_count(schedule.epochs or 0, 'epoch')}; the number of steps follows from the data's index"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
