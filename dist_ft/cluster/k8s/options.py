"""What a run's config does not say and its manifests need: image, namespace, machines, names of secrets."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dist_ft.core.errors import ConfigError

LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
PAIR = re.compile(r"[A-Za-z0-9./_-]+=[A-Za-z0-9._-]*")


def _pinned(image: str) -> str:
    problem = image_problem(image)
    if problem:
        raise ValueError(problem)
    return image


def image_problem(image: str) -> str | None:
    """Return what is wrong with the name of an image, or None. Pure."""
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    if digest:
        return (
            None
            if re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
            else "its digest is not sha256: and 64 hex digits"
        )
    if not tag:
        return "it has no tag, which means latest: another image tomorrow; name a tag or a digest"
    return "latest is another image tomorrow; name a tag or a digest" if tag == "latest" else None


def _pair(text: str) -> str:
    if not PAIR.fullmatch(text):
        raise ValueError("not of the form key=value")
    return text


Image = Annotated[str, AfterValidator(_pinned)]
Pair = Annotated[str, AfterValidator(_pair)]
Name = Annotated[str, Field(pattern=f"^{LABEL}$")]


def own_image() -> str:
    """Return the image that launch/Dockerfile is for: this version of dist_ft."""
    return f"dist-ft:{importlib.metadata.version('dist-ft')}"


def own_ray() -> str:
    """Return the version of Ray installed here."""
    return importlib.metadata.version("ray")


class Options(BaseModel):
    """Options of `dist-ft k8s render`; each has a default that is safe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Image = Field(default_factory=own_image)
    ray_version: str = Field(default_factory=own_ray, pattern=r"^\d+\.\d+\.\d+$")
    namespace: Name = "dist-ft"
    workers_per_node: int = Field(8, ge=1)
    parameters: float = Field(0, ge=0, description="Of the model; 0: as its name says.")
    storage_mb_s: float = Field(
        200, gt=0, description="MB/s a worker writes to storage at the least."
    )
    gpu_resource: str = Field("nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    node_selector: tuple[Pair, ...] = ()
    spot_label: Pair = "karpenter.sh/capacity-type=spot"
    spot_notice_s: int = Field(
        120, ge=15, description="Seconds between the notice and the end of a spot node."
    )
    queue: Name = "dist-ft"
    secret: Name = "dist-ft-secrets"
    token_secret: Name | None = None
    claim: Name | None = None
    claim_mount: str = Field("/mnt/dist_ft", pattern=r"^/[^\s]+$")
    s3_role: str = Field("arn:aws:iam::111122223333:role/dist-ft", pattern=r"^arn:[^\s]+$")
    redis: str = Field("redis.dist-ft.svc:6379", pattern=r"^[^\s:/@]+:\d+$")
    redis_secret: Name = "redis"
    metrics_namespace: Name = "monitoring"
    efa: int = Field(32, ge=1, description="EFA devices a node.")
    rdma_resource: str = Field("rdma/hca", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")


def parse(given: Mapping[str, object], more: Sequence[str] = ()) -> Options:
    """Return options as given (None: not given), and NAME=VALUE ones; raises ConfigError with all that is wrong."""
    values = {name: value for name, value in given.items() if value is not None}
    problems = []
    for pair in more:
        name, sign, value = pair.partition("=")
        if not sign or name not in Options.model_fields:
            problems.append(
                f"--set={pair}: no such option; allowed: NAME=VALUE with one of "
                f"{', '.join(Options.model_fields)}; correct it"
            )
        else:
            values[name] = tuple(value.split(",")) if name == "node_selector" else value
    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        for one in error.errors():
            problems.append(
                f"{one['loc'][0]}={one['input']}: {one['msg'].removeprefix('Value error, ')}; correct it"
            )
    if problems:
        raise ConfigError(problems, "k8s render")
    return options
