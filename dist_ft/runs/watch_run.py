"""A run watched from anywhere that reaches its storage: its metrics as they come, until it ends.

Reads only metrics.jsonl and the accounts of its attempts. What is shown is at most as old as the run's own writing:
half a minute, or a save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.runs import catalog, time_accounting
from dist_ft.storage.filesystem import Store
from dist_ft.training import time_ledger
from dist_ft.training.metrics_log import read_metrics

SILENT_S = 180.0
"""An account that was not renewed for so long is of an attempt that is gone, or can not write."""


def watch(
    url: str,
    once: bool,
    tell: Callable[[str], None],
    poll_s: float = 5.0,
    silent_s: float = SILENT_S,
) -> str:
    """Tell each new line of a run's metrics as text; return how the run stands: over, or silent.

    once: tell what there is and return at once. Raises DataError if there is no run.
    """
    store, last, shown, changed, before = Store(url), None, 0, time.monotonic(), ""
    if not catalog.is_run(store):
        raise DataError(
            f"{store.shown()}: is no run; the folder <run.storage>/<run.name> is needed; dist-ft runs list "
            "STORAGE names them"
        )
    while True:
        account = newest(store)
        lines = [
            line for line in read_metrics(store) if line.get("kind") in ("train", "evaluation")
        ]
        if last is not None and lines[shown - 1 : shown] != [last]:
            step = lines[-1]["step"] if lines else 0
            tell(f"-- it has gone back to a checkpoint; its metrics go up to step {step} --")
            shown = min(shown, len(lines))
        for text in told(lines[shown:]):
            tell(text)
        shown, last = len(lines), lines[-1] if lines else None
        now = f"{len(lines)} {account}"
        if now != before:
            before, changed = now, time.monotonic()
        if account.get("ended"):
            return f"the run has ended: {account['ended']}"
        if once:
            return "the run has not ended, as far as it has written"
        if time.monotonic() - changed > silent_s:
            return f"nothing was heard of the run for {silent_s:.0f} s; it may be gone, or wait for nodes"
        time.sleep(poll_s)


def newest(store: Store) -> dict[str, Any]:
    """Return the account of the newest attempt; nothing before there is one."""
    names = store.list(time_ledger.FOLDER)
    return time_accounting.read(store, names[-1]) if names else {}


def told(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line of text for each line of metrics."""
    for line in lines:
        if line["kind"] == "evaluation":
            found = ", ".join(
                f"{name} {value:.4f}"
                for name, value in line.items()
                if name not in ("step", "kind") and isinstance(value, int | float)
            )
            yield f"step {line['step']}  held-out: {found}"
        else:
            loss = "not finite" if line.get("loss") is None else f"{line['loss']:.4f}"
            yield (
                f"step {line['step']}  loss {loss}  lr {line.get('learning_rate') or 0:.2e}  "
                f"{line.get('tokens_per_s') or 0:,.0f} tok/s  {line.get('step_s') or 0:.2f} s/step"
            )
