"""The section `batch`: the size of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.sections.section import Identity, Section


class BatchSection(Section):
    """Size of an optimizer step."""

    # All of them decide which samples are in which step. The number of workers does not: they share
    # the lanes, however many they are.
    global_batch: int = Identity(
        ge=1, description="Sequences per optimizer step, over all workers."
    )
    micro_batch: int = Identity(
        1,
        ge=1,
        description=(
            "Sequences per forward pass (a lane). A step has global_batch / micro_batch lanes, "
            "which are divided among the workers."
        ),
    )
    sequence_length: int = Identity(ge=8, description="Tokens per sequence.")


def _global_batch_is_whole_micro_batches(batch: BatchSection) -> Iterator[str]:
    if batch.global_batch % batch.micro_batch:
        next_multiple = -(-batch.global_batch // batch.micro_batch) * batch.micro_batch
        yield (
            f"batch.global_batch={batch.global_batch}: not a multiple of "
            f"batch.micro_batch={batch.micro_batch}. A step has whole micro-batches. Set it to "
            f"{next_multiple} or change micro_batch."
        )


CHECKS = (_global_batch_is_whole_micro_batches,)
