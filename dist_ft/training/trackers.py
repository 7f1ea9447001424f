"""Metrics to where people watch them: Weights & Biases, MLflow, where asked for and installed. Rank 0's.

Guarantees: what is missing or refused is one line before training; a tracker that fails later is logged once and left
alone, and training goes on; a run that goes on writes into the same tracked run. Credentials are never in the config.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError
from dist_ft.core.logs import redact

log = logging.getLogger("dist_ft.metrics")
Listener = Callable[[int, str, Mapping[str, float]], None]
"""Is told (step, kind, values) of every line of metrics."""
TAG = "dist_ft.run"


def problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for each tracker that is asked for and not installed."""
    for name, field, asked in (
        ("wandb", "project", config.log.wandb.project),
        ("mlflow", "experiment", config.log.mlflow.experiment),
    ):
        if asked and importlib.util.find_spec(name) is None:
            yield (
                f"log.{name}.{field}={asked}: {name} is not installed here; it comes with an extra; "
                f"pip install 'dist-ft[{name}]', or leave log.{name} out"
            )


class Trackers:
    """The trackers of a run; each is a listener and a way to close it."""

    def __init__(self, listeners: list[tuple[str, Listener, Callable[[], None]]]) -> None:
        self._listeners = listeners

    @classmethod
    def open(cls, config: RunConfig, url: str, cache: Path) -> Trackers:
        """Start or resume the tracked runs.

        Raises ConfigError with a line for what is missing or refused.
        """
        missing = list(problems(config))
        if missing:
            raise ConfigError(missing, "trackers")
        found: list[tuple[str, Listener, Callable[[], None]]] = []
        for name, asked, begin in (
            ("wandb", config.log.wandb.project, _wandb),
            ("mlflow", config.log.mlflow.experiment, _mlflow),
        ):
            if not asked:
                continue
            try:
                found.append((name, *begin(config, url, cache)))
            except Exception as error:
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ConfigError(
                    [
                        redact(
                            f"log.{name}: it can not begin ({said}); check its address and that its "
                            f"credentials are in the environment, or leave log.{name} out"
                        )
                    ],
                    "trackers",
                ) from error
        return cls(found)

    def add(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Tell all of one line of metrics; one that fails is left alone from then on."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for one in list(self._listeners):
            try:
                one[1](step, kind, finite)
            except Exception as error:
                log.warning(
                    "%s takes no more metrics (%s); training goes on",
                    one[0],
                    redact(str(error).split("\n")[0]),
                )
                self._listeners.remove(one)

    def close(self) -> None:
        """Hand over what is left."""
        for name, _, end in self._listeners:
            try:
                end()
            except Exception as error:
                log.warning("%s did not end well (%s)", name, redact(str(error).split("\n")[0]))


def _id(url: str) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(url.encode())


def _wandb(config: RunConfig, url: str, cache: Path) -> tuple[Listener, Callable[[], None]]:
    import wandb

    section = config.log.wandb
    folder = Path(section.folder).expanduser() if section.folder else cache / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=section.project,
        entity=section.entity,
        mode=section.mode,
        dir=str(folder),
        id=_id(url),
        name=config.run.name,
        resume="allow",
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # a step done again after a restart is no step back

    def add(step: int, kind: str, values: Mapping[str, float]) -> None:
        run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    return add, run.finish


def _mlflow(config: RunConfig, url: str, _cache: Path) -> tuple[Listener, Callable[[], None]]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    section, key = config.log.mlflow, _id(url)
    client = MlflowClient(tracking_uri=section.tracking_uri)
    known = client.get_experiment_by_name(section.experiment)
    experiment = known.experiment_id if known else client.create_experiment(section.experiment)
    runs = client.search_runs([experiment], f"tags.`{TAG}` = '{key}'", max_results=1)
    run_id = (
        runs[0]
        if runs
        else client.create_run(experiment, tags={TAG: key}, run_name=config.run.name)
    ).info.run_id
    client.update_run(run_id, status="RUNNING")

    def add(step: int, kind: str, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(
            run_id, [Metric(f"{kind}/{name}", value, now, step) for name, value in values.items()]
        )

    return add, lambda: client.set_terminated(run_id)
