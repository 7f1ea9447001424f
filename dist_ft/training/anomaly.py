"""Loss and gradient anomalies, found from values equal on all workers, so that all decide alike.

The update of a step is skipped if its loss or gradient norm is not finite, or exceeds a multiple of
the median of the steps before. The step number and the samples of the step are stored with the run
at once, and every later attempt skips the step too: a replay gives the same history, even where the
cause was a bit that flipped once. The losses and norms of the steps before are saved in each
checkpoint. Pure, but for these records.

Dimensions: N samples of a step.
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
NUM_SAMPLES_SHOWN = 8


class AnomalyError(DistFtError):
    """A step has an anomaly and the config says to stop, or too many steps in a row have one."""


class RollbackRequested(Exception):
    """All workers must load the latest checkpoint. Not an error; users never see it."""


class AnomalyDetector:
    """Checks losses and gradient norms against those of the steps before.

    Attributes:
        skipped_steps: steps (from 0) whose update is skipped: those of earlier attempts and of this
            one.
        num_consecutive: steps in a row, up to now, that had an anomaly.
    """

    def __init__(
        self,
        section: AnomalySection,
        history: Sequence[tuple[float, float]] = (),
        skipped_steps: Iterable[int] = (),
        num_consecutive: int = 0,
    ) -> None:
        """Continue after `history`: (loss, gradient norm) of steps without an anomaly."""
        self._section = section
        self._history = deque(history, section.window)
        self.skipped_steps = set(skipped_steps)
        self.num_consecutive = num_consecutive

    @property
    def history(self) -> tuple[tuple[float, float], ...]:
        """(loss, gradient norm) of the last steps without an anomaly, oldest first.

        Empty if no check uses them.
        """
        # Each checkpoint stores the history, so one that no check reads is left out.
        is_used = self._section.loss_factor or self._section.grad_norm_factor
        if not is_used:
            return ()
        return tuple(self._history)

    def check_loss(self, step: int, loss: float) -> str:
        """Return what is wrong with the loss of `step` (from 0); "" if nothing."""
        # Before the loss is looked at: a bit that flipped once is right in a replay, which must
        # skip the step all the same.
        if step in self.skipped_steps:
            return "an earlier attempt skipped it"

        # Infinity is not above the limit of infinity, hence both conditions.
        limit = self._limit(0, self._section.loss_factor)
        if math.isfinite(loss) and loss <= limit:
            return ""

        return f"its loss is {loss:g}{_exceeds(loss, limit)}"

    def grad_norm_limit(self) -> float:
        """Return the largest gradient norm that is not an anomaly."""
        return self._limit(1, self._section.grad_norm_factor)

    def check_grad_norm(self, norm: float) -> str:
        """Return what is wrong with a gradient norm; "" if nothing."""
        limit = self.grad_norm_limit()
        if math.isfinite(norm) and norm <= limit:
            return ""

        return f"its gradient norm is {norm:g}{_exceeds(norm, limit)}"

    def record(self, loss: float, norm: float) -> None:
        """Add a step without an anomaly to the history."""
        self._history.append((loss, norm))
        self.num_consecutive = 0

    def _limit(self, column: int, factor: float) -> float:
        """Return `factor` times the median of a column of the history.

        Infinity until the window is full.
        """
        # A median of only a few steps would be a poor estimate of what is usual.
        if not factor or len(self._history) < self._section.window:
            return math.inf

        return factor * median(values[column] for values in self._history)


def stop_error(
    section: AnomalySection, step: int, reason: str, samples: np.ndarray
) -> AnomalyError:
    """Return the error that ends a run at `step` (from 0); `samples`: sorted ids (N,)."""
    # Under skip and rollback, it is the number of anomalies in a row that ends the run.
    consecutive = ""
    if section.action != "stop":
        consecutive = f", and so had more than {section.max_consecutive} steps in a row"

    first_samples = ", ".join(map(str, samples[:NUM_SAMPLES_SHOWN].tolist()))
    return AnomalyError(
        f"anomaly.action={section.action}: step {step + 1} has an anomaly{consecutive}: {reason}; "
        f"the ids of its {len(samples)} samples start with {first_samples}; committed checkpoints "
        "are kept. Check the data, lower optimizer.learning_rate, or set anomaly.action=skip or "
        "rollback."
    )


def _exceeds(value: float, limit: float) -> str:
    # NaN and infinity are anomalies whatever the limit is.
    if not math.isfinite(value):
        return ""
    return f", above the limit of {limit:g}"


def write_skipped_steps(
    store: Store, steps: Iterable[int], reason: str, samples: np.ndarray
) -> None:
    """Store with the run that `steps` (from 0) are skipped and why (rank 0 only).

    `samples` are the ids (N,) of the samples of the step with the anomaly, sorted.

    Raises:
        StorageError: a record was not written. Without it a replay might differ, so a step is
            skipped only once its record is stored.
    """
    # A file for each step, because object stores cannot append.
    for step in steps:
        record = {"step": step, "reason": reason, "samples": samples.tolist()}
        store.write(f"{FOLDER}/step-{step:09d}.json", json.dumps(record).encode())


def read_skipped_steps(store: Store) -> list[int]:
    """Return the steps (from 0) that earlier attempts skipped.

    Raises:
        StorageError: the folder holds a file with another name.
    """
    # The name alone says which step it is, so that a start reads no file.
    steps = []
    try:
        for name in store.list(FOLDER):
            if name.startswith("step-") and name.endswith(".json"):
                steps.append(int(name.removeprefix("step-").removesuffix(".json")))
    except ValueError as error:
        raise StorageError(
            f"{store.redacted_url(FOLDER)}: contains a file that is not the record of a skipped "
            f"step ({error}). Allowed: files named step-NNNNNNNNN.json. Move the file away."
        ) from error

    return steps
