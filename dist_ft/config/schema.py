"""The schema of a run: frozen pydantic models, one section each.

Every field says its meaning, unit and sentinel. Fields marked as identity decide which samples and which model a run
is about: they may not change when a run is resumed. All others are operational: they may, and the change is recorded.
This module holds types and single-field bounds only; contradictions between fields live in `validate`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dist_ft.config.sections.cluster import ClusterSection, WorkerRange
from dist_ft.config.sections.data import DataSection, FieldsSection, MixingPhase, Source, Sources
from dist_ft.config.sections.decoding import TextsSection
from dist_ft.config.sections.log import LogSection
from dist_ft.config.sections.prompting import PromptingSection, of_model
from dist_ft.config.sections.robustness import RobustnessSection
from dist_ft.config.sections.section import Identity, Section
from dist_ft.config.sections.task import ColumnsSection, TaskSection
from dist_ft.config.sections.tuning import LoraSection, Patterns, TuningSection

__all__ = [
    "ClusterSection",
    "ColumnsSection",
    "DataSection",
    "FieldsSection",
    "LogSection",
    "LoraSection",
    "MixingPhase",
    "PromptingSection",
    "RunConfig",
    "Source",
    "Sources",
    "TaskSection",
    "TuningSection",
    "WorkerRange",
]


BUCKET = 64
"""Micro-batches among which samples of like length are looked for, unless data.bucket says otherwise."""


class RunSection(Section):
    """Which run this is and where it lives."""

    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$",
        description=(
            "Name of the run: lower-case letters, digits and '-', at most 47 characters (a Kubernetes limit). "
            "The same name under the same storage is the same run, and is resumed."
        ),
    )
    storage: str = Field(
        "./runs",
        description=(
            "fsspec URL or folder under which the run keeps <name>/: config, index, checkpoints, ledger, metrics."
        ),
    )
    seed: int = Identity(
        0, ge=0, lt=2**63, description="Seed of the sample order, of dropout and of new weights."
    )


class ModelSection(Section):
    """Which model learns, and how it computes."""

    path: str = Identity(
        description=(
            "Model folder, fsspec URL of one, or hub name (org/name; gated ones read HF_TOKEN from the environment); or "
            "the folder of a run (<run.storage>/<run.name>), whose result is begun with."
        )
    )
    checkpoint: Literal["latest", "best"] = Identity(
        "latest",
        description=(
            "Where path is a run's folder: begin with its newest checkpoint, or its best by its checkpoint.best_by."
        ),
    )
    revision: str | None = Identity(
        None, description="Hub branch, tag or commit; none: the default branch."
    )
    tokenizer: str | None = Identity(
        None, description="Folder, URL or hub name of the tokenizer; none: `path`."
    )
    chat_template: str | None = Identity(
        None, description=("File with a Jinja chat template; none: the tokenizer's own.")
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description=(
            "Number format of weights and activations in forward and backward. Masters and optimizer state are float32."
        ),
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        "sdpa", description="Attention kernel."
    )
    activation_checkpointing: bool = Field(
        False,
        description=(
            "Recompute layer activations in backward: less memory, about a third more compute."
        ),
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description=(
            "Probability set for every dropout of the model; none: as the model's config says."
        ),
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off: refused."
    )


class BatchSection(Section):
    """How much one optimizer step sees."""

    global_batch: int = Identity(ge=1, description="Sequences an optimizer step, over all workers.")
    micro_batch: int = Identity(
        1,
        ge=1,
        description=(
            "Sequences a forward pass (a lane). global_batch / micro_batch lanes are dealt to the workers."
        ),
    )
    sequence_length: int = Identity(ge=8, description="Tokens a sequence.")


class OptimizerSection(Section):
    """How weights follow gradients."""

    name: Literal["adamw", "sgd", "adafactor"] = Field(
        "adamw", description=("adafactor is not element-wise: plain engine or ZeRO stage 0 only.")
    )
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled decay; biases and norms are exempt."
    )
    decay_exempt: Patterns = Field(
        (),
        description=(
            "Besides, weights whose name matches one of these patterns (*embed*, lm_head.*) do not decay."
        ),
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="adamw: decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="adamw: decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="adamw: added to the denominator.")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Global gradient norm is clipped to this; 0: never."
    )


class ScheduleSection(Section):
    """How long a run is and how the learning rate moves. A pure function of the step."""

    name: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="Shape after warm-up."
    )
    steps: int | None = Field(
        None,
        ge=0,
        description=(
            "Optimizer steps of the whole run; none: by epochs; 0: held-out data are scored, nothing is learned."
        ),
    )
    epochs: int | None = Field(
        None, ge=1, description="Passes over the training data; none: by steps."
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up; none: by warmup_ratio."
    )
    warmup_ratio: float | None = Field(
        None, ge=0, le=1, description="Share of all steps that warms up; none: 0."
    )
    min_ratio: float = Field(0.0, ge=0, le=1, description="Last learning rate / peak.")


class ZeroSection(Section):
    """How DeepSpeed shards the model. Ignored in one process (cluster.workers=0)."""

    stage: Literal[0, 1, 2, 3] = Field(
        3, description=("0: replicate; 1: shard optimizer state; 2: and gradients; 3: and weights.")
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where optimizer state lies."
    )
    offload_param: Literal["none", "cpu", "nvme"] = Field(
        "none", description="stage 3: where weights lie."
    )
    nvme_path: str | None = Field(None, description="Local folder for nvme offload.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Any other DeepSpeed key, passed through; keys that dist_ft sets itself are refused."
        ),
    )


Steps = Annotated[int, Field(ge=0)] | Literal["auto"]


class CheckpointSection(Section):
    """What is kept."""

    every_steps: Steps = Field(
        0,
        description=(
            "Steps between checkpoints in storage; auto: as often as what saves cost and how often the run fails make best "
            "(both measured; Young, Daly); 0: only at the end."
        ),
    )
    local_folder: str = Field(
        "",
        description=(
            "Folder on each worker's own node for checkpoints between those in storage: a local disk, or memory "
            "(/dev/shm/...). They outlive processes, not nodes, and serve a restart with the same workers; empty: none."
        ),
    )
    local_every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description=("Steps between checkpoints in local_folder; auto: as for every_steps.")
    )
    failure_interval_s: float = Field(
        10800,
        gt=0,
        description=(
            "auto: seconds between failures expected before any was seen (10,800: 3 hours); what is seen outweighs it."
        ),
    )
    at_end: bool = Field(True, description="Commit the last step too.")
    background: bool = Field(
        True,
        description=(
            "Write from a copy of the state in host memory while training goes on; false: training waits."
        ),
    )
    background_mb_s: float = Field(
        0, ge=0, description="Most MB/s a worker writes in the background; 0: no limit."
    )
    when_busy: Literal["wait", "skip"] = Field(
        "wait",
        description=(
            "If a save is due while one is still being written: training waits for it, or the new one is skipped."
        ),
    )
    keep_last: int = Field(2, ge=1, description="Newest checkpoints kept.")
    keep_every_steps: int = Field(
        0, ge=0, description="Besides, keep those whose step is a multiple; 0: none."
    )
    keep_best: int = Field(
        0,
        ge=0,
        description=(
            "Besides, keep so many that are best by best_by (evaluation.every_steps); 0: none."
        ),
    )
    best_by: str = Field(
        "loss",
        min_length=1,
        description=(
            "Metric of evaluations by which checkpoints are best: loss, one of the task's (accuracy, f1, ...) or of "
            "evaluation.text_metrics; losses, errors and perplexity are better when lower, others when higher."
        ),
    )


class AnomalySection(Section):
    """What happens when numbers go bad: a loss or gradient norm that is no finite number, or leaps.

    It is judged on all workers together, before weights change; the samples of the step are noted with the run, and a
    replay of the step does the same again.
    """

    action: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description=(
            "skip: the step changes nothing, its samples are passed over; rollback: besides, go back to the newest "
            "checkpoint and pass over the samples of the last rollback_steps steps too; stop: end the run."
        ),
    )
    loss_factor: float = Field(
        0,
        ge=0,
        description=(
            "A loss above this times the median of the last `window` steps is an anomaly; 0: only NaN and infinity."
        ),
    )
    grad_norm_factor: float = Field(
        0,
        ge=0,
        description=(
            "A gradient norm above this times the median of the last `window` steps is an anomaly; 0: only NaN, infinity."
        ),
    )
    window: int = Field(
        64, ge=4, description="Steps the median is taken over; there is none before as many."
    )
    rollback_steps: int = Field(
        8, ge=1, description="rollback: so many steps, up to the bad one, are passed over."
    )
    max_consecutive: int = Field(
        5, ge=1, description="After so many bad steps one after the other the run ends."
    )


class EvaluationSection(TextsSection):
    """Loss on held-out data, and the texts made there."""

    data: Sources = Field(
        (), description="Held-out data, in the training data's format; empty: no evaluation."
    )
    weights: Literal["trained", "ema"] = Field(
        "trained",
        description=(
            "What is evaluated and, unless told otherwise, exported: the weights, or their average (tuning.ema_decay)."
        ),
    )
    every_steps: int = Field(0, ge=0, description="Steps between evaluations; 0: none by steps.")
    every_epochs: int = Field(0, ge=0, description="Epochs between evaluations; 0: none by epochs.")
    patience: int = Field(
        0,
        ge=0,
        description=(
            "Early stopping: the run ends once so many evaluations in a row were no better (checkpoint.best_by) than one "
            "before; 0: never."
        ),
    )
    at_start: bool = Field(True, description="Evaluate before step 1.")
    at_end: bool = Field(True, description="Evaluate after the last step.")
    max_samples: int = Field(0, ge=0, description="First so many samples; 0: all.")
    robustness: RobustnessSection = Field(
        default_factory=RobustnessSection, description="What evaluate tells besides."
    )


class StorageSection(Section):
    """How fsspec reaches storage. Credentials never stand here: they come from the environment."""

    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description=(
            "fsspec options by protocol, such as {s3: {endpoint_url: http://127.0.0.1:5000}}."
        ),
    )


class RunConfig(Section):
    """One run, whole."""

    run: RunSection
    model: ModelSection
    data: DataSection
    task: TaskSection = Field(default_factory=TaskSection, description="What the model is to do.")
    prompting: PromptingSection = Field(
        default_factory=PromptingSection, description="Labels without a head."
    )
    tuning: TuningSection = Field(default_factory=TuningSection, description="Which weights learn.")
    batch: BatchSection
    optimizer: OptimizerSection = Field(
        default_factory=OptimizerSection, description="How weights follow gradients."
    )
    schedule: ScheduleSection = Field(description="Length and learning rate.")
    zero: ZeroSection = Field(default_factory=ZeroSection, description="DeepSpeed ZeRO.")
    cluster: ClusterSection = Field(
        default_factory=ClusterSection, description="Where workers run."
    )
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection, description="What is kept."
    )
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection, description="Held-out loss."
    )
    anomaly: AnomalySection = Field(
        default_factory=AnomalySection, description="Numbers that go bad."
    )
    log: LogSection = Field(default_factory=LogSection, description="What a person sees.")
    storage: StorageSection = Field(
        default_factory=StorageSection, description="How storage is reached."
    )

    @property
    def num_lanes(self) -> int:
        """Micro-batches an optimizer step, over all workers: the fixed places sequences go to."""
        return self.batch.global_batch // self.batch.micro_batch

    @property
    def model_task(self) -> TaskSection:
        """What the model itself is loaded for: where it is prompted for labels, it continues text."""
        return of_model(self.task, self.prompting)

    @property
    def reading(self) -> DataSection:
        """The data section as it is followed: tasks with padded batches do not pack, and bucket unless told not to."""
        if self.task.name == "causal_lm":
            return self.data.model_copy(update={"bucket": self.data.bucket or 0})
        changes: dict[str, Any] = {
            "pack": False,
            "bucket": BUCKET if self.data.bucket is None else self.data.bucket,
        }
        if self.task.name == "question_answering":
            changes["overlong"] = "split"  # a long context goes on in further windows
        return self.data.model_copy(update=changes)

    @property
    def max_workers(self) -> int:
        """Most workers this run may use; 0 in one process."""
        workers = self.cluster.workers
        return workers if isinstance(workers, int) else workers.max

    @property
    def min_workers(self) -> int:
        """Fewest workers this run needs; 0 in one process."""
        workers = self.cluster.workers
        return workers if isinstance(workers, int) else workers.min

    @property
    def run_url(self) -> str:
        """URL of the run's own folder."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"
