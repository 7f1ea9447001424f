"""Callbacks: code of a user, or of the process around a run, that training calls at its events.

Light: no torch, so that a driver starts fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_ft.core.errors import ConfigError, DistFtError


class CallbackError(DistFtError):
    """A callback raised an error; the text names the callback and the method."""


class Callback:
    """Base class of callbacks. Pass instances to `dist_ft.train(config, callbacks=[...])`.

    All methods do nothing by default: override those you need. They run in the training process,
    and training waits for them. The first step is step 1. An exception ends the run with a
    `CallbackError` (a `DistFtError` is raised unchanged).

    Example:
        class PrintLoss(Callback):
            def on_step_end(self, step, loss):
                print(step, loss)
    """

    def on_step_end(self, step: int, loss: float) -> None:
        """Run on all ranks after each training step, before its evaluation and its checkpoint.

        `loss` is the mean over the target tokens of the global batch, equal on all ranks. It is
        called for a step whose update was skipped too (`anomaly.action`).
        """

    def on_metrics(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Run on rank 0 after each line of metrics.jsonl; `kind` is train, evaluation or pace.

        Values may be NaN or infinite in a step with an anomaly.
        """

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Run on rank 0 after each evaluation on held-out data.

        Step 0 is the one before training.
        """

    def on_checkpoint_committed(self, url: str, metrics: Mapping[str, float]) -> None:
        """Run on all ranks after a checkpoint is complete in storage.

        `metrics` has its step and loss.
        """

    def on_local_checkpoint_committed(self, step: int) -> None:
        """Run on all ranks after a checkpoint is complete on the workers' own nodes only."""

    def on_progress(self) -> None:
        """Run on all ranks at each sign of progress: a step, a save, a batch of an evaluation."""


class CallbackList(Callback):
    """Calls several callbacks in their order. An error names the callback that raised it."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        """Take callbacks in the order in which they are called.

        Raises:
            ConfigError: an item is not an instance of `Callback`.
        """
        # Checked at the start: a class passed by mistake would fail at its first event only.
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(
                    [
                        f"callbacks={callback!r}: not an instance of dist_ft.Callback. Allowed: "
                        "instances of its subclasses. Define a subclass and pass an instance."
                    ],
                    "callbacks",
                )

        self._callbacks = tuple(callbacks)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    def on_step_end(self, step: int, loss: float) -> None:  # noqa: D102
        self._call("on_step_end", step, loss)

    def on_metrics(self, step: int, kind: str, values: Mapping[str, float]) -> None:  # noqa: D102
        self._call("on_metrics", step, kind, values)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:  # noqa: D102
        self._call("on_evaluation", step, metrics)

    def on_checkpoint_committed(self, url: str, metrics: Mapping[str, float]) -> None:  # noqa: D102
        self._call("on_checkpoint_committed", url, metrics)

    def on_local_checkpoint_committed(self, step: int) -> None:  # noqa: D102
        self._call("on_local_checkpoint_committed", step)

    def on_progress(self) -> None:  # noqa: D102
        self._call("on_progress")

    def _call(self, event: str, *args: Any) -> None:
        for callback in self._callbacks:
            try:
                getattr(callback, event)(*args)
            except DistFtError:
                raise  # already a clear line, and its type may matter to the caller
            except Exception as error:
                name = f"{type(callback).__module__}.{type(callback).__qualname__}.{event}"
                raise CallbackError(
                    f"callback {name} failed: {type(error).__name__}: {error}. Committed "
                    "checkpoints are kept. Fix the callback and run the same command to resume."
                ) from error
