"""Options of manifests that a run's config does not contain: image, namespace, nodes, secrets."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dist_ft.config.credentials import find_credentials
from dist_ft.config.error_messages import format_value
from dist_ft.core.errors import ConfigError
from dist_ft.core.secret_names import is_plain_name

DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
"""Names of most Kubernetes objects (RFC 1123)."""
HOST_AND_PORT = re.compile(r"[^\s:/@]+:[0-9]+")
NODE_LABEL = re.compile(r"[A-Za-z0-9./_-]+=[A-Za-z0-9._-]*")


def _require_pinned_image(image: str) -> str:
    """Return `image`, or raise ValueError if it can change."""
    problem = find_image_problem(image)
    if problem:
        raise ValueError(problem)
    return image


def find_image_problem(image: str) -> str | None:
    """Return why the reference `image` is not pinned to one image, or None if it is. Pure."""
    # HOST:PORT/NAME:TAG@DIGEST; a colon before the last slash belongs to the port
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]

    if digest:
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            return None
        return "the digest is not sha256: and 64 hexadecimal digits. Correct it."

    if not tag:
        return "has no tag, which means latest, a tag that moves. Add a tag or a digest."

    if tag == "latest":
        return "the tag latest moves. Use another tag or a digest."
    return None


def _require_node_label(text: str) -> str:
    """Return `text`, or raise ValueError if it is not key=value."""
    if not NODE_LABEL.fullmatch(text):
        raise ValueError("is not a node label, which has the form key=value. Correct it.")
    return text


def _require_host_and_port(text: str) -> str:
    """Return `text`, or raise ValueError if it is not HOST:PORT."""
    if not HOST_AND_PORT.fullmatch(text):
        raise ValueError(
            "is not HOST:PORT, such as redis.dist-ft.svc:6379. Leave out redis:// and the "
            "password, which comes from the Secret redis_secret."
        )
    return text


REFERENCES = ("secret", "token_secret", "redis_secret")
"""Options that name a Secret."""
Image = Annotated[str, AfterValidator(_require_pinned_image)]
NodeLabel = Annotated[str, AfterValidator(_require_node_label)]
HostAndPort = Annotated[str, AfterValidator(_require_host_and_port)]
Name = Annotated[str, Field(pattern=f"^{DNS_LABEL}$")]


def default_image() -> str:
    """Return the name of the image that launch/Dockerfile builds for this version of dist_ft."""
    return f"dist-ft:{importlib.metadata.version('dist-ft')}"


def installed_ray_version() -> str:
    """Return the version of Ray in this Python environment."""
    return importlib.metadata.version("ray")


class Options(BaseModel):
    """Options of `dist-ft k8s render`. Defaults of s3_role and redis are placeholders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Image = Field(
        default_factory=default_image, description="Image of all pods, with a tag or a digest."
    )
    ray_version: str = Field(
        default_factory=installed_ray_version,
        pattern=r"^\d+\.\d+\.\d+$",
        description="Version of Ray in the image.",
    )
    namespace: Name = Field("dist-ft", description="Namespace of all objects.")
    workers_per_node: int = Field(
        8, ge=1, description="Workers of a node; cluster.workers_per_node takes precedence."
    )
    parameters: float = Field(
        0, ge=0, description="Number of parameters of the model; 0: from the model's name."
    )
    storage_mb_s: float = Field(
        200, gt=0, description="Minimum write rate of one worker to storage, in MB/s (10^6 bytes)."
    )
    gpu_resource: str = Field(
        "nvidia.com/gpu",
        pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$",
        description="Resource name of a GPU.",
    )
    node_selector: tuple[NodeLabel, ...] = Field((), description="Labels of the workers' nodes.")
    spot_label: NodeLabel = Field(
        "karpenter.sh/capacity-type=spot", description="Label and taint of spot nodes."
    )
    spot_notice_s: int = Field(
        120, ge=15, description="Seconds from the termination notice of a spot node to its end."
    )
    queue: Name = Field("dist-ft", description="Kueue's local queue.")
    secret: Name = Field("dist-ft-secrets", description="Secret with the environment of all pods.")
    token_secret: Name | None = Field(
        None, description="Secret with Ray's authentication token; default: KubeRay creates one."
    )
    claim: Name | None = Field(
        None, description="PersistentVolumeClaim that all pods mount; default: none."
    )
    claim_mount: str = Field(
        "/mnt/dist_ft", pattern=r"^/[^\s]+$", description="Path where pods mount the claim."
    )
    s3_role: str = Field(
        "arn:aws:iam::111122223333:role/dist-ft",
        pattern=r"^arn:[^\s]+$",
        description="ARN of the IAM role of the service account. Set your own.",
    )
    redis: HostAndPort = Field(
        "redis.dist-ft.svc:6379",
        description="HOST:PORT of the Redis that stores the state of Ray's control plane.",
    )
    redis_secret: Name = Field(
        "redis", description="Secret with the password of Redis, key `password`."
    )
    metrics_namespace: Name = Field(
        "monitoring", description="Namespace of the Prometheus that reads the metrics."
    )
    efa: int = Field(32, ge=1, description="Number of EFA devices of a node.")
    rdma_resource: str = Field(
        "rdma/hca",
        pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$",
        description="Resource name of an RDMA device.",
    )


def parse_options(named: Mapping[str, object], assignments: Sequence[str] = ()) -> Options:
    """Return validated options; an assignment overrides a named option.

    Args:
        named: options by name; None: use the default.
        assignments: options as NAME=VALUE.

    Raises:
        ConfigError: lists all unknown options and invalid values.
    """
    values = {name: value for name, value in named.items() if value is not None}

    problems = []
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or name not in Options.model_fields:
            # Neither the value nor, without a "=", the text is quoted: both may be a credential.
            is_quotable = name in Options.model_fields or (equals and is_plain_name(name))
            shown = name if is_quotable else "..."
            problems.append(
                f"--set={shown}: unknown option. Use NAME=VALUE with one of these names: "
                f"{', '.join(Options.model_fields)}."
            )
        # the only option with several values; pydantic converts the text of all others
        elif name == "node_selector":
            values[name] = tuple(value.split(","))
        else:
            values[name] = value

    # Names of Secrets are options, their values are not.
    for finding in find_credentials(
        {name: values[name] for name in values if name not in REFERENCES}
    ):
        problems.append(finding.line)
    if problems:
        raise ConfigError(problems, "k8s render")

    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            # Our validators say what to do themselves; pydantic's messages only say what is wrong.
            message = detail["msg"].removeprefix("Value error, ").rstrip(".")
            advice = "" if detail["type"] == "value_error" else ". Correct it"
            field = str(detail["loc"][0])
            shown = "" if field == "redis" else f"={format_value(detail['input'])}"
            problems.append(f"{field}{shown}: {message}{advice}.")

        # Not within the handler: pydantic's own text would be shown with it.
        raise ConfigError(problems, "k8s render") from None
    return options
