"""What one rendering of a template may use: steps and text, which share one budget, and time.

The budget decides first, so that a template fails on every machine at the same place; the time
limit is for operations that create nothing and still take long. Containers of a template cannot
change while it renders (the sandbox is an immutable one): their size is computed once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any, NoReturn

from jinja2.exceptions import TemplateRuntimeError
from jinja2.utils import Namespace

MAX_BYTES = 2**27
"""Text and containers that one rendering creates, in bytes; more for a large input."""
STEP = 128
"""Bytes that an iteration, call or output counts as: a million of them use up the budget."""
BUDGET_PER_INPUT_BYTE = 64
MAX_SECONDS = 3.0
"""Processor time of one rendering; more for a large input. Other processes do not count."""
INPUT_BYTES_PER_SECOND = 5_000_000
MAX_DEPTH = 100
"""Nested lists and mappings."""
BETWEEN_CLOCK_READS = 256 * STEP
POINTER_BYTES = 8
CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView, Namespace)


class TemplateLimitError(TemplateRuntimeError):
    """A template that needs more steps, memory or time than allowed."""


class RenderBudget:
    """What is left of the limits in one rendering.

    Attributes:
        left: bytes that steps and further values may take.
        next_check: value of `left` below which `check` must be called.
    """

    __slots__ = ("_deadline", "_inputs", "_seconds", "_weights", "left", "next_check")

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        """Start the budget of a rendering with the variables `inputs`."""
        self.left = MAX_BYTES
        self.next_check = MAX_BYTES - BETWEEN_CLOCK_READS
        self._seconds = MAX_SECONDS
        self._deadline = time.thread_time() + MAX_SECONDS
        self._inputs: Mapping[str, Any] | None = inputs

        # Sizes of containers by identity. The container itself is kept, since another one could get
        # its identity after it is gone.
        self._weights: dict[int, tuple[Any, int]] = {}

    def spend(self, num_bytes: int) -> None:
        """Count a step, and memory that is about to be used, or that was.

        Raises:
            TemplateLimitError: the budget or the time is used up.
        """
        self.left -= STEP + num_bytes
        if self.left < self.next_check:
            self.check()

    def check(self) -> None:
        """Raise TemplateLimitError if the budget or the time is used up."""
        is_late = time.thread_time() > self._deadline
        if self.left < 0 or is_late:
            self._extend()
            if self.left < 0:
                self._exceed()
            if time.thread_time() > self._deadline:
                raise TemplateLimitError(
                    f"it takes more than {self._seconds:.0f} s. Faster templates are allowed"
                )
        self.next_check = self.left - BETWEEN_CLOCK_READS

    def _extend(self) -> None:
        """Add what the size of the inputs justifies, once; small ones are never measured."""
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            return
        left, self.left = self.left, sys.maxsize  # measuring is free
        input_bytes = sum(self.weigh(value) for value in inputs.values())
        self.left = left + BUDGET_PER_INPUT_BYTE * input_bytes
        extra_seconds = input_bytes / INPUT_BYTES_PER_SECOND
        self._seconds += extra_seconds
        self._deadline += extra_seconds

    def _exceed(self) -> NoReturn:
        raise TemplateLimitError(
            f"it needs more than {MAX_BYTES // STEP:,} steps, or {MAX_BYTES / 2**20:.0f} MiB of "
            "text. Templates that need less are allowed"
        )

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Return the bytes of a value if each of its parts were stored at each of its places.

        That is what its text needs at least: a list may hold one part a thousand times.

        Raises:
            TemplateLimitError: that is more than is left.
        """
        is_container = not isinstance(value, str | int) and isinstance(value, CONTAINERS)
        if is_container:
            return self._weigh_container(value, depth)
        return sys.getsizeof(value, POINTER_BYTES)

    def _weigh_container(self, value: Any, depth: int) -> int:
        known = self._weights.get(id(value))
        if known is not None and known[0] is value:
            return known[1]

        if depth > MAX_DEPTH:
            raise TemplateLimitError(f"it nests values more than {MAX_DEPTH} deep")
        parts: Any = value
        if isinstance(value, Namespace):
            parts = value._Namespace__attrs  # type: ignore[attr-defined]
        self.spend(POINTER_BYTES * len(parts))

        total = POINTER_BYTES
        if isinstance(parts, dict):
            for key, part in parts.items():
                total += POINTER_BYTES + self.weigh(key, depth + 1) + self.weigh(part, depth + 1)
        else:
            for part in parts:
                total += POINTER_BYTES + self.weigh(part, depth + 1)

        if total > self.left:
            self._extend()
            if total > self.left:
                self._exceed()
        if not isinstance(value, Namespace):  # the only container that changes
            self._weights[id(value)] = (value, total)
        return total

    def spend_text(self, value: Any) -> None:
        """Count the text of `value`, which is about to be created."""
        if type(value) is str:
            self.spend(len(value))
        else:
            self.spend(self.weigh(value))
