"""What `runtime.bootstrap.training_run` builds for the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import TensorInfo
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.loader import Loader
from dist_ft.data.batching.stream_loader import StreamLoader
from dist_ft.engine.base import Engine
from dist_ft.planning.run_limits import RunLimits
from dist_ft.storage.filesystem import Store
from dist_ft.training.anomaly import AnomalyDetector
from dist_ft.training.held_out_generation import HeldOutGenerator
from dist_ft.training.metrics_log import MetricsLog
from dist_ft.training.minimum_risk import MinimumRisk
from dist_ft.training.time_ledger import TimeLedger


@dataclass(frozen=True)
class Components:
    """The components of a run in this worker.

    Attributes:
        engine: the model and its optimizer.
        loader: loader of the training data.
        evaluation: loader of the held-out data; None without any.
        manager: loads and saves checkpoints.
        metrics: the metrics log; None on ranks other than 0.
        world: this rank and the number of ranks.
        collectives: communication between ranks.
        tensors: {name: shape} of the model's tensors.
        aliases: names of tied weights, to the names they are saved under.
        anomaly_detector: checks losses and gradient norms.
        store: the run's folder.
        num_failures: attempts of the run so far that failed.
        time_ledger: how this process spends its time.
        evaluations: (step, value) of checkpoint.best_by at each evaluation so far; the loop
            appends.
        held_out_generator: generates text at evaluations; None: no text is generated.
        minimum_risk: samples the text of minimum risk training; None: the likelihood is maximized.
        limits: limits of the run's time and cost.
    """

    engine: Engine
    loader: Loader | StreamLoader
    evaluation: Loader | None
    manager: CheckpointManager
    metrics: MetricsLog | None
    world: World
    collectives: Collectives
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    anomaly_detector: AnomalyDetector
    store: Store
    num_failures: int = 0
    time_ledger: TimeLedger = field(default_factory=TimeLedger)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    held_out_generator: HeldOutGenerator | None = None
    minimum_risk: MinimumRisk | None = None
    limits: RunLimits = field(default_factory=RunLimits)
