"""A search over fields of a config: its trials, each an ordinary run, and their results.

The state of the trials lies in <run.storage>/<name>/trials.json, written whenever a trial starts,
is evaluated or ends. If the search is interrupted anywhere, the same call resumes it: finished
trials are not run again, unfinished ones resume from their checkpoints with their values, failed
ones are tried again. `ray_tune` runs the trials.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, TypedDict

from dist_ft.config import renames
from dist_ft.config.identity import changes
from dist_ft.config.load import load_stored_mapping, to_mapping
from dist_ft.config.schema import RunConfig
from dist_ft.config.search import Search
from dist_ft.core.errors import ConfigError, WorkerError
from dist_ft.core.json_documents import encode_json, interpreting
from dist_ft.storage import filesystem
from dist_ft.storage.documents import read_json_object
from dist_ft.storage.filesystem import Store
from dist_ft.workflows import search_report
from dist_ft.workflows.run_stages import OPERATIONAL_SECTIONS
from dist_ft.workflows.search_report import SearchReport
from dist_ft.workflows.trial import RESULT_FILE, Trial

STATE = "trials.json"
FINISHED = ("done", "stopped")
MAY_CHANGE = ("trials", "max_concurrent")
"""Fields of the search that may change when it is resumed."""


def run(search: Search, report_line: Callable[[str], None] = print) -> SearchReport:
    """Run or resume a search; return its report.

    Raises:
        ConfigError: a search of this name was started with other fields, or Optuna is requested
            but not installed.
        WorkerError: all trials failed.
    """
    from dist_ft.workflows import ray_tune

    section = search.section

    # Always the same point of the space: when a search resumes, its stored config is compared with
    # this one. Only fields that all trials share are read from it.
    first_values = {}
    for name, choice in section.space.items():
        first_values[name] = choice.values[0] if choice.values else choice.low
    base = search.config(first_values)

    # before anything is stored
    if section.search == "optuna":
        ray_tune.require_optuna()

    filesystem.configure(base.storage.options)
    store = Store(f"{base.run.storage.rstrip('/')}/{section.name}")
    journal = Journal(store, search, base, report_line)

    trials = list(journal.trials.values())
    finished = [trial for trial in trials if trial.state in FINISHED]
    unfinished = [trial for trial in trials if trial.state not in FINISHED]
    ray_tune.run(search, base, finished, unfinished, journal)

    # One failed trial does not end a search, as its values may be the reason.
    if all(trial.state == "failed" for trial in journal.trials.values()):
        first = min(journal.trials)
        raise WorkerError(
            f"all {len(journal.trials)} trials of {section.name} failed. Trial {first}: "
            f"{journal.trials[first].error}"
        )

    report = search_report.gather(section, base, store.url, list(journal.trials.values()))
    search_report.write(store, report)
    return report


class StoredSearch(TypedDict):
    """The content of STATE.

    Attributes:
        search: fields of the search.
        base: config of a trial, for the fields that all trials share.
        trials: fields of each `Trial`.
    """

    search: dict[str, Any]
    base: dict[str, Any]
    trials: list[dict[str, Any]]


class _Start(NamedTuple):
    """When a trial was started (steady clock), and its running time before that."""

    at_s: float
    seconds_before: float


@dataclass
class Journal:
    """The stored state of all trials (a `ray_tune.TrialListener`).

    Attributes:
        store: folder of the search.
        search: the search.
        base: config of a trial, for the fields that all trials share.
        report_line: called with each line of progress.
        trials: trials by number.
    """

    store: Store
    search: Search
    base: RunConfig
    report_line: Callable[[str], None]
    trials: dict[int, Trial] = field(default_factory=dict)
    _starts: dict[int, _Start] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the stored state; refuse it if it belongs to another search."""
        if not self.store.exists(STATE):
            return

        remedy = "Restore it from a copy, or use another search.name."
        with interpreting(self.store.redacted_url(STATE), remedy):
            stored = _migrate(read_json_object(self.store, STATE, remedy))
            require_same(self.search, self.base, stored)

            # JSON has lists where `Trial` has tuples
            for fields in stored["trials"]:
                reports = tuple((step, value) for step, value in fields["reports"])
                self.trials[fields["number"]] = Trial(**{**fields, "reports": reports})

    def on_start(self, number: int, values: dict[str, Any]) -> None:
        """Record a trial that starts or resumes."""
        # How an earlier start ended says nothing about this one, which may lose its process before
        # it writes a result. Ray Tune calls this before the trial runs.
        self._run_store(number).remove(RESULT_FILE)

        known = self.trials.get(number)
        seconds_before = known.seconds if known else 0.0
        self._starts[number] = _Start(time.monotonic(), seconds_before)
        # Without its reports: a resumed trial reports evaluations up to its latest checkpoint
        # again, and repeats later ones.
        self.trials[number] = Trial(number, values, seconds=seconds_before)

        shown = [f"{name}={search_report.format_value(value)}" for name, value in values.items()]
        self.report_line(f"trial {number}: {', '.join(shown)}")
        self._write()

    def on_evaluation(self, number: int, step: int, value: float) -> None:
        """Record an evaluation."""
        trial = self.trials[number]
        if step <= trial.step:
            return  # the end of a trial repeats its last report

        self._update(replace(trial, reports=(*trial.reports, (step, value))))
        self.report_line(f"trial {number}: step {step}, {self.base.checkpoint.best_by} {value:.4f}")

    def on_end(self, number: int, failed: bool) -> None:
        """Record the end of a trial: done, stopped early, or failed."""
        # The trial itself writes how it ended. One without a result was stopped by the scheduler,
        # or lost its process.
        run = self._run_store(number)
        result = read_json_object(run, RESULT_FILE) if run.exists(RESULT_FILE) else {}

        error = ""
        if failed:
            state, error = "failed", result.get("error", "its process was lost")
        elif "step" in result:
            state = "done"
        else:
            state = "stopped"

        self._update(replace(self.trials[number], state=state, error=error))
        detail = f": {error}" if error else ""
        self.report_line(f"trial {number}: {state}{detail}")

    def _run_store(self, number: int) -> Store:
        """Return the folder of a trial's own run."""
        return Store(f"{self.base.run.storage.rstrip('/')}/{self.search.section.name}-t{number}")

    def _update(self, trial: Trial) -> None:
        # after every event, so that a killed search loses no time of its trials
        start = self._starts[trial.number]
        seconds = start.seconds_before + time.monotonic() - start.at_s
        self.trials[trial.number] = replace(trial, seconds=round(seconds, 3))
        self._write()

    def _write(self) -> None:
        state = {
            "search": self.search.section.model_dump(mode="json"),
            "base": to_mapping(self.base),
            "trials": [asdict(self.trials[number]) for number in sorted(self.trials)],
        }
        self.store.write(STATE, encode_json(state, indent=1))


def _migrate(state: dict[str, Any]) -> StoredSearch:
    """Return a stored state with the field names and values of this version."""
    section = renames.SEARCH.migrate(state["search"])
    space = {}
    for path, choice in section["space"].items():
        field = renames.RUN.fields.get(path, path)
        # a renamed field may have renamed values too
        values = [renames.RUN.new_value(field, value) for value in choice["values"]]
        space[field] = {**choice, "values": values}
    section["space"] = space

    trials = []
    for trial in state["trials"]:
        values_by_field = {}
        for path, value in trial["values"].items():
            field = renames.RUN.fields.get(path, path)
            values_by_field[field] = renames.RUN.new_value(field, value)
        trials.append({**trial, "values": values_by_field})
    return {"search": section, "base": state["base"], "trials": trials}


def require_same(search: Search, base: RunConfig, stored: StoredSearch) -> None:
    """Check that the stored state belongs to this search. Its trials may become more.

    Raises:
        ConfigError: one line for the first field that differs.
    """
    # as JSON, like the stored fields: tuples of the section are lists there
    section = search.section.model_dump(mode="json")
    for name, value in stored["search"].items():
        if section[name] != value and name not in MAY_CHANGE:
            raise ConfigError(
                [
                    f"{name}: the search was started with {json.dumps(value)[:120]}. Only "
                    f"{' and '.join(MAY_CHANGE)} may change. Restore it, or choose another name."
                ],
                "tune",
            )

    identity, operational = changes(load_stored_mapping(stored["base"], "tune"), base)

    # what changes the result of training; a larger cluster or another log does not
    relevant = list(identity)
    for change in operational:
        if change.path.split(".")[0] not in OPERATIONAL_SECTIONS:
            relevant.append(change)
    for change in relevant:
        raise ConfigError(
            [
                f"{change.path}={change.new}: trials of this search used {change.old}, and their "
                "training may not change. Restore it, or choose another name."
            ],
            "tune",
        )
