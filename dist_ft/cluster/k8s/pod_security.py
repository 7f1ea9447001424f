"""The restricted pod standard, as the API server enforces it in a namespace so labelled. Pure.

Source: Kubernetes' Pod Security Standards. One exception is known: locked memory for RDMA, in a namespace made for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_ft.cluster.k8s.load_manifests import at

Problem = tuple[str, str]
VOLUMES = {
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
PROFILES = ("RuntimeDefault", "Localhost")


def pod_problems(template: dict[str, Any], path: str, locked: bool = False) -> Iterator[Problem]:
    """Yield (path, what is wrong) of a pod template; `locked`: IPC_LOCK may be added."""
    spec = at(template, "spec", default={})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if at(spec, field, default=False):
            yield f"{path}.{field}", "refused by the restricted pod standard; leave it out"
    for index, volume in enumerate(at(spec, "volumes", default=[])):
        for kind in sorted(set(volume) - {"name"} - VOLUMES):
            yield (
                f"{path}.volumes[{index}].{kind}",
                (
                    "refused by the restricted pod standard; allowed: "
                    f"{', '.join(sorted(VOLUMES))}; take one of these"
                ),
            )
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(at(spec, kind, default=[])):
            here = f"{path}.{kind}[{index}]"
            yield from security_problems(
                at(container, "securityContext", default={}),
                f"{here}.securityContext",
                at(spec, "securityContext", default={}),
                locked,
            )
            for number, port in enumerate(at(container, "ports", default=[])):
                if at(port, "hostPort", default=0):
                    yield (
                        f"{here}.ports[{number}].hostPort",
                        "refused by the restricted pod standard; leave it out",
                    )


def security_problems(
    context: dict[str, Any], path: str, pod: dict[str, Any], locked: bool = False
) -> Iterator[Problem]:
    """Yield what is wrong with a container's securityContext; some of it may stand in that of its pod, `pod`."""
    refused = "by the restricted pod standard"
    if at(context, "allowPrivilegeEscalation", default=True):
        yield f"{path}.allowPrivilegeEscalation", f"has to be false {refused}; set it"
    if at(context, "privileged", default=False):
        yield f"{path}.privileged", f"refused {refused}; leave it out"
    if not at(context, "runAsNonRoot", default=at(pod, "runAsNonRoot", default=False)):
        yield f"{path}.runAsNonRoot", f"has to be true {refused}; set it"
    if at(context, "runAsUser", default=at(pod, "runAsUser", default=1)) == 0:
        yield f"{path}.runAsUser", f"0 is refused {refused}; take another"
    profile = at(context, "seccompProfile", "type", default=at(pod, "seccompProfile", "type"))
    if profile not in PROFILES:
        yield f"{path}.seccompProfile.type", f"has to be RuntimeDefault {refused}; set it"
    if "ALL" not in at(context, "capabilities", "drop", default=[]):
        yield f"{path}.capabilities.drop", f"has to be [ALL] {refused}; set it"
    allowed = {"NET_BIND_SERVICE", *(["IPC_LOCK"] if locked else [])}
    for name in at(context, "capabilities", "add", default=[]):
        if name not in allowed:
            yield (
                f"{path}.capabilities.add",
                (
                    f"{name} is refused {refused}; leave it out"
                    if name != "IPC_LOCK"
                    else "IPC_LOCK goes with an RDMA device in a namespace of its own only; see "
                    "k8s/components/rdma"
                ),
            )
