"""Checks whether a run's config can run on Kubernetes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.pods import CACHE_MOUNT
from dist_ft.config.schema import RunConfig

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".gz", ".zst", ".parquet", ".arrow", ".txt")


class _PathField(NamedTuple):
    """A field of the config and the path in it."""

    field: str
    path: str


def find_config_problems(config: RunConfig, options: Options) -> list[str]:
    """Return what Kubernetes would refuse of the config, and paths that pods cannot see."""
    problems = []
    name = config.run.name
    # The operator derives names of other objects from this one, and appends to them.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        problems.append(
            f"run.name={name}: not allowed by Kubernetes as the name of a RayJob. It must start "
            "with a letter (a-z), continue with letters, digits and '-', and have at most 47 "
            "characters. Choose another name."
        )
    if not config.max_workers:
        problems.append(
            "cluster.workers=0: a single local process, which needs no Kubernetes. Set it to a "
            "number of workers or a range."
        )

    for field, path in _local_paths(config):
        is_in_claim = path.startswith(options.claim_mount.rstrip("/") + "/")
        if not (options.claim and is_in_claim):
            problems.append(
                f"{field}={path}: a local path, which pods cannot see. Use a URL such as "
                "s3://bucket/..., or a path below a volume that all pods mount (--set claim=NAME, "
                f"{options.claim_mount}/...)."
            )

    cache = config.data.cache_dir or CACHE_MOUNT
    if not cache.startswith("/"):
        problems.append(
            f"data.cache_dir={cache}: not an absolute path. Pods mount their disk there. Use an "
            "absolute path, or remove it."
        )

    nvme_path = config.zero.nvme_path
    # a slash at both ends: "/cache" is not a folder above "/cache2"
    if nvme_path and not f"{nvme_path}/".startswith(cache.rstrip("/") + "/"):
        problems.append(
            f"zero.nvme_path={nvme_path}: not on a disk of the pods, which have one at "
            f"data.cache_dir={cache}. Use a folder below it."
        )
    return problems


def _local_paths(config: RunConfig) -> Iterator[_PathField]:
    """Yield all local paths that workers read or write outside their own node."""
    for field in _path_fields(config):
        if "://" not in field.path or field.path.startswith("file://"):
            yield field


def _path_fields(config: RunConfig) -> Iterator[_PathField]:
    """Yield the fields with paths; not those with a name on the hub."""
    names_or_paths = [
        ("model.path", config.model.path),
        ("model.tokenizer", config.model.tokenizer),
    ]
    for i, source in enumerate(config.data.train):
        names_or_paths.append((f"data.train.{i}.path", source.path))
    for i, source in enumerate(config.evaluation.data):
        names_or_paths.append((f"evaluation.data.{i}.path", source.path))
    for i, source in enumerate(config.tuning.anchor.data):
        names_or_paths.append((f"tuning.anchor.data.{i}.path", source.path))

    for field, path in names_or_paths:
        # A name on the hub has no leading dot, no glob and no file suffix. Whether a file of that
        # name exists here does not matter: pods would not see it.
        if path and (path[0] in "./~" or "*" in path or path.endswith(FILE_SUFFIXES)):
            yield _PathField(field, path)

    paths = [
        ("run.storage", config.run.storage),
        ("model.chat_template", config.model.chat_template),
        ("data.augment.synonyms", config.data.augment.synonyms),
    ]
    for field, path in paths:
        if path:
            yield _PathField(field, path)
