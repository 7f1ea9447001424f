"""Sends metrics to experiment trackers: Weights & Biases and MLflow, where configured. Rank 0 only.

Guarantees: a tracker that is not installed or refuses is one line before training; a tracker that
fails later is logged once and not used again, and training continues; a resumed run writes into the
same tracked run. Credentials are never in the config.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_ft.config.schema import RunConfig
from dist_ft.core import private_folders
from dist_ft.core.errors import ConfigError, FolderError
from dist_ft.core.logs import redact
from dist_ft.core.redaction import redact_values

log = logging.getLogger("dist_ft.metrics")
MLFLOW_TAG = "dist_ft.run"


@dataclass(frozen=True)
class Tracker:
    """One tracked run.

    Attributes:
        name: name of the tracker.
        add: takes (step, kind, values) of a line of metrics.
        close: sends what is left.
    """

    name: str
    add: Callable[[int, str, Mapping[str, float]], None]
    close: Callable[[], None]


def missing_trackers(config: RunConfig) -> Iterator[str]:
    """Yield a line for each tracker that is configured but not installed."""
    for name, field, value in (
        ("wandb", "project", config.log.wandb.project),
        ("mlflow", "experiment", config.log.mlflow.experiment),
    ):
        # Found, not imported: an import takes seconds, and the check of a config calls this too.
        if value and importlib.util.find_spec(name) is None:
            yield (
                f"log.{name}.{field}={value}: {name} is not installed. It comes with an extra. Run "
                f"pip install 'dist-ft[{name}]', or leave log.{name} out."
            )


class Trackers:
    """The trackers of a run."""

    def __init__(self, trackers: list[Tracker]) -> None:
        """Assign only."""
        self._trackers = trackers

    @classmethod
    def open(cls, config: RunConfig, url: str, cache: Path) -> Trackers:
        """Start the tracked runs, or resume them.

        Args:
            config: config of the run.
            url: URL of the run's folder; identifies it in the trackers.
            cache: folder for the files of trackers.

        Raises:
            ConfigError: lists each tracker that is not installed or rejects its settings.
            FolderError: the folder for its files is not safe to use.
        """
        missing = list(missing_trackers(config))
        if missing:
            raise ConfigError(missing, "trackers")

        opened: list[Tracker] = []
        for name, is_configured, start in (
            ("wandb", config.log.wandb.project, _start_wandb),
            ("mlflow", config.log.mlflow.experiment, _start_mlflow),
        ):
            if not is_configured:
                continue

            # Any exception: trackers raise those of their own HTTP clients, and more.
            try:
                opened.append(start(config, url, cache))
            except FolderError:
                raise
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                reason = lines[0]
                raise ConfigError(
                    [
                        redact(
                            f"log.{name}: cannot start ({reason}). Check its address and that its "
                            f"credentials are in the environment, or leave log.{name} out."
                        )
                    ],
                    "trackers",
                ) from error

        return cls(opened)

    def add(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Send the finite values of a line of metrics; a tracker that fails is not used again."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}

        # A copy, because the loop removes trackers that fail: one that does not answer would slow
        # down every later step.
        for tracker in list(self._trackers):
            try:
                tracker.add(step, kind, finite)
            except Exception as error:
                log.warning(
                    "%s gets no more metrics (%s); training continues",
                    tracker.name,
                    redact(str(error).split("\n")[0]),
                )
                self._trackers.remove(tracker)

    def close(self) -> None:
        """Close all trackers."""
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                log.warning(
                    "%s was not closed (%s)", tracker.name, redact(str(error).split("\n")[0])
                )


def _run_id(url: str) -> str:
    import xxhash

    # The same for every attempt, so that a resumed run finds its tracked run. A hash, because a
    # URL has characters that W&B does not allow in ids.
    return xxhash.xxh3_64_hexdigest(url.encode())


def _start_wandb(config: RunConfig, url: str, cache: Path) -> Tracker:
    import wandb

    section = config.log.wandb
    if section.folder:
        folder = Path(section.folder).expanduser()
        private_folders.require_safe(folder, "log.wandb.folder")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = private_folders.open_part(cache, "wandb", "data.cache_dir")
    run = wandb.init(
        project=section.project,
        entity=section.entity,
        mode=section.mode,
        dir=str(folder),
        id=_run_id(url),
        name=config.run.name,
        resume="allow",
        config=redact_values(config.model_dump(mode="json")),
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )

    # Steps may repeat after a restart, which W&B's own step does not allow.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def add(step: int, kind: str, values: Mapping[str, float]) -> None:
        line: dict[str, float] = {"step": step}
        for name, value in values.items():
            line[f"{kind}/{name}"] = value
        run.log(line)

    return Tracker("wandb", add, run.finish)


def _start_mlflow(config: RunConfig, url: str, _cache: Path) -> Tracker:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    # The client, not mlflow's functions: those keep an active run in global state, which a
    # user's own code may use.
    section, key = config.log.mlflow, _run_id(url)
    client = MlflowClient(tracking_uri=section.tracking_uri)
    experiment = client.get_experiment_by_name(section.experiment)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        experiment_id = client.create_experiment(section.experiment)

    # MLflow chooses the ids of runs itself, so ours is a tag.
    runs = client.search_runs([experiment_id], f"tags.`{MLFLOW_TAG}` = '{key}'", max_results=1)
    if runs:
        run = runs[0]
    else:
        run = client.create_run(experiment_id, tags={MLFLOW_TAG: key}, run_name=config.run.name)

    # A resumed run may have been marked as ended by an earlier attempt.
    run_id = run.info.run_id
    client.update_run(run_id, status="RUNNING")

    def add(step: int, kind: str, values: Mapping[str, float]) -> None:
        # One request for all values of a line.
        now_ms = int(time.time() * 1000)
        metrics = []
        for name, value in values.items():
            metrics.append(Metric(f"{kind}/{name}", value, now_ms, step))
        client.log_batch(run_id, metrics)

    return Tracker("mlflow", add, lambda: client.set_terminated(run_id))
