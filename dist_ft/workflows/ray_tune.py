"""Run the trials of a search on Ray Tune, one process each: grid, random or Optuna; early stopping.

The only module that imports `ray.tune`. Nothing that Ray Tune writes is read again: when a search
resumes, `workflows.search` passes the finished trials, and they are reported to Optuna and to the
scheduler once more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dist_ft.config.schema import RunConfig
from dist_ft.config.search import Range, Search, SearchSection
from dist_ft.core import scratch
from dist_ft.core.errors import ConfigError
from dist_ft.metrics.best import LOWER_IS_BETTER
from dist_ft.runtime.ray_backend.driver import connected
from dist_ft.runtime.ray_backend.placement import worker_resources

if TYPE_CHECKING:
    from dist_ft.workflows.trial import Trial

STEP, VALUE = "step", "value"
"""What a trial reports: the step of an evaluation, and the best checkpoint.best_by up to it."""
NO_STEP_LIMIT = 10**9
"""Stands for the length of a run whose number of steps is not known; no run is this long."""


class TrialListener(Protocol):
    """Receives the events of trials, in the process of the search."""

    def on_start(self, number: int, values: dict[str, Any]) -> None:
        """Trial `number` starts or resumes; `values` are those of the searched fields."""

    def on_evaluation(self, number: int, step: int, value: float) -> None:
        """Trial `number` was evaluated; `value` is its best so far."""

    def on_end(self, number: int, failed: bool) -> None:
        """Trial `number` has ended."""


def run(
    search: Search,
    base: RunConfig,
    finished: Sequence[Trial],
    unfinished: Sequence[Trial],
    listener: TrialListener,
) -> None:
    """Run the trials of a search that are not finished.

    Args:
        search: the search.
        base: config of a trial, for the fields that all trials share.
        finished: trials that are not run again.
        unfinished: trials that were started but did not finish. They run again, with their values.
        listener: receives the events of trials.

    Raises:
        ConfigError: the search uses Optuna, which is not installed.
    """
    section = search.section
    num_left = section.num_trials - len(finished)
    if num_left <= 0:
        return

    _configure_ray_tune()
    mode = "min" if base.checkpoint.best_by in LOWER_IS_BETTER else "max"
    with connected(base), scratch.folder("tune") as results:
        import ray.tune as tune

        # Ray Tune has lower-case names for CPUs and GPUs. It passes all other names on to Ray.
        resources = {
            **worker_resources(base),
            "cpu": base.cluster.cpus_per_worker,
            "gpu": base.cluster.gpus_per_worker,
        }
        if section.search == "optuna":
            space: dict[str, Any] = {}
            searcher = _optuna_searcher(section, mode, finished, unfinished)
            num_samples = num_left
        else:
            # Also for a random search, whose points are known: Ray Tune only goes through them. Its
            # grid is one sample, with a trial for each point.
            space = {"trial": tune.grid_search(_remaining_points(section, finished))}
            searcher = None
            num_samples = 1

        # What Ray Tune stores is never read again, so its folder is deleted with this call.
        tune.Tuner(
            tune.with_resources(_trainable(search), resources),
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_scheduler(section, base, mode, finished),
                max_concurrent_trials=section.max_concurrent,
                num_samples=num_samples,
            ),
            run_config=tune.RunConfig(
                name=section.name,
                storage_path=str(results),
                verbose=0,
                callbacks=[_callback(listener)],
            ),
        ).fit()


def _configure_ray_tune() -> None:
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # so that Ctrl-C raises KeyboardInterrupt
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the listener reports failures


def _trainable(search: Search) -> Callable[[dict[str, Any]], None]:
    """Return the function that runs one trial, in a process of Ray Tune."""
    # Ray Tune starts this process in a folder of its own, but paths in the config are relative to
    # the current folder, which may not exist on other nodes.
    folder = os.getcwd()

    def train(params: dict[str, Any]) -> None:
        import ray.tune as tune

        from dist_ft.workflows.trial import run_trial

        if os.path.isdir(folder):
            os.chdir(folder)

        config = search.config(params["trial"]["values"], params["trial"]["number"])
        run_trial(config, lambda step, value: tune.report({STEP: step, VALUE: value}))

    return train


def _remaining_points(section: SearchSection, finished: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return {number, values} of each point of a grid or random search that is not finished."""
    finished_numbers = {trial.number for trial in finished}
    return [
        {"number": number, "values": section.point(number)}
        for number in range(section.num_trials)
        if number not in finished_numbers
    ]


def _optuna_searcher(
    section: SearchSection, mode: str, finished: Sequence[Trial], unfinished: Sequence[Trial]
) -> Any:
    """Return an Optuna searcher that knows the finished trials and numbers those it suggests."""
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    encoded = {}  # values by number of the trial
    for trial in [*finished, *unfinished]:
        encoded[trial.number] = _encode_values(section, trial)

    # Another seed once trials have finished: with the same one, a resumed search would first draw
    # the values that these trials have tried.
    optuna_search = OptunaSearch(
        space=_optuna_space(section, optuna.distributions),
        metric=VALUE,
        mode=mode,
        seed=section.seed + len(finished),
        points_to_evaluate=[encoded[trial.number] for trial in unfinished],
    )
    for trial in finished:
        # A trial without a value counts as failed, and Ray Tune drops the 0.0 of a failed trial.
        optuna_search.add_evaluated_point(
            encoded[trial.number], trial.value or 0.0, error=trial.value is None
        )

    # In the order of Optuna's suggestions: first `points_to_evaluate`, then new points.
    started = [trial.number for trial in unfinished]
    used = {*started, *(trial.number for trial in finished)}
    numbers = started + [number for number in range(section.num_trials) if number not in used]

    # A wrapper, because each suggestion needs a number. It suggests nothing once all numbers are
    # used.
    class _NumberedSearch(Searcher):
        def suggest(self, trial_id: str) -> dict[str, Any] | None:
            if not numbers:
                return None

            suggestion = optuna_search.suggest(trial_id) or {}
            values = {
                field: _decode_value(section.space[field], value)
                for field, value in suggestion.items()
            }
            return {"trial": {"number": numbers.pop(0), "values": values}}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            optuna_search.on_trial_result(trial_id, result)

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            optuna_search.on_trial_complete(trial_id, result, error)

        def save(self, checkpoint_path: str) -> None:
            """Save nothing: a resumed search builds its state from the stored trials."""

        def restore(self, checkpoint_path: str) -> None:
            """Restore nothing."""

    return _NumberedSearch(metric=VALUE, mode=mode)


def _optuna_space(section: SearchSection, distributions: Any) -> dict[str, Any]:
    """Return Optuna's distribution of each field; for a list of values, that of their indices."""
    space = {}
    for field, choice in section.space.items():
        low, high = choice.low or 0, choice.high or 0

        # Indices, because Optuna's categories are scalars, but values of a field may be lists.
        if choice.values:
            space[field] = distributions.CategoricalDistribution(range(len(choice.values)))
        elif choice.is_whole:
            space[field] = distributions.IntDistribution(int(low), int(high), log=choice.log)
        else:
            space[field] = distributions.FloatDistribution(float(low), float(high), log=choice.log)
    return space


def _encode_values(section: SearchSection, trial: Trial) -> dict[str, float | int | str | bool]:
    """Return a trial's value of each field, as Optuna's distributions have it."""
    encoded = {}
    for field, value in trial.values.items():
        encoded[field] = _encode_value(section.space[field], value)
    return encoded


def _encode_value(choice: Range, value: Any) -> Any:
    """Return the index of a value in the list of `choice`; a value of a range as it is."""
    return choice.values.index(value) if choice.values else value


def _decode_value(choice: Range, value: Any) -> Any:
    """Return the value that `_encode_value` encoded."""
    return choice.values[value] if choice.values else value


def require_optuna() -> Any:
    """Return the module `optuna`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            [
                "search=optuna: optuna is not installed. Without it random and grid are allowed. "
                "Install it with pip install 'dist-ft[tune]'."
            ],
            "tune",
        ) from error
    return optuna


def _scheduler(
    section: SearchSection, base: RunConfig, mode: str, finished: Sequence[Trial]
) -> Any:
    """Return an ASHA scheduler that knows the finished trials; None without early stopping."""
    from types import SimpleNamespace

    from ray.tune.schedulers import ASHAScheduler

    if section.asha is None:
        return None

    # With epochs the number of steps is not known. A limit out of reach adds rungs that no trial
    # reaches, and these stop none.
    max_steps = base.schedule.steps or NO_STEP_LIMIT
    scheduler = ASHAScheduler(
        time_attr=STEP,
        metric=VALUE,
        mode=mode,
        max_t=max_steps,
        grace_period=min(section.asha.grace_steps, max_steps),
        reduction_factor=section.asha.reduction,
        stop_last_trials=False,
    )

    # New trials are compared with the results of finished ones at each rung. ASHA does not use the
    # controller, and of a trial only its id.
    controller: Any = None
    for trial in finished:
        known_trial: Any = SimpleNamespace(trial_id=f"known-{trial.number}")
        scheduler.on_trial_add(controller, known_trial)
        for step, value in trial.reports:
            scheduler.on_trial_result(controller, known_trial, {STEP: step, VALUE: value})

    return scheduler


def _callback(listener: TrialListener) -> Any:
    """Return a Ray Tune callback that forwards the events of trials to `listener`."""
    import ray.tune as tune

    class _Forward(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.on_start(**trial.config["trial"])

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            number = trial.config["trial"]["number"]
            listener.on_evaluation(number, int(result[STEP]), float(result[VALUE]))

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.on_end(trial.config["trial"]["number"], failed=False)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.on_end(trial.config["trial"]["number"], failed=True)

    return _Forward()
