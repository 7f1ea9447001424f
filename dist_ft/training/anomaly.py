"""Numbers that go bad: judged from what all workers agree on, so that all decide alike. Pure, but for its records.

A step whose loss or gradient norm is no finite number, or leaps above the median of those before, changes nothing. Its
number is kept with the run at once, with the samples of the step, and is obeyed by every attempt after: a replay makes
the same history, even where the cause was a bit that flipped once. The numbers before travel with each checkpoint.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

import numpy as np

from dist_ft.config.schema import AnomalySection
from dist_ft.core.errors import DistFtError, StorageError
from dist_ft.storage.filesystem import Store

FOLDER = "anomalies"


class AnomalyError(DistFtError):
    """Numbers went bad and the config says to stop, or too many steps did one after the other."""


class RollBack(Exception):
    """All workers are to go back to the newest checkpoint; no error, and never seen by a user."""


class Judge:
    """Says which losses and norms are bad, given those of the steps before."""

    def __init__(
        self,
        section: AnomalySection,
        history: Sequence[tuple[float, float]] = (),
        vetoed: Iterable[int] = (),
        in_a_row: int = 0,
    ) -> None:
        """Go on after `history`, (loss, norm) of sound steps, and `in_a_row` bad ones; `vetoed` were skipped before."""
        self._section = section
        self._history = deque(history, section.window)
        self.vetoed = set(vetoed)
        self.in_a_row = in_a_row

    @property
    def history(self) -> tuple[tuple[float, float], ...]:
        """(loss, norm) of the last sound steps, oldest first; none where nothing is judged by them."""
        judged = self._section.loss_factor or self._section.grad_norm_factor
        return tuple(self._history) if judged else ()

    def of_loss(self, step: int, loss: float) -> str:
        """Say what is wrong with a step, given its loss; "" if nothing."""
        if step in self.vetoed:
            return "it was bad in an earlier attempt"
        limit = self._limit(0, self._section.loss_factor)
        return (
            ""
            if math.isfinite(loss) and loss <= limit
            else f"its loss is {loss:g}{_above(loss, limit)}"
        )

    def most_norm(self) -> float:
        """Return the largest gradient norm that is no anomaly."""
        return self._limit(1, self._section.grad_norm_factor)

    def of_norm(self, norm: float) -> str:
        """Say what is wrong with a gradient norm; "" if nothing."""
        limit = self.most_norm()
        return (
            ""
            if math.isfinite(norm) and norm <= limit
            else f"its gradient norm is {norm:g}{_above(norm, limit)}"
        )

    def sound(self, loss: float, norm: float) -> None:
        """Note a step that was."""
        self._history.append((loss, norm))
        self.in_a_row = 0

    def _limit(self, column: int, factor: float) -> float:
        if not factor or len(self._history) < self._section.window:
            return math.inf
        return factor * median(values[column] for values in self._history)


def stopped(section: AnomalySection, step: int, reason: str, samples: np.ndarray) -> AnomalyError:
    """Return the error that ends a run at `step` (from 0); `samples`: sorted ids."""
    why = (
        ""
        if section.action == "stop"
        else f" for more than {section.most_in_a_row} steps one after the other"
    )
    first = ", ".join(str(sample) for sample in samples[:8].tolist())
    return AnomalyError(
        f"anomaly.action={section.action}: step {step + 1} went bad{why}: {reason}; its {len(samples)} "
        f"samples begin with {first}; what was committed is kept; look at the data, lower "
        "optimizer.learning_rate, or set anomaly.action=skip or rollback"
    )


def _above(value: float, limit: float) -> str:
    return f", above the limit of {limit:g}" if math.isfinite(value) else ""


def write_record(store: Store, steps: Iterable[int], reason: str, samples: np.ndarray) -> None:
    """Keep with the run that `steps` are skipped and why (rank 0); `samples`: ids of the bad step, sorted.

    Raises StorageError: without the record a replay might differ, so a step is only skipped once it stands.
    """
    for step in steps:
        note = {"step": step, "reason": reason, "samples": samples.tolist()}
        store.write(f"{FOLDER}/step-{step:09d}.json", json.dumps(note).encode())


def vetoed_steps(store: Store) -> list[int]:
    """Return the steps (from 0) that earlier attempts skipped."""
    try:
        return [
            int(name.removeprefix("step-").removesuffix(".json"))
            for name in store.list(FOLDER)
            if name.startswith("step-") and name.endswith(".json")
        ]
    except ValueError as error:
        raise StorageError(
            f"{store.shown(FOLDER)}: holds a file that is no record of a skipped step ({error}); "
            "step-NNNNNNNNN.json is allowed; move it away"
        ) from error
