"""A search over the fields of a config: its trials, each an ordinary run, and what they gave.

What is known stands in <run.storage>/<name>/trials.json, written whenever a trial begins, is evaluated or ends.
Guarantees: cut off anywhere, the same call goes on: trials that are over are not run again, those under way go on from
their checkpoints with their values. Trials that failed are tried again. Ray Tune is `runtime.ray_tune`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dist_ft.config import renames
from dist_ft.config.identity import changes
from dist_ft.config.load import load_stored_mapping, to_mapping
from dist_ft.config.schema import RunConfig
from dist_ft.config.search import Search
from dist_ft.core.errors import ConfigError, WorkerError
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.workflows import search_report
from dist_ft.workflows.run_stages import MAY_CHANGE
from dist_ft.workflows.trial import ENDED, Trial

STATE = "trials.json"
OVER = ("done", "stopped")


def run(search: Search, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run a search to its end, or go on with it; return the report (`search_report.gather`).

    Raises:
        ConfigError: a search of this name has begun with other fields; Optuna is asked for and not there.
    """
    from dist_ft.workflows import ray_tune

    section = search.section
    base = search.config(
        {field: (one.values or (one.low,))[0] for field, one in section.space.items()}
    )
    if section.search == "optuna":
        ray_tune.require_optuna()
    filesystem.configure(base.storage.options)
    store = Store(f"{base.run.storage.rstrip('/')}/{section.name}")
    journal = Journal(store, search, base, say)
    ray_tune.run(
        search,
        base,
        [trial for trial in journal.trials.values() if trial.state in OVER],
        [trial for trial in journal.trials.values() if trial.state not in OVER],
        journal,
    )
    if all(trial.state == "failed" for trial in journal.trials.values()):
        raise WorkerError(
            f"all {len(journal.trials)} trials of {section.name} failed; trial 0: "
            f"{journal.trials[min(journal.trials)].error}"
        )
    report = search_report.gather(section, base, store.url, list(journal.trials.values()))
    search_report.keep(store, report)
    return report


@dataclass
class Journal:
    """Keeps what is known of the trials (a `ray_tune.Watcher`)."""

    store: Store
    search: Search
    base: RunConfig
    say: Callable[[str], None]
    trials: dict[int, Trial] = field(default_factory=dict)
    _begun: dict[int, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there; refuse it if it is another search."""
        if not self.store.exists(STATE):
            return
        held = json.loads(self.store.read(STATE))
        require_same(self.search, self.base, held)
        self.trials = {
            one["number"]: Trial(**{**one, "reports": tuple(map(tuple, one["reports"]))})
            for one in held["trials"]
        }

    def began(self, number: int, values: dict[str, Any]) -> None:
        """Note a trial that starts, or goes on."""
        before = self.trials.get(number)
        self._begun[number] = time.monotonic(), before.seconds if before else 0.0
        self.trials[number] = Trial(number, values, seconds=before.seconds if before else 0.0)
        self.say(
            f"trial {number}: "
            + ", ".join(f"{name}={search_report.shown(value)}" for name, value in values.items())
        )
        self._keep()

    def reported(self, number: int, step: int, value: float) -> None:
        """Note an evaluation."""
        trial = self.trials[number]
        if step <= trial.step:
            return  # the last report comes again with the end of a trial
        self._note(replace(trial, reports=(*trial.reports, (step, value))))
        self.say(f"trial {number}: step {step}, {self.base.checkpoint.best_by} {value:.4f}")

    def ended(self, number: int, failed: bool) -> None:
        """Note the end of a trial: it came to its own end, was stopped early, or failed."""
        run = Store(f"{self.base.run.storage.rstrip('/')}/{self.search.section.name}-t{number}")
        said = json.loads(run.read(ENDED)) if run.exists(ENDED) else {}
        state = "failed" if failed else "done" if "step" in said else "stopped"
        error = said.get("error", "its process was lost") if failed else ""
        self._note(replace(self.trials[number], state=state, error=error))
        self.say(f"trial {number}: {state}" + (f": {error}" if error else ""))

    def _note(self, trial: Trial) -> None:
        began, before = self._begun[trial.number]
        self.trials[trial.number] = replace(
            trial, seconds=round(before + time.monotonic() - began, 3)
        )
        self._keep()

    def _keep(self) -> None:
        trials = [asdict(self.trials[number]) for number in sorted(self.trials)]
        self.store.write(
            STATE,
            json.dumps(
                {
                    "search": self.search.section.model_dump(mode="json"),
                    "base": to_mapping(self.base),
                    "trials": trials,
                },
                ensure_ascii=False,
                indent=1,
            ).encode(),
        )


def require_same(search: Search, base: RunConfig, held: dict[str, Any]) -> None:
    """Raise ConfigError, one line, if the search that has begun is another; trials may become more."""
    now = search.section.model_dump(mode="json")
    for name, value in renames.SEARCH.migrate(held["search"]).items():
        if now[name] != value and name not in ("trials", "max_concurrent"):
            raise ConfigError(
                [
                    f"{name}: this search has begun with another {name} ({json.dumps(value)[:120]}); trials "
                    "and max_concurrent may change; restore it, or choose another name"
                ],
                "tune",
            )
    fixed, free = changes(load_stored_mapping(held["base"], "tune"), base)
    for one in [
        *fixed,
        *(change for change in free if change.path.split(".")[0] not in MAY_CHANGE),
    ]:
        raise ConfigError(
            [
                f"{one.path}={one.new}: trials of this search were made with {one.old}; what they learn may "
                "not change; restore it, or choose another name"
            ],
            "tune",
        )
