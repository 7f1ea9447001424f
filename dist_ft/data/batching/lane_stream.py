"""The sequences of one lane in one source, one after the other.

A `SliceStream` packs and shuffles window after window of slices, of which it holds one while the
next is tokenized. An `IndexStream` follows the plan of an indexed source. Both continue from a
`Cursor`, which is all that a checkpoint stores of them.

P is the number of segments of a window, G the number of its sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dist_ft.config.schema import BatchSection, DataSection
from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.core.seeds import derive_seed, random_uint64
from dist_ft.data.batch import BadRows
from dist_ft.data.batching.assemble import SequenceTokens, read_segments
from dist_ft.data.batching.loader import Loader
from dist_ft.data.blocks.segments import split_into_segments
from dist_ft.data.blocks.slice_store import SliceFacts, SliceStore, short_checksum
from dist_ft.data.blocks.slices import first_sample
from dist_ft.data.blocks.token_cache import TokenizedBlock
from dist_ft.data.sampling.batch_plan import SequenceRef
from dist_ft.data.sampling.packing import SequenceMembers, group_into_sequences
from dist_ft.data.sampling.stream_order import Cursor, StreamOrder


class LaneStream(Protocol):
    """The sequences of a lane in a source."""

    cursor: Cursor

    def request(self) -> None:
        """Start to tokenize what is drawn first; do not wait."""

    def request_ahead(self) -> None:
        """Start to tokenize what comes after that; do not wait."""

    def next(self) -> SequenceTokens:
        """Return the next sequence and advance the cursor."""

    def take_bad_rows(self) -> BadRows:
        """Return the bad rows of windows that were opened since the last call."""

    def epochs_done(self, cursor: Cursor) -> float:
        """Return the epochs of the source that the lane has completed at a cursor."""


@dataclass(frozen=True)
class Window:
    """The slices of a window, packed.

    Attributes:
        numbers: the slices' numbers over all sources.
        blocks: their tokens.
        segments: int64 (P, 4) [place in `blocks`, row, first token, number of tokens].
        sequences: the segments of each of its G sequences, shuffled.
    """

    numbers: list[int]
    blocks: list[TokenizedBlock]
    segments: np.ndarray
    sequences: SequenceMembers

    @property
    def num_sequences(self) -> int:
        """G."""
        return len(self.sequences.offsets) - 1

    def read(self, number: int, source: int, epoch: int) -> SequenceTokens:
        """Return the tokens of a sequence."""
        members, offsets = self.sequences
        own = self.segments[members[offsets[number] : offsets[number + 1]]]  # (n, 4)

        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        samples = []
        for place, *bounds in own.tolist():
            own_tokens, own_targets = read_segments(self.blocks[place], np.array([bounds]))
            tokens += own_tokens
            targets += own_targets
            samples.append(first_sample(self.numbers[place]) + bounds[0])

        epochs = np.full(len(own), epoch)
        segments = np.column_stack([np.array(samples, dtype=np.int64), own[:, 2:], epochs])
        return SequenceTokens(source, tokens, targets, segments)


class SliceStream:
    """The sequences of a lane in a source that streams.

    Attributes:
        cursor: where the lane is.
    """

    def __init__(
        self,
        source: int,
        lane: int,
        order: StreamOrder,
        store: SliceStore,
        sections: tuple[DataSection, BatchSection],
        cursor: Cursor,
    ) -> None:
        """Store the settings; read nothing yet.

        Args:
            source: number of the source.
            lane: number of the lane.
            order: which slices come in which window.
            store: their tokens.
            sections: how rows become sequences.
            cursor: where the lane is.
        """
        self.cursor = cursor
        self._source = source
        self._lane = lane
        self._order = order
        self._store = store
        self._data, self._batch = sections
        self._window: Window | None = None
        self._bad_rows = BadRows()
        self._requested: Cursor | None = None

    def request(self) -> None:
        """Start to tokenize the window of the cursor; do not wait."""
        self._store.request(self._numbers(self.cursor))

    def request_ahead(self) -> None:
        """Start to tokenize the window after the cursor's; do not wait."""
        window = self._order.next_window(self._lane, self.cursor)
        if window != self._requested:
            self._requested = window
            self._store.request(self._numbers(window))

    def next(self) -> SequenceTokens:
        """Return the next sequence and advance the cursor."""
        num_empty = 0
        while self._window is None or self.cursor.draws >= self._window.num_sequences:
            if self._window is not None:
                num_empty = 0 if self._window.num_sequences else num_empty + 1
                self._require_sequences(num_empty)
                self.cursor = self._order.next_window(self._lane, self.cursor)
            self._window = self._load(self.cursor)

        sequence = self._window.read(self.cursor.draws, self._source, self.cursor.epoch)
        self.cursor = self.cursor._replace(draws=self.cursor.draws + 1)
        return sequence

    def take_bad_rows(self) -> BadRows:
        """Return the bad rows of windows that were opened since the last call."""
        found = self._bad_rows
        self._bad_rows = BadRows()
        return found

    def epochs_done(self, cursor: Cursor) -> float:
        """Return the epochs of the source that the lane has completed at a cursor."""
        num_sequences = self._window.num_sequences if self._window else 0
        return self._order.epochs_done(self._lane, cursor, num_sequences)

    def _numbers(self, cursor: Cursor) -> list[int]:
        """Return the slices of a window, numbered over all sources."""
        own_numbers = self._order.window(self._lane, cursor)
        return self._store.slices.numbers(self._source, own_numbers).tolist()

    def _load(self, cursor: Cursor) -> Window:
        """Return the window of a cursor."""
        numbers = self._numbers(cursor)
        self._store.request(numbers).result()

        blocks = []
        segments = [np.zeros((0, 4), dtype=np.int64)]
        for place, number in enumerate(numbers):
            block = self._store.read(number)
            bounds, _ = split_into_segments(block, self._batch.sequence_length, self._data.overlong)
            places = np.full(len(bounds), place)
            segments.append(np.column_stack([places, bounds]))
            blocks.append(block)

            # A window that was drawn from was counted before the run stopped.
            if block.bad_rows and not cursor.draws:
                bad_rows = BadRows(len(block.bad_rows), block.bad_rows[0])
                self._bad_rows = self._bad_rows.plus(bad_rows)

            facts = SliceFacts(
                num_rows=len(block.offsets) - 1,
                num_bad=len(block.bad_rows),
                num_segments=len(bounds),
                checksum=short_checksum(block),
            )
            self._store.add_facts(number, facts)

        all_segments = np.concatenate(segments)  # (P, 4)
        return Window(numbers, blocks, all_segments, self._pack(all_segments[:, 3], cursor))

    def _pack(self, lengths: np.ndarray, cursor: Cursor) -> SequenceMembers:
        """Return the sequences of a window in the order in which they are drawn.

        `lengths`: (P,) tokens of each segment.
        """
        seed = self._order.window_seed(self._lane, cursor)
        micro_batch = self._batch.micro_batch
        sort_pool = (self._data.bucket or 0) * micro_batch
        packed = group_into_sequences(
            lengths, self._batch.sequence_length, self._data.pack, seed, sort_pool
        )

        # Sequences of similar length lie next to each other in a pool: move whole micro-batches.
        unit = micro_batch if sort_pool and not self._data.pack else 1
        return _shuffle_sequences(packed, unit, derive_seed(seed, 1))

    def _require_sequences(self, num_empty: int) -> None:
        """Raise DataError if a whole epoch of windows gave the lane nothing to train on."""
        if num_empty > self._order.num_slices(self._lane, self.cursor.epoch):
            source = self._data.train[self._source]
            raise DataError(
                redact(
                    f"data.train={source.path}: none of the rows of a whole epoch of lane "
                    f"{self._lane} has a target token within "
                    f"batch.sequence_length={self._batch.sequence_length}. Raise it, or check "
                    "data.targets, data.overlong and the chat template."
                )
            )


class IndexStream:
    """The sequences of a lane in an indexed source of a streamed run.

    Attributes:
        cursor: where the lane is; `first` counts the lane's draws, the other fields are 0.
    """

    def __init__(self, source: int, lane: int, loader: Loader, cursor: Cursor) -> None:
        """Store the settings; read nothing yet.

        Args:
            source: number of the source.
            lane: number of the lane.
            loader: loader over the indexed sources.
            cursor: where the lane is.
        """
        self.cursor = cursor
        self._source = source
        self._lane = lane
        self._loader = loader

    def request(self) -> None:
        """Start to tokenize the block that is drawn first; do not wait."""
        self._loader.store.request(self._ref().block)

    def request_ahead(self) -> None:
        """Start to tokenize the blocks that come next; do not wait."""
        self._loader.request_ahead([self._ref()])

    def next(self) -> SequenceTokens:
        """Return the next sequence and advance the cursor."""
        ref = self._ref()
        sequence = self._loader.sequence(ref)
        self.cursor = self.cursor._replace(first=self.cursor.first + 1)
        return sequence

    def take_bad_rows(self) -> BadRows:
        """Return none: those of an index were counted when it was built."""
        return BadRows()

    def epochs_done(self, cursor: Cursor) -> float:
        """Return the epochs of the source that the lane has completed at a cursor."""
        plan = self._loader.plan
        return cursor.first * plan.num_lanes / plan.num_sequences(self._source)

    def _ref(self) -> SequenceRef:
        plan = self._loader.plan
        turn = self.cursor.first * plan.num_lanes + self._lane
        return plan.sequence_ref(self._source, turn)


def _shuffle_sequences(packed: SequenceMembers, unit: int, seed: int) -> SequenceMembers:
    """Return sequences in an order by seed; `unit` of them stay next to each other.

    The last sequences, fewer than `unit`, keep their place.
    """
    num_sequences = len(packed.offsets) - 1
    num_units = num_sequences // unit
    units = np.argsort(random_uint64(seed, num_units), kind="stable")

    shuffled = (units[:, None] * unit + np.arange(unit)).reshape(-1)
    order = np.concatenate([shuffled, np.arange(num_units * unit, num_sequences)])  # (G,)

    sizes = np.diff(packed.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    starts = np.repeat(packed.offsets[:-1][order] - offsets[:-1], sizes)
    members = packed.members[starts + np.arange(len(packed.members))]
    return SequenceMembers(members, offsets)
