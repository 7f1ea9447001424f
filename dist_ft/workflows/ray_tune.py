"""The door to Ray Tune: trials as processes of a Ray cluster, values by grid, random draw or Optuna, early stopping.

Each trial is an ordinary run in a process of its own. Nothing that Ray Tune writes is read again: what is known of
trials that are over comes from `runtime.search`, and is told to Optuna and to the scheduler anew.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dist_ft.config.schema import RunConfig
from dist_ft.config.search import Search, SearchSection
from dist_ft.core.errors import ConfigError
from dist_ft.metrics.best import LOWER_IS_BETTER
from dist_ft.runtime.ray_backend.driver import connected
from dist_ft.runtime.ray_backend.placement import worker_resources

if TYPE_CHECKING:
    from dist_ft.workflows.trial import (
        Trial,
    )

STEP, VALUE = "step", "value"
"""What a trial reports: the step of an evaluation, the best value of checkpoint.best_by up to it."""


def run(
    search: Search, base: RunConfig, over: Sequence[Trial], again: Sequence[Trial], told: Watcher
) -> None:
    """Run the trials of a search that are not over yet, until all are.

    Args:
        search: the search.
        base: the config of a trial, for what all have in common.
        over: trials that need not run again.
        again: trials that began and are not over: they run first, with their values.
        told: hears of trials, in this process.
    """
    section = search.section
    mode = "min" if base.checkpoint.best_by in LOWER_IS_BETTER else "max"
    left = section.num_trials - len(over)
    if left <= 0:
        return
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is a KeyboardInterrupt, as elsewhere
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # `told` says what failed, in a line
    with connected(base), tempfile.TemporaryDirectory(prefix="dist-ft-tune-") as scratch:
        import ray.tune as tune

        trainable = tune.with_resources(
            _trial(search),
            {
                **worker_resources(base),
                "cpu": base.cluster.cpus_per_worker,
                "gpu": base.cluster.gpus_per_worker,
            },
        )
        space, searcher = _searcher(section, mode, over, again)
        tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_scheduler(section, base, mode, over),
                max_concurrent_trials=section.max_concurrent,
                num_samples=1 if space else left,
            ),
            run_config=tune.RunConfig(
                name=section.name, storage_path=scratch, verbose=0, callbacks=[_callback(told)]
            ),
        ).fit()


class Watcher(Protocol):
    """Hears of trials."""

    def began(self, number: int, values: dict[str, Any]) -> None:
        """Trial `number` starts."""

    def reported(self, number: int, step: int, value: float) -> None:
        """Trial `number` was evaluated; `value` is its best so far."""

    def ended(self, number: int, failed: bool) -> None:
        """Trial `number` is over."""


def _trial(search: Search) -> Callable[[dict[str, Any]], None]:
    """Return what a process of Ray Tune runs: one trial."""
    folder = os.getcwd()

    def trial(given: dict[str, Any]) -> None:
        import ray.tune as tune

        from dist_ft.workflows.trial import (
            run_trial,
        )

        if os.path.isdir(folder):
            os.chdir(folder)
        config = search.config(given["trial"]["values"], given["trial"]["number"])
        run_trial(config, lambda step, value: tune.report({STEP: step, VALUE: value}))

    return trial


def _searcher(
    section: SearchSection, mode: str, over: Sequence[Trial], again: Sequence[Trial]
) -> tuple[dict[str, Any], Any]:
    """Return the points there are still to try, or what finds them."""
    import ray.tune as tune

    if section.search == "optuna":
        return {}, _by_optuna(section, mode, over, again)
    known = {trial.number for trial in over}
    points = [
        {"number": number, "values": section.point(number)}
        for number in range(section.num_trials)
        if number not in known
    ]
    return {"trial": tune.grid_search(points)}, None


def _by_optuna(
    section: SearchSection, mode: str, over: Sequence[Trial], again: Sequence[Trial]
) -> Any:
    """Return Optuna's search, which knows of all trials that are over; choices are their numbers to it."""
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = optuna.distributions
    space = {
        field: kinds.CategoricalDistribution(range(len(one.values)))
        if one.values
        else kinds.IntDistribution(int(one.low or 0), int(one.high or 0), log=one.log)
        if one.is_whole
        else kinds.FloatDistribution(float(one.low or 0), float(one.high or 0), log=one.log)
        for field, one in section.space.items()
    }

    def inner(values: dict[str, Any]) -> dict[str, Any]:
        return {
            field: section.space[field].values.index(value)
            if section.space[field].values
            else value
            for field, value in values.items()
        }

    found = OptunaSearch(
        space=space,
        metric=VALUE,
        mode=mode,
        seed=section.seed + len(over),
        points_to_evaluate=[inner(trial.values) for trial in again],
    )
    for trial in over:
        found.add_evaluated_point(
            inner(trial.values), trial.value or 0.0, error=trial.value is None
        )
    numbers = [trial.number for trial in again]
    numbers += [
        number
        for number in range(section.num_trials)
        if number not in {*numbers, *(trial.number for trial in over)}
    ]

    class _Numbered(Searcher):
        def suggest(self, trial_id: str) -> dict[str, Any] | None:
            if not numbers:
                return None
            values = {
                field: section.space[field].values[value] if section.space[field].values else value
                for field, value in (found.suggest(trial_id) or {}).items()
            }
            return {"trial": {"number": numbers.pop(0), "values": values}}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            found.on_trial_result(trial_id, result)

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            found.on_trial_complete(trial_id, result, error)

        def save(self, checkpoint_path: str) -> None:
            """Keep nothing: see `over`."""

        def restore(self, checkpoint_path: str) -> None:
            """Read nothing."""

    return _Numbered(metric=VALUE, mode=mode)


def require_optuna() -> Any:
    """Return the library; raises ConfigError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            [
                "search=optuna: optuna is not installed; allowed without it: random, grid; install it with "
                "pip install 'dist-ft[tune]'"
            ],
            "tune",
        ) from error
    return optuna


def _scheduler(section: SearchSection, base: RunConfig, mode: str, over: Sequence[Trial]) -> Any:
    """Return ASHA, told of what trials that are over had reached; None: trials go to their end."""
    from types import SimpleNamespace

    from ray.tune.schedulers import ASHAScheduler

    if section.asha is None:
        return None
    made = ASHAScheduler(
        time_attr=STEP,
        metric=VALUE,
        mode=mode,
        max_t=base.schedule.steps or 10**9,
        grace_period=min(section.asha.grace_steps, base.schedule.steps or 10**9),
        reduction_factor=section.asha.reduction,
        stop_last_trials=False,
    )
    for trial in over:
        known: Any = SimpleNamespace(trial_id=f"known-{trial.number}")
        controller: Any = None
        made.on_trial_add(controller, known)
        for step, value in trial.reports:
            made.on_trial_result(controller, known, {STEP: step, VALUE: value})
    return made


def _callback(told: Watcher) -> Any:
    """Return what passes on to `told` what Ray Tune says of trials."""
    import ray.tune as tune

    class _Callback(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            told.began(**trial.config["trial"])

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            told.reported(trial.config["trial"]["number"], int(result[STEP]), float(result[VALUE]))

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            told.ended(trial.config["trial"]["number"], failed=False)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            told.ended(trial.config["trial"]["number"], failed=True)

    return _Callback()
