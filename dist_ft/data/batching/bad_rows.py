"""Counts the rows of a stream that cannot be used; all ranks end together if there are too many."""

from __future__ import annotations

from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives
from dist_ft.data.batch import BadRows


class BadRowCounter:
    """Counts over all ranks.

    Attributes:
        count: bad rows of the run so far; the same on all ranks.
    """

    def __init__(self, collectives: Collectives, limit: int, count: int) -> None:
        """Continue from `count`; `limit`: data.max_bad_rows."""
        self.count = count
        self._collectives = collectives
        self._limit = limit

    def add(self, num_bad: int, own: BadRows) -> None:
        """Count the bad rows of a step.

        Args:
            num_bad: those that all ranks came upon.
            own: those of this rank.

        Raises:
            DataError: on all ranks, there are more than the limit.
        """
        self.count += num_bad
        if not num_bad or self.count <= self._limit:
            return

        # The sum is the same on all ranks, so all take part in this exchange.
        first = next(filter(None, self._collectives.all_gather(own.first)), "")
        raise DataError(
            f"data.max_bad_rows={self._limit}: {self.count} rows so far cannot be used; one of the "
            f"last: {first}. Repair them, or raise data.max_bad_rows."
        )
