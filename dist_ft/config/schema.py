"""The schema of a run: frozen pydantic models, one per section.

Every field describes its meaning, unit and special values. Fields marked as identity decide which
samples and which model a run is about: they must not change when a run is resumed. All others are
operational: they may change, and the change is logged. Sections are defined in `sections`, with
their own checks; `checks` has contradictions between sections.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dist_ft.config.sections.anomaly import AnomalySection
from dist_ft.config.sections.batch import BatchSection
from dist_ft.config.sections.checkpoint import CheckpointSection
from dist_ft.config.sections.cluster import ClusterSection, WorkerRange
from dist_ft.config.sections.data import (
    DEFAULT_BUCKET,
    DataSection,
    FieldsSection,
    MixingPhase,
    Source,
    Sources,
)
from dist_ft.config.sections.evaluation import EvaluationSection
from dist_ft.config.sections.log import LogSection
from dist_ft.config.sections.model import ModelSection
from dist_ft.config.sections.optimizer import OptimizerSection
from dist_ft.config.sections.prompting import PromptingSection, get_model_task
from dist_ft.config.sections.run import RunSection, StorageSection
from dist_ft.config.sections.schedule import ScheduleSection
from dist_ft.config.sections.section import Section
from dist_ft.config.sections.task import ColumnsSection, TaskSection
from dist_ft.config.sections.tuning import LoraSection, TuningSection
from dist_ft.config.sections.zero import ZeroSection
from dist_ft.config.task_facts import task_class

__all__ = [
    "AnomalySection",
    "BatchSection",
    "CheckpointSection",
    "ClusterSection",
    "ColumnsSection",
    "DataSection",
    "EvaluationSection",
    "FieldsSection",
    "LogSection",
    "LoraSection",
    "MixingPhase",
    "ModelSection",
    "OptimizerSection",
    "PromptingSection",
    "RunConfig",
    "RunSection",
    "ScheduleSection",
    "Section",
    "Source",
    "Sources",
    "StorageSection",
    "TaskSection",
    "TuningSection",
    "WorkerRange",
    "ZeroSection",
]


class RunConfig(Section):
    """The whole config of a run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    task: TaskSection = Field(default_factory=TaskSection, description="What the model does.")
    prompting: PromptingSection = Field(
        default_factory=PromptingSection, description="Labels from a model without a head."
    )
    tuning: TuningSection = Field(
        default_factory=TuningSection, description="Trained weights and regularization."
    )
    batch: BatchSection
    optimizer: OptimizerSection = Field(
        default_factory=OptimizerSection, description="Optimizer settings."
    )
    schedule: ScheduleSection = Field(description="Length of the run and learning rate.")
    zero: ZeroSection = Field(default_factory=ZeroSection, description="DeepSpeed ZeRO.")
    cluster: ClusterSection = Field(
        default_factory=ClusterSection, description="Ray workers, placement and network."
    )
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection, description="When to save, where, and what to retain."
    )
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection, description="Held-out data and generations."
    )
    anomaly: AnomalySection = Field(
        default_factory=AnomalySection, description="Loss and gradient anomalies."
    )
    log: LogSection = Field(
        default_factory=LogSection, description="Progress lines, metrics and trackers."
    )
    storage: StorageSection = Field(
        default_factory=StorageSection, description="fsspec options of storage."
    )

    @property
    def num_lanes(self) -> int:
        """Micro-batches of an optimizer step, over all workers; sequences are assigned to lanes."""
        return self.batch.global_batch // self.batch.micro_batch

    @property
    def model_task(self) -> TaskSection:
        """The task that the model itself is loaded for: with a prompt it continues text."""
        return get_model_task(self.task, self.prompting)

    @property
    def effective_data(self) -> DataSection:
        """The data section as this task uses it.

        Tasks with padded batches do not pack, and bucket by default.
        """
        task = task_class(self.task.name)

        # None means the default of the task. Here it gets its value, so that `bucket` is an int for
        # all who read it.
        if task.reads_formats:
            return self.data.model_copy(update={"bucket": self.data.bucket or 0})

        bucket = DEFAULT_BUCKET if self.data.bucket is None else self.data.bucket
        changes: dict[str, Any] = {"pack": False, "bucket": bucket}

        # A context longer than a sequence is cut into windows, whatever data.overlong says.
        if task.always_splits:
            changes["overlong"] = "split"
        return self.data.model_copy(update=changes)

    @property
    def max_workers(self) -> int:
        """Maximum number of workers; 0 in one process."""
        workers = self.cluster.workers
        if isinstance(workers, int):
            return workers
        return workers.max

    @property
    def min_workers(self) -> int:
        """Minimum number of workers; 0 in one process."""
        workers = self.cluster.workers
        if isinstance(workers, int):
            return workers
        return workers.min

    @property
    def run_url(self) -> str:
        """URL of the run's own folder."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"
