"""Contradictions between Ray workers (section `cluster`) and other sections."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.cluster import format_workers


def _lanes(config: RunConfig) -> Iterator[str]:
    # A global batch that is no multiple has its own line; the number of lanes would be wrong here.
    is_whole = config.batch.global_batch % config.batch.micro_batch == 0
    if is_whole and config.max_workers > config.num_lanes:
        yield (
            f"cluster.workers={format_workers(config.cluster)}: more workers than the "
            f"{config.num_lanes} lanes (batch.global_batch / batch.micro_batch). Use at most "
            f"{config.num_lanes} workers or raise batch.global_batch."
        )


def _elastic(config: RunConfig) -> Iterator[str]:
    # Using more nodes is a restart as well, so without checkpoints each change of the number of
    # workers would start the run over.
    if config.max_workers > config.min_workers and not config.checkpoint.every_steps:
        yield (
            f"cluster.workers={format_workers(config.cluster)}: after the loss of a node the "
            "others resume from the latest checkpoint, but checkpoint.every_steps is 0. A range "
            "needs checkpoints. Set checkpoint.every_steps."
        )


def _adafactor(config: RunConfig) -> Iterator[str]:
    if config.optimizer.name == "adafactor" and config.max_workers > 0 and config.zero.stage > 0:
        yield (
            f"optimizer.name=adafactor: with zero.stage={config.zero.stage} on Ray workers ZeRO's "
            "flat partitions change its update, which is not element-wise (losses differ by up to "
            "4e-2). Allowed with zero.stage=0 or cluster.workers=0. Use optimizer.name=adamw, or "
            "one of those."
        )


def _offload_needs_workers(config: RunConfig) -> Iterator[str]:
    if config.max_workers:
        return

    for field in ("offload_optimizer", "offload_param"):
        value = getattr(config.zero, field)
        if value != "none":
            yield (
                f"zero.{field}={value}: DeepSpeed does the offload, and cluster.workers=0 runs "
                f"without it. Allowed: none. Set cluster.workers to 1 or more, or {field} to none."
            )


def _stage_zero_dtype(config: RunConfig) -> Iterator[str]:
    if config.zero.stage == 0 and config.max_workers > 0 and config.model.dtype == "bfloat16":
        yield (
            "zero.stage=0: not supported with model.dtype=bfloat16 on Ray workers (no float32 "
            "master weights are accessible). Allowed: stages 1 to 3. Use zero.stage=1."
        )


def _flash_attention_needs_gpus(config: RunConfig) -> Iterator[str]:
    attention = config.model.attention
    if attention.startswith("flash") and config.cluster.gpus_per_worker == 0:
        yield (
            f"model.attention={attention}: flash attention runs on GPUs only. Needs "
            "cluster.gpus_per_worker=1 (now 0). Set that, or model.attention=sdpa."
        )


def _memory_urls(config: RunConfig) -> Iterator[str]:
    # Tests and previews in one process use memory: URLs.
    if not config.max_workers:
        return

    urls = [("run.storage", config.run.storage)]
    urls += [("data.train", source.path) for source in config.data.train]
    urls += [("evaluation.data", source.path) for source in config.evaluation.data]
    for field, url in urls:
        if url.startswith("memory:"):
            yield (
                f"{field}={url}: memory belongs to one process, and Ray workers are other "
                "processes. Allowed with cluster.workers=0. Use a folder or an object store."
            )


def _cost(config: RunConfig) -> Iterator[str]:
    if config.run.max_cost is not None and not config.cluster.cost_per_hour:
        yield (
            f"run.max_cost={config.run.max_cost:g}: cluster.cost_per_hour is 0, so no cost is ever "
            "reached. Needs the cost of a worker for an hour. Set cluster.cost_per_hour, or use "
            "run.max_hours."
        )


CHECKS = (
    _lanes,
    _elastic,
    _adafactor,
    _offload_needs_workers,
    _stage_zero_dtype,
    _flash_attention_needs_gpus,
    _memory_urls,
    _cost,
)
