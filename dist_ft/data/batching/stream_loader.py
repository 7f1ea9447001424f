"""From the streamed order to batches: the tokens of this worker's lanes, step after step.

Guarantees: a lane's batch has the same bytes in every world size, and after a resume from the
cursors of its step; the cursors are those of steps that were yielded, not of those built ahead.
Knows no ranks: the caller passes the lanes.

S is the number of sources.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np

from dist_ft.data.batch import BadRows, Batch
from dist_ft.data.batching.assemble import BatchBuilder
from dist_ft.data.batching.lane_stream import LaneStream
from dist_ft.data.batching.loader import CURSOR_COLUMNS, Loader
from dist_ft.data.batching.prefetch import build_ahead
from dist_ft.data.blocks.slice_store import SliceStore
from dist_ft.data.sampling.stream_order import Cursor
from dist_ft.data.sampling.stream_plan import StreamPlan

Streams = dict[tuple[int, int], LaneStream]
"""The sequences of each (lane, source)."""
MakeStream = Callable[[int, int, Cursor], LaneStream]
"""(source, lane, cursor) -> the sequences of the lane in the source."""


class _BuiltStep(NamedTuple):
    """A step that is ready.

    Attributes:
        batches: one batch a lane.
        cursors: int64 (lanes * S, 6) where the lanes are after it; see `CURSOR_COLUMNS`.
        bad_rows: bad rows of the windows that it opened.
    """

    batches: list[Batch]
    cursors: np.ndarray
    bad_rows: BadRows


class StreamLoader:
    """Reads the batches of a streamed run.

    Attributes:
        plan: which source each sequence comes from.
        store: the tokenized slices.
        indexed: loader of the sources that do not stream; None without any.
    """

    def __init__(
        self,
        plan: StreamPlan,
        store: SliceStore,
        make_stream: MakeStream,
        num_sources: int,
        builder: BatchBuilder | None = None,
        indexed: Loader | None = None,
    ) -> None:
        """Store the settings; read nothing yet.

        Args:
            plan: which source each sequence comes from.
            store: the tokenized slices.
            make_stream: creates the sequences of a lane in a source.
            num_sources: S.
            builder: builds batches; None: without masking and augmentation.
            indexed: loader of the sources that do not stream, closed with this one; None without.
        """
        self.plan = plan
        self.store = store
        self._make_stream = make_stream
        self._num_sources = num_sources
        self._builder = builder or BatchBuilder()
        self.indexed = indexed

        self._streams: Streams = {}
        self._start = 0
        self._start_cursors: dict[tuple[int, int], Cursor] = {}
        self._cursors = np.zeros((0, len(CURSOR_COLUMNS)), dtype=np.int64)
        self._bad_rows = BadRows()
        self._is_started = False

    def restore(self, step: int, cursors: np.ndarray) -> None:
        """Start from a checkpoint.

        Args:
            step: steps done.
            cursors: int64 (n, 6) cursors of all lanes after them, see `CURSOR_COLUMNS`; those of
                a lane that never drew may be missing.
        """
        self._start = step
        self._bad_rows = BadRows()
        self.store.record_facts_again()
        self._start_cursors = {}
        for lane, source, *values in cursors.tolist():
            self._start_cursors[lane, source] = Cursor(*values)

    def iterate(
        self, start: int, stop: int, lanes: Sequence[int]
    ) -> Generator[list[Batch], None, None]:
        """Yield one batch for each of `lanes` at steps start .. stop - 1.

        The next steps are built in a background thread. `start` is the step of `restore`.
        """
        if start != self._start:
            raise ValueError(f"start={start}: the cursors are those of step {self._start}")

        streams = self._open(lanes)
        steps = build_ahead(
            lambda step: self._build(step, lanes, streams),
            range(start, stop),
            self.plan.data.prefetch_steps,
        )
        for built in steps:
            yield self._advance(built)

    def batches(self, step: int, lanes: Sequence[int]) -> list[Batch]:
        """Return one batch for each of `lanes` at `step`; steps must be read in order."""
        if not self._streams:
            self._open(lanes)
        return self._advance(self._build(step, lanes, self._streams))

    def cursors(self) -> np.ndarray:
        """Return where the lanes are after the last step, int64 (n, 6); see `CURSOR_COLUMNS`."""
        return self._cursors

    def take_facts(self) -> np.ndarray:
        """Return the facts of slices that were read since the last call, int64 (n, 5)."""
        return self.store.take_facts()

    def take_bad_rows(self) -> BadRows:
        """Return the bad rows that the steps since the last call came upon."""
        found = self._bad_rows
        self._bad_rows = BadRows()
        return found

    def epochs_done(self, step: int) -> list[float]:
        """Return about how many of its epochs each source has completed, by this worker's lanes."""
        totals = np.zeros(self._num_sources)
        counts = np.zeros(self._num_sources)
        for lane, source, *values in self._cursors.tolist():
            totals[source] += self._streams[lane, source].epochs_done(Cursor(*values))
            counts[source] += 1
        return (totals / np.maximum(1, counts)).tolist()

    def close(self) -> None:
        """Stop reading ahead."""
        self.store.close()
        if self.indexed is not None:
            self.indexed.close()

    def _open(self, lanes: Sequence[int]) -> Streams:
        """Create the streams of the lanes, and let what each needs first be tokenized."""
        # A new dictionary: after a rollback, a step that was being built may still draw from the
        # streams before.
        streams: Streams = {}
        self._is_started = False
        for lane in lanes:
            for source in range(self._num_sources):
                cursor = self._start_cursors.get((lane, source), Cursor())
                streams[lane, source] = self._make_stream(source, lane, cursor)

        # all lanes before any of them waits
        for stream in streams.values():
            stream.request()
        self._streams = streams
        self._cursors = _current_cursors(streams)
        return streams

    def _build(self, step: int, lanes: Sequence[int], streams: Streams) -> _BuiltStep:
        """Return the batches of a step, which must follow the last one of `streams`."""
        # Not before the first step: what it needs must not wait behind what comes later.
        if self._is_started:
            for stream in streams.values():
                stream.request_ahead()
        self._is_started = True

        batches = []
        for lane in lanes:
            draws = self.plan.draws(step, lane)
            sequences = [streams[lane, draw.source].next() for draw in draws]
            batches.append(self._builder.build(sequences, lane))

        bad_rows = BadRows()
        for stream in streams.values():
            bad_rows = bad_rows.plus(stream.take_bad_rows())
        return _BuiltStep(batches, _current_cursors(streams), bad_rows)

    def _advance(self, built: _BuiltStep) -> list[Batch]:
        """Return the batches of a step, with which the lanes are where it left them."""
        self._cursors = built.cursors
        self._bad_rows = self._bad_rows.plus(built.bad_rows)
        return built.batches


def _current_cursors(streams: Streams) -> np.ndarray:
    """Return where the lanes are, int64 (n, 6); see `CURSOR_COLUMNS`."""
    rows = [(lane, source, *own.cursor) for (lane, source), own in streams.items()]
    return np.array(rows, dtype=np.int64).reshape(-1, len(CURSOR_COLUMNS))
