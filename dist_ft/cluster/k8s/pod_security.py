"""The restricted pod security standard, as the API server enforces it in a labeled namespace. Pure.

Source: Kubernetes' Pod Security Standards. There is one exception: locked memory for RDMA, in a
separate namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_ft.cluster.k8s.load_manifests import Problem, lookup

ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
    "image",
}
ALLOWED_PROFILES = ("RuntimeDefault", "Localhost")
STANDARD = "the restricted pod security standard"


def check_pod(
    template: dict[str, Any], path: str, allow_locked_memory: bool = False
) -> Iterator[Problem]:
    """Yield the problems of a pod template.

    Args:
        template: template of the pods.
        path: path of its spec.
        allow_locked_memory: containers may add the capability IPC_LOCK.
    """
    spec = lookup(template, "spec", default={})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if lookup(spec, field, default=False):
            yield Problem(f"{path}.{field}", f"is not allowed by {STANDARD}. Remove it.")

    for index, volume in enumerate(lookup(spec, "volumes", default=[])):
        for kind in sorted(set(volume) - {"name"} - ALLOWED_VOLUMES):
            yield Problem(
                f"{path}.volumes[{index}].{kind}",
                f"is not allowed by {STANDARD}. Allowed: {', '.join(sorted(ALLOWED_VOLUMES))}. "
                "Use one of these.",
            )

    pod_context = lookup(spec, "securityContext", default={})
    # Ephemeral containers are missing: no manifest declares them.
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(lookup(spec, kind, default=[])):
            container_path = f"{path}.{kind}[{index}]"
            yield from check_security_context(
                lookup(container, "securityContext", default={}),
                f"{container_path}.securityContext",
                pod_context,
                allow_locked_memory,
            )

            for number, port in enumerate(lookup(container, "ports", default=[])):
                if lookup(port, "hostPort", default=0):
                    yield Problem(
                        f"{container_path}.ports[{number}].hostPort",
                        f"is not allowed by {STANDARD}. Remove it.",
                    )


def check_security_context(
    context: dict[str, Any],
    path: str,
    pod_context: dict[str, Any],
    allow_locked_memory: bool = False,
) -> Iterator[Problem]:
    """Yield the problems of a container's securityContext.

    Args:
        context: securityContext of the container.
        path: path of `context`.
        pod_context: securityContext of the pod, which sets some fields for all containers.
        allow_locked_memory: the container may add the capability IPC_LOCK.
    """

    def setting(field: str, default: object) -> object:
        """Return a field of the container, else of its pod."""
        return lookup(context, field, default=lookup(pod_context, field, default=default))

    # these two exist only per container; the pod cannot set them for all
    if lookup(context, "allowPrivilegeEscalation", default=True):
        yield Problem(
            f"{path}.allowPrivilegeEscalation", f"must be false under {STANDARD}. Set it."
        )
    if lookup(context, "privileged", default=False):
        yield Problem(f"{path}.privileged", f"is not allowed by {STANDARD}. Remove it.")

    if not setting("runAsNonRoot", False):
        yield Problem(f"{path}.runAsNonRoot", f"must be true under {STANDARD}. Set it.")

    if setting("runAsUser", 1) == 0:
        yield Problem(f"{path}.runAsUser", f"0 is not allowed by {STANDARD}. Use another user.")

    # may lie on the pod; a container's own profile takes precedence
    pod_profile = lookup(pod_context, "seccompProfile", "type")
    profile = lookup(context, "seccompProfile", "type", default=pod_profile)
    if profile not in ALLOWED_PROFILES:
        yield Problem(
            f"{path}.seccompProfile.type", f"must be RuntimeDefault under {STANDARD}. Set it."
        )

    # capabilities are a field of containers only
    if "ALL" not in lookup(context, "capabilities", "drop", default=[]):
        yield Problem(f"{path}.capabilities.drop", f"must be [ALL] under {STANDARD}. Set it.")
    for name in lookup(context, "capabilities", "add", default=[]):
        if name == "NET_BIND_SERVICE" or (name == "IPC_LOCK" and allow_locked_memory):
            continue

        if name == "IPC_LOCK":
            message = (
                "IPC_LOCK is only allowed with an RDMA device in a separate namespace. See "
                "k8s/components/rdma."
            )
        else:
            message = f"{name} is not allowed by {STANDARD}. Remove it."

        yield Problem(f"{path}.capabilities.add", message)
