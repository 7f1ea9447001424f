"""What `runtime.build` wires together for the loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import TensorInfo
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.loader import Loader
from dist_ft.engine.base import Engine
from dist_ft.storage.filesystem import Store
from dist_ft.training.anomaly import AnomalyDetector
from dist_ft.training.held_out_generation import HeldOutGenerator
from dist_ft.training.metrics_log import MetricsLog
from dist_ft.training.minimum_risk import MinimumRisk
from dist_ft.training.time_ledger import TimeLedger


@dataclass(frozen=True)
class Components:
    """The parts of a run in this worker.

    Attributes:
        num_failures: of the run's attempts so far.
        clock: what this process spends its time on.
        evaluated: (step, value) of checkpoint.best_by at every evaluation of the run so far; grows.
        texts: what makes texts at evaluations; None: none are made.
        risk: what draws the texts of minimum risk training; None: the likelihood is learned.
    """

    engine: Engine
    loader: Loader
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
