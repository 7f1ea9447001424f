"""What one rendering of a template may use: steps, memory and time.

Steps and memory decide first, so that a template fails on every machine at the same place; the
time limit is for operations that create nothing and still take long. Containers of a template
cannot change while it renders (the sandbox is an immutable one): their size is computed once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.utils import Namespace

MAX_STEPS = 1_000_000
"""Iterations, calls and outputs of one rendering; more for a large input."""
STEPS_PER_INPUT_VALUE = 200
MAX_BYTES = 2**27
"""Memory of all values that one rendering creates; more for a large input."""
BYTES_PER_INPUT_BYTE = 64
MAX_SECONDS = 3.0
"""Processor time of one rendering; more for a large input. Other processes do not count."""
INPUT_BYTES_PER_SECOND = 5_000_000
MAX_DEPTH = 100
"""Nested lists and mappings."""
STEPS_BETWEEN_CLOCK_READS = 256
POINTER_BYTES = 8
CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView, Namespace)


class TemplateLimitError(TemplateRuntimeError):
    """A template that needs more steps, memory or time than allowed."""


class RenderBudget:
    """What is left of the limits in one rendering.

    Attributes:
        bytes_left: memory that further values may take.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        """Allow what the size of `inputs`, the variables of the template, justifies."""
        # Sizes of containers by identity. The container itself is kept, since another one could get
        # its identity after it is gone.
        self._weights: dict[int, tuple[Any, int]] = {}
        self._steps_left = sys.maxsize
        self._next_clock_read = 0
        self.bytes_left = sys.maxsize

        input_bytes = sum(self.weigh(value) for value in inputs.values())
        num_values = len(self._weights) + len(inputs)
        self._steps_left = MAX_STEPS + STEPS_PER_INPUT_VALUE * num_values
        self._next_clock_read = self._steps_left - STEPS_BETWEEN_CLOCK_READS
        self.bytes_left = MAX_BYTES + BYTES_PER_INPUT_BYTE * input_bytes
        self._max_seconds = MAX_SECONDS + input_bytes / INPUT_BYTES_PER_SECOND
        self._deadline = time.thread_time() + self._max_seconds

    def step(self, count: int = 1) -> None:
        """Count `count` steps.

        Raises:
            TemplateLimitError: the steps or the time are used up.
        """
        self._steps_left -= count
        if self._steps_left > self._next_clock_read:
            return

        self._next_clock_read = self._steps_left - STEPS_BETWEEN_CLOCK_READS
        if self._steps_left < 0:
            raise TemplateLimitError(
                f"it makes more than {MAX_STEPS:,} steps. Templates with fewer are allowed"
            )
        if time.thread_time() > self._deadline:
            raise TemplateLimitError(
                f"it takes more than {self._max_seconds:.0f} s. Faster templates are allowed"
            )

    def charge(self, num_bytes: int) -> None:
        """Count memory that is about to be used, or that was.

        Raises:
            TemplateLimitError: it is used up.
        """
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise TemplateLimitError(
                f"it creates more than {MAX_BYTES / 2**20:.0f} MiB of text. Templates that create "
                "less are allowed"
            )

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Return the bytes of a value if each of its parts were stored at each of its places.

        That is what its text needs at least: a list may hold one part a thousand times.
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

        total = POINTER_BYTES
        if isinstance(parts, dict):
            for key, part in parts.items():
                total += POINTER_BYTES + self.weigh(key, depth + 1) + self.weigh(part, depth + 1)
        else:
            for part in parts:
                total += POINTER_BYTES + self.weigh(part, depth + 1)
        self.step(1 + len(parts) // 16)

        if total > self.bytes_left:
            self.charge(total)  # raises: no value may be larger than all memory that is left
        if not isinstance(value, Namespace):  # the only container that changes
            self._weights[id(value)] = (value, total)
        return total

    def charge_text(self, value: Any) -> None:
        """Charge the text of `value`, which is about to be created."""
        if type(value) is str:
            self.charge(len(value))
        else:
            self.charge(self.weigh(value))
