"""Contradictions between fields: what no single field's bounds can say.

Each check is one small pure function from a config to lines. Keys of `zero.deepspeed` are `deepspeed_keys`' business,
credentials in a config are `credentials`'. Whether a model, a data set or a machine fits is `runtime.preflight`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dist_ft.config.checks import cluster, task
from dist_ft.config.checks.deepspeed_keys import deepspeed_problems
from dist_ft.config.credentials import secret_problems
from dist_ft.config.schema import OptimizerSection, RunConfig

SPLITTING = ("masked_lm", "question_answering")
"""Tasks of which a long row may go on in a further sequence."""

Check = Callable[[RunConfig], Iterator[str]]


def contradictions(config: RunConfig, whole: bool = True) -> list[str]:
    """Return a line for each contradiction in `config`.

    With `whole=False` some fields may be absent from it; checks that would read one of those are skipped.
    """
    found: list[str] = []
    for check in CHECKS:
        try:
            found.extend(list(check(config)))
        except AttributeError:
            if whole:
                raise
    return found


def _batch(config: RunConfig) -> Iterator[str]:
    batch = config.batch
    if batch.global_batch % batch.micro_batch:
        yield (
            f"batch.global_batch={batch.global_batch}: not a multiple of batch.micro_batch={batch.micro_batch}; "
            f"a step is whole micro-batches; "
            f"set it to {-(-batch.global_batch // batch.micro_batch) * batch.micro_batch} or change micro_batch"
        )


def _lanes(config: RunConfig) -> Iterator[str]:
    if (
        config.batch.global_batch % config.batch.micro_batch == 0
        and config.max_workers > config.num_lanes
    ):
        yield (
            f"cluster.workers={_workers(config)}: more workers than the {config.num_lanes} lanes of a step "
            f"(batch.global_batch / batch.micro_batch); at most {config.num_lanes}; "
            f"use fewer workers, or raise batch.global_batch"
        )


def _worker_range(config: RunConfig) -> Iterator[str]:
    if config.min_workers > config.max_workers:
        yield (
            f"cluster.workers={_workers(config)}: the fewest are more than the most; a range is [fewest, most]; "
            f"write [{config.max_workers}, {config.min_workers}]"
        )
    if config.min_workers < 0:
        yield (
            f"cluster.workers={_workers(config)}: a number of workers can't be negative; "
            f"0 is this process without Ray, 1 or more are Ray workers; correct it"
        )


def _elastic(config: RunConfig) -> Iterator[str]:
    if config.max_workers > config.min_workers and not config.checkpoint.every_steps:
        yield (
            f"cluster.workers={_workers(config)}: when a node is lost, the others go on from the newest checkpoint, "
            f"and checkpoint.every_steps is 0; a range needs checkpoints; set checkpoint.every_steps"
        )


def _length(config: RunConfig) -> Iterator[str]:
    schedule = config.schedule
    if schedule.steps is None and schedule.epochs is None:
        yield (
            "schedule.steps: neither steps nor epochs is set; a run needs one of them to know its end; "
            "set schedule.steps or schedule.epochs"
        )
    if schedule.steps is not None and schedule.epochs is not None:
        yield (
            f"schedule.steps={schedule.steps}: schedule.epochs={schedule.epochs} is set too; "
            f"one of them decides the length; remove the other"
        )


def _warmup(config: RunConfig) -> Iterator[str]:
    schedule = config.schedule
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps}: schedule.warmup_ratio={schedule.warmup_ratio} is set "
            f"too; one of them is enough; remove the other"
        )


def _warmup_fits(config: RunConfig) -> Iterator[str]:
    warmup, steps = config.schedule.warmup_steps, config.schedule.steps
    if warmup is not None and steps is not None and warmup > steps:
        yield (
            f"schedule.warmup_steps={warmup}: longer than the run of schedule.steps={steps}; at most {steps}; "
            f"lower it, or use schedule.warmup_ratio"
        )


def _adafactor(config: RunConfig) -> Iterator[str]:
    if config.optimizer.name == "adafactor" and config.max_workers > 0 and config.zero.stage > 0:
        yield (
            f"optimizer.name=adafactor: with zero.stage={config.zero.stage} on Ray workers its update is not "
            f"element-wise, so ZeRO's flat partitions change it (losses off by up to 4e-2); allowed with "
            f"zero.stage=0 or cluster.workers=0; use optimizer.name=adamw, or one of those"
        )


def _unused_optimizer_fields(config: RunConfig) -> Iterator[str]:
    used = {"adamw": ("beta1", "beta2", "eps"), "sgd": ("momentum",), "adafactor": ()}
    owner = {"beta1": "adamw", "beta2": "adamw", "eps": "adamw", "momentum": "sgd"}
    for field, name in owner.items():
        value = getattr(config.optimizer, field)
        if (
            field not in used[config.optimizer.name]
            and value != OptimizerSection.model_fields[field].default
        ):
            yield (
                f"optimizer.{field}={value}: optimizer.name={config.optimizer.name} does not use it; only {name} "
                f"does; remove it, or set optimizer.name={name}"
            )


def _offload_stage(config: RunConfig) -> Iterator[str]:
    zero = config.zero
    if zero.offload_param != "none" and zero.stage < 3:
        yield (
            f"zero.offload_param={zero.offload_param}: weights can be offloaded only where they are sharded; "
            f"needs zero.stage=3 (it is {zero.stage}); set zero.stage=3, or offload_param to none"
        )
    if zero.offload_optimizer != "none" and zero.stage < 1:
        yield (
            f"zero.offload_optimizer={zero.offload_optimizer}: optimizer state can be offloaded only where it is "
            f"sharded; needs zero.stage 1, 2 or 3 (it is 0); set zero.stage=1, or offload_optimizer to none"
        )


def _offload_nvme(config: RunConfig) -> Iterator[str]:
    zero = config.zero
    fields = [
        field for field in ("offload_optimizer", "offload_param") if getattr(zero, field) == "nvme"
    ]
    if fields and not zero.nvme_path:
        yield (
            f"zero.{fields[0]}=nvme: zero.nvme_path is not set; a local folder on the disk is needed; "
            f"set zero.nvme_path"
        )
    if "offload_optimizer" in fields and zero.stage < 3:
        yield (
            f"zero.offload_optimizer=nvme: DeepSpeed offloads to nvme only at zero.stage=3 (it is {zero.stage}); "
            f"set zero.stage=3, or offload_optimizer=cpu"
        )


def _offload_needs_workers(config: RunConfig) -> Iterator[str]:
    if config.max_workers == 0:
        for field in ("offload_optimizer", "offload_param"):
            if getattr(config.zero, field) != "none":
                yield (
                    f"zero.{field}={getattr(config.zero, field)}: offload is DeepSpeed's, and cluster.workers=0 "
                    f"runs without it; allowed: none; set cluster.workers to 1 or more, or {field} to none"
                )


def _stage_zero_dtype(config: RunConfig) -> Iterator[str]:
    if config.zero.stage == 0 and config.max_workers > 0 and config.model.dtype == "bfloat16":
        yield (
            "zero.stage=0: not supported with model.dtype=bfloat16 on Ray workers (no float32 masters are "
            "reachable); allowed: stages 1 to 3; use zero.stage=1"
        )


def _attention(config: RunConfig) -> Iterator[str]:
    attention = config.model.attention
    if attention.startswith("flash") and config.cluster.gpus_per_worker == 0:
        yield (
            f"model.attention={attention}: flash attention runs on GPUs only; needs cluster.gpus_per_worker=1 "
            f"(it is 0); set that, or model.attention=sdpa"
        )


def _attention_dtype(config: RunConfig) -> Iterator[str]:
    attention = config.model.attention
    if attention.startswith("flash") and config.model.dtype != "bfloat16":
        yield (
            f"model.attention={attention}: flash attention computes in 16 bits only; needs model.dtype=bfloat16 "
            f"(it is {config.model.dtype}); set that, or model.attention=sdpa"
        )


def _memory_storage(config: RunConfig) -> Iterator[str]:
    if config.max_workers > 0 and config.run.storage.startswith("memory:"):
        yield (
            f"run.storage={config.run.storage}: memory belongs to one process, and Ray workers are others; "
            f"allowed with cluster.workers=0; use a folder or an object store"
        )


def _memory_data(config: RunConfig) -> Iterator[str]:
    for field, sources in (
        ("data.train", config.data.train),
        ("evaluation.data", config.evaluation.data),
    ):
        for source in sources:
            if config.max_workers > 0 and source.path.startswith("memory:"):
                yield (
                    f"{field}={source.path}: memory belongs to one process, and Ray workers are others; "
                    f"allowed with cluster.workers=0; use a folder or an object store"
                )


def _split(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.overlong == "split" and data.format != "text" and config.task.name not in SPLITTING:
        yield (
            f"data.overlong=split: only plain text can go on in a further sequence (data.format={data.format}); "
            f"allowed: error, truncate, drop; choose one of those, or set data.format=text"
        )


def _mixing(config: RunConfig) -> Iterator[str]:
    data, sources = config.data, config.data.train
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        missing = next(source for source in sources if source.weight is None)
        yield (
            f"data.train: {missing.path} has no weight and others have; either all sources have one or none; "
            f"give it one, or use repeat"
        )
    if weighted and any(source.repeat is not None for source in sources):
        yield (
            "data.train: weight and repeat are both set; one of them says how often a source comes; "
            "remove the other"
        )
    if data.temperature is not None and (
        weighted or any(source.repeat is not None for source in sources)
    ):
        yield (
            f"data.temperature={data.temperature}: weight or repeat of a source is set too; one of them decides; "
            f"remove the other"
        )
    shares = [source.share for source in sources if source.share is not None]
    if shares and (sum(shares) >= 1 or len(shares) == len(sources)):
        yield (
            f"data.train: sources with a share leave {max(0.0, 1 - sum(shares)):g} to {len(sources) - len(shares)} "
            f"others; together less than 1, and one source without, is allowed; lower them"
        )
    if shares and (
        weighted
        or data.mixing
        or data.temperature is not None
        or any(source.repeat is not None for source in sources if source.share is not None)
    ):
        yield (
            "data.train: share of a source is set beside weight or data.mixing or data.temperature, or its repeat; "
            "one of them says how often a source comes; remove the others"
        )
    for number, phase in enumerate(data.mixing):
        if len(phase.weights) != len(sources) or not sum(phase.weights):
            yield (
                f"data.mixing.{number}.weights={list(phase.weights)}: data.train has {len(sources)} sources; "
                f"one weight for each is needed, and one above 0; correct them"
            )
    steps = [phase.until_step for phase in data.mixing]
    if steps != sorted(set(steps)) or 0 in steps:
        yield (
            f"data.mixing: until_step goes {', '.join(map(str, steps))}; they must rise from 1 on; "
            f"put them in order"
        )


def _source_names(config: RunConfig) -> Iterator[str]:
    names = [source.name for source in config.data.train if source.name is not None]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        yield f"data.train: two sources are named {twice}; metrics need different names; rename one"


def _kept_checkpoints(config: RunConfig) -> Iterator[str]:
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    if keep and (every in (0, "auto") or keep % int(every)):
        what = (
            f"checkpoint.every_steps is {every}"
            if every in (0, "auto")
            else (f"not a multiple of checkpoint.every_steps={every}")
        )
        yield (
            f"checkpoint.keep_every_steps={keep}: {what}, so such steps are never saved; a multiple of "
            f"checkpoint.every_steps, or 0, is allowed; change one of them"
        )


def _best_checkpoints(config: RunConfig) -> Iterator[str]:
    best, every, told = (
        config.checkpoint.keep_best,
        config.checkpoint.every_steps,
        config.evaluation.every_steps,
    )
    if best and config.evaluation.every_epochs and config.evaluation.data:
        return  # which steps end an epoch is not known here
    if best and (
        not config.evaluation.data or not told or every in (0, "auto") or int(every) % told
    ):
        yield (
            f"checkpoint.keep_best={best}: needs an evaluation at every checkpoint; allowed with evaluation.data "
            f"and a checkpoint.every_steps ({every}) that is a multiple of evaluation.every_steps ({told}); set "
            f"them so"
        )


def _node_folder(config: RunConfig) -> Iterator[str]:
    section = config.checkpoint
    if "://" in section.local_folder:
        yield (
            f"checkpoint.local_folder={section.local_folder}: is no folder of a node; a local disk or memory, such as "
            f"/dev/shm/dist_ft, is allowed; checkpoints in a bucket are those of run.storage"
        )


def _evaluation(config: RunConfig) -> Iterator[str]:
    patience, again = (
        config.evaluation.patience,
        config.evaluation.every_steps or config.evaluation.every_epochs,
    )
    if patience and not (config.evaluation.data and again):
        yield (
            f"evaluation.patience={patience}: there are no evaluations to wait for; needs evaluation.data, and "
            f"evaluation.every_steps or every_epochs; set them"
        )
    if config.evaluation.every_epochs and (
        config.data.mixing
        or config.data.temperature is not None
        or any(source.weight is not None for source in config.data.train)
    ):
        yield (
            f"evaluation.every_epochs={config.evaluation.every_epochs}: sources drawn by weight have no epochs of "
            f"the run; allowed without weight, temperature and mixing; use evaluation.every_steps"
        )
    if config.evaluation.every_epochs and not config.evaluation.data:
        yield (
            f"evaluation.every_epochs={config.evaluation.every_epochs}: there is nothing to evaluate on; needs "
            f"evaluation.data; set it, or leave every_epochs out"
        )
    if config.evaluation.every_steps and not config.evaluation.data:
        yield (
            f"evaluation.every_steps={config.evaluation.every_steps}: there is nothing to evaluate on; "
            f"needs evaluation.data; set it, or leave every_steps out"
        )


def _workers(config: RunConfig) -> str:
    workers = config.cluster.workers
    return str(workers) if isinstance(workers, int) else f"[{workers.min}, {workers.max}]"


CHECKS: tuple[Check, ...] = (
    _batch,
    _lanes,
    _worker_range,
    _elastic,
    _length,
    _warmup,
    _warmup_fits,
    _adafactor,
    *task.CHECKS,
    _unused_optimizer_fields,
    _offload_stage,
    _offload_nvme,
    _offload_needs_workers,
    _stage_zero_dtype,
    _attention,
    _attention_dtype,
    _memory_storage,
    _memory_data,
    _split,
    _mixing,
    _source_names,
    _kept_checkpoints,
    _best_checkpoints,
    _node_folder,
    _evaluation,
    *cluster.CHECKS,
    deepspeed_problems,
    secret_problems,
)
