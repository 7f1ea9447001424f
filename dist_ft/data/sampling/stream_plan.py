"""The streamed plan: how often each lane draws each source by a step.

The order within a source is that of `StreamOrder` (sources that stream) or of `BatchPlan` (others).
Draws never end: a streamed run has a number of steps and no epochs of its own. Pure, and the same
for every world size.

S is the number of sources, L the number of lanes.
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_ft.config.schema import BatchSection, DataSection, ScheduleSection
from dist_ft.core.seeds import derive_seed
from dist_ft.data.sampling.batch_plan import EpochStep
from dist_ft.data.sampling.mixture import ENDLESS, Draw, Mixture


class StreamPlan:
    """Which source each sequence of a run comes from."""

    def __init__(
        self, sizes: Sequence[float], data: DataSection, batch: BatchSection, seed: int
    ) -> None:
        """Store the settings; compute nothing yet.

        Args:
            sizes: (S,) sequences of an epoch of each source, for streamed ones an estimate.
            data: how sources are mixed.
            batch: sizes of the global batch and of a micro-batch.
            seed: seed of the run.
        """
        self.data = data
        self.batch = batch
        self.seed = seed
        self.num_lanes = batch.global_batch // batch.micro_batch

        self._num_sources = len(sizes)
        counts = [max(1, round(size)) for size in sizes]
        mixture_seed = derive_seed(seed, len(counts))
        self.mixture = Mixture(data, counts, self.num_lanes, batch.micro_batch, mixture_seed)

    def source_seed(self, source: int) -> int:
        """Return the seed of a source's order."""
        return derive_seed(self.seed, source)

    def draws(self, step: int, lane: int) -> list[Draw]:
        """Return the draws of a lane at a step; turns count the source's draws of all lanes."""
        first = step * self.batch.micro_batch
        draws = []
        for row in range(first, first + self.batch.micro_batch):
            if self._num_sources == 1:
                draws.append(Draw(0, row * self.num_lanes + lane))
            else:
                draws.append(self.mixture.draw(ENDLESS, row * self.num_lanes + lane))
        return draws

    def total_steps(self, schedule: ScheduleSection) -> int:
        """Return the steps of the run."""
        assert schedule.steps is not None, "only runs by schedule.steps stream"
        return schedule.steps

    def epoch_and_step(self, step: int) -> EpochStep:
        """Return a step as one of the endless epoch."""
        return EpochStep(ENDLESS, step)
