"""Follow a run from any machine that can read its storage, until it ends.

Reads only metrics.jsonl and the time of the run's attempts. Both are at most as old as the run's
last write: half a minute, or the time of a save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dist_ft.checkpoint.attempts import TIME, number_in_name
from dist_ft.core.json_documents import interpreting
from dist_ft.runs import catalog, time_accounting
from dist_ft.runs.time_accounting import StoredTime
from dist_ft.storage.filesystem import Store
from dist_ft.training.metrics_log import FILE, read_metrics

SILENT_S = 180.0
"""A run that wrote nothing for this long is gone, or cannot write."""
SHOWN_KINDS = ("train", "evaluation")


def watch(
    url: str,
    once: bool,
    report_line: Callable[[str], None],
    poll_s: float = 5.0,
    silent_s: float = SILENT_S,
) -> str:
    """Print each new line of a run's metrics; return how the run stands.

    Args:
        url: folder of the run.
        once: print the current state and return at once.
        report_line: called with each line of text.
        poll_s: seconds between two reads.
        silent_s: return when nothing was written for this long.

    Raises:
        DataError: the folder holds no run.
    """
    store = catalog.open_run(url)

    num_shown = 0
    last_shown: dict[str, Any] | None = None
    last_state = ""
    changed_at = time.monotonic()

    while True:
        # The attempt before the metrics: the run writes its end last, so once it has ended, the
        # metrics read after it are complete.
        attempt = latest_attempt(store)
        lines = [line for line in read_metrics(store) if line.get("kind") in SHOWN_KINDS]

        # A run that restarted from a checkpoint drops the lines after it.
        was_rewound = last_shown is not None and lines[num_shown - 1 : num_shown] != [last_shown]
        if was_rewound:
            step = lines[-1]["step"] if lines else 0
            report_line(f"-- resumed from a checkpoint; metrics end at step {step} --")
            num_shown = min(num_shown, len(lines))

        with interpreting(store.redacted_url(FILE)):
            texts = list(metric_lines(lines[num_shown:]))
        for text in texts:
            report_line(text)
        num_shown = len(lines)
        last_shown = lines[-1] if lines else None

        if attempt.get("ended"):
            return f"the run has ended: {attempt['ended']}"
        if once:
            return "the run has not ended, according to its storage"

        # The time file changes even while no step ends (a long start, a slow save), so both count
        # as signs of life. A monotonic clock of this machine: the run's clock may differ.
        state = f"{len(lines)} {attempt}"
        if state != last_state:
            last_state = state
            changed_at = time.monotonic()

        if time.monotonic() - changed_at > silent_s:
            return (
                f"the run has written nothing for {silent_s:.0f} s. It may have died, or it waits "
                "for nodes."
            )

        time.sleep(poll_s)


def latest_attempt(store: Store) -> StoredTime:
    """Return the time file of the latest attempt; {} before the first."""
    names = [name for name in store.list(TIME) if number_in_name(TIME, name)]
    if not names:
        return {}
    return time_accounting.read_stored_time(store, names[-1])


def metric_lines(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line of text for each line of metrics."""
    for line in lines:
        if line["kind"] == "evaluation":
            values = []
            for name, value in line.items():
                if name not in ("step", "kind") and isinstance(value, int | float):
                    values.append(f"{name} {value:.4f}")
            yield f"step {line['step']}  held-out: {', '.join(values)}"
            continue

        # NaN and infinity are null in the file.
        loss = "not finite" if line.get("loss") is None else f"{line['loss']:.4f}"
        yield (
            f"step {line['step']}  loss {loss}  lr {line.get('learning_rate') or 0:.2e}  "
            f"{line.get('tokens_per_s') or 0:,.0f} tok/s  {line.get('step_s') or 0:.2f} s/step"
        )
