"""What manifests need and a run's config does not contain: image, namespace, machines, secrets."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dist_ft.core.errors import ConfigError

LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
PAIR = re.compile(r"[A-Za-z0-9./_-]+=[A-Za-z0-9._-]*")


def _require_pinned_image(image: str) -> str:
    problem = find_image_problem(image)
    if problem:
        raise ValueError(problem)
    return image


def find_image_problem(image: str) -> str | None:
    """Return what is wrong with the name of an image, or None. Pure."""
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    if digest:
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            return None
        return "its digest is not sha256: and 64 hexadecimal digits. Correct it."
    if not tag:
        return "has no tag, which means latest, and that image changes. Add a tag or a digest."
    if tag == "latest":
        return "the image behind latest changes. Use another tag or a digest."
    return None


def _require_pair(text: str) -> str:
    if not PAIR.fullmatch(text):
        raise ValueError("must have the form key=value. Correct it.")
    return text


Image = Annotated[str, AfterValidator(_require_pinned_image)]
Pair = Annotated[str, AfterValidator(_require_pair)]
Name = Annotated[str, Field(pattern=f"^{LABEL}$")]


def default_image() -> str:
    """Return the image that launch/Dockerfile builds: this version of dist_ft."""
    return f"dist-ft:{importlib.metadata.version('dist-ft')}"


def installed_ray_version() -> str:
    """Return the version of Ray that is installed here."""
    return importlib.metadata.version("ray")


class Options(BaseModel):
    """Options of `dist-ft k8s render`; each has a safe default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Image = Field(default_factory=default_image)
    ray_version: str = Field(default_factory=installed_ray_version, pattern=r"^\d+\.\d+\.\d+$")
    namespace: Name = "dist-ft"
    workers_per_node: int = Field(8, ge=1)
    parameters: float = Field(
        0, ge=0, description="Parameters of the model; 0: from the model's name."
    )
    storage_mb_s: float = Field(
        200, gt=0, description="Minimum MB/s that a worker writes to storage."
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
    efa: int = Field(32, ge=1, description="EFA devices of a node.")
    rdma_resource: str = Field("rdma/hca", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")


def parse_options(given: Mapping[str, object], pairs: Sequence[str] = ()) -> Options:
    """Return the options.

    Args:
        given: options by name; None: not given.
        pairs: options as NAME=VALUE.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    values = {name: value for name, value in given.items() if value is not None}
    problems = []
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or name not in Options.model_fields:
            problems.append(
                f"--set={pair}: unknown option. Use NAME=VALUE with one of these names: "
                f"{', '.join(Options.model_fields)}."
            )
        elif name == "node_selector":
            values[name] = tuple(value.split(","))
        else:
            values[name] = value

    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            message = detail["msg"].removeprefix("Value error, ").rstrip(".")
            advice = "" if detail["type"] == "value_error" else ". Correct it"
            problems.append(f"{detail['loc'][0]}={detail['input']}: {message}{advice}.")
    if problems:
        raise ConfigError(problems, "k8s render")
    return options
