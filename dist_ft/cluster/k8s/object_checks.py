"""Our production checklist, part one: rules about one object. Pure.

Each rule names what would go wrong: an image that changes, a pod that is killed during a save, a
port that is open to all, a secret in a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from dist_ft.cluster.k8s import secret_scan
from dist_ft.cluster.k8s.load_manifests import Problem, lookup
from dist_ft.cluster.k8s.operator_rules import ray_groups
from dist_ft.cluster.k8s.options import find_image_problem
from dist_ft.cluster.k8s.pod_security import check_pod, check_security_context
from dist_ft.cluster.k8s.pods import SAVE_SECONDS, parse_gibibytes

TEMPLATE_KINDS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")
"""Kinds with a pod template at spec.template."""
DEFAULT_GRACE_S = 30
"""Kubernetes' terminationGracePeriodSeconds where none is set."""


class RayCluster(NamedTuple):
    """The cluster of a RayJob or RayCluster.

    Attributes:
        spec: spec of the cluster.
        path: path of `spec` in the object.
    """

    spec: dict[str, Any]
    path: str


def pod_templates(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, pod template) of all pods that an object creates.

    Supports Ray's groups and the kinds of Kubernetes' own.
    """
    kind = content.get("kind")
    cluster = ray_cluster(content)
    if cluster is not None:
        for path, group in ray_groups(cluster.spec):
            if isinstance(lookup(group, "template"), dict):
                yield f"{cluster.path}.{path}.template", group["template"]

        submitter = lookup(content, "spec", "submitterPodTemplate")
        if isinstance(submitter, dict):
            yield "spec.submitterPodTemplate", submitter
    elif kind == "Pod":
        yield "", content
    elif kind == "CronJob":
        template = lookup(content, "spec", "jobTemplate", "spec", "template")
        if isinstance(template, dict):
            yield "spec.jobTemplate.spec.template", template
    elif kind in TEMPLATE_KINDS and lookup(content, "spec", "template"):
        yield "spec.template", content["spec"]["template"]


def ray_cluster(content: dict[str, Any]) -> RayCluster | None:
    """Return the cluster of a RayJob or RayCluster; None for other kinds."""
    kind = content.get("kind")
    job_cluster = lookup(content, "spec", "rayClusterSpec")
    if kind == "RayJob" and isinstance(job_cluster, dict):
        return RayCluster(job_cluster, "spec.rayClusterSpec")
    if kind == "RayCluster" and isinstance(lookup(content, "spec"), dict):
        return RayCluster(content["spec"], "spec")
    return None


def check_object(content: dict[str, Any], allow_locked_memory: bool = False) -> Iterator[Problem]:
    """Yield the problems of one object.

    Args:
        content: the object.
        allow_locked_memory: its namespace is one for locked memory (RDMA), where pods may add the
            capability IPC_LOCK.
    """
    for path, template in pod_templates(content):
        # a pod is its own template, at the empty path
        spec_path = f"{path}.spec" if path else "spec"
        yield from check_pod(template, spec_path, allow_locked_memory)
        yield from _check_containers(template, spec_path)

    cluster = ray_cluster(content)
    if cluster is not None:
        for problem in _check_cluster(cluster.spec):
            yield Problem(f"{cluster.path}.{problem.path}", problem.message)

    if content.get("kind") == "RayJob":
        yield from _check_job(content)
    yield from secret_scan.find_secrets(content)
    yield from _check_exposure(content)


def _check_containers(template: dict[str, Any], spec_path: str) -> Iterator[Problem]:
    required = (("limits", "memory"), ("requests", "memory"), ("requests", "cpu"))
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(lookup(template, "spec", kind, default=[])):
            path = f"{spec_path}.{kind}[{index}]"
            image_problem = find_image_problem(str(lookup(container, "image", default="")))
            if image_problem:
                yield Problem(f"{path}.image={lookup(container, 'image')}", image_problem)
            for bound, resource in required:
                if lookup(container, "resources", bound, resource) is None:
                    yield Problem(
                        f"{path}.resources.{bound}.{resource}",
                        "is missing, so the node may be overbooked and the pod evicted during a "
                        "run. Set it.",
                    )


def _check_cluster(cluster: dict[str, Any]) -> Iterator[Problem]:
    if lookup(cluster, "authOptions", "mode") != "token":
        yield Problem(
            "authOptions.mode",
            "no token authentication, so whoever reaches the port can run code in the cluster. "
            "Set authOptions: {mode: token}.",
        )

    # the operator adds the autoscaler's container, which no template lists
    if lookup(cluster, "enableInTreeAutoscaling", default=False):
        yield from check_security_context(
            lookup(cluster, "autoscalerOptions", "securityContext", default={}),
            "autoscalerOptions.securityContext",
            {},
        )

    for path, group in ray_groups(cluster):
        if path == "headGroupSpec":
            yield from _check_head(group)
        elif isinstance(lookup(group, "template"), dict):
            for problem in _check_worker(group["template"]):
                yield Problem(f"{path}.template.{problem.path}", problem.message)


def _check_head(group: dict[str, Any]) -> Iterator[Problem]:
    if lookup(group, "rayStartParams", "num-cpus") != "0":
        yield Problem(
            "headGroupSpec.rayStartParams.num-cpus",
            'is not "0", so workers may be scheduled on the head, whose loss ends the job. Set it '
            "to that.",
        )

    # the head's service can be set in two places
    service_types = {
        lookup(group, "serviceType"),
        lookup(group, "headService", "spec", "type"),
    } - {None, "ClusterIP"}
    if service_types:
        yield Problem(
            "headGroupSpec.serviceType",
            f"{', '.join(sorted(service_types))} opens the dashboard and job ports beyond the "
            "cluster. Use ClusterIP and kubectl port-forward.",
        )

    if lookup(group, "enableIngress", default=False):
        yield Problem(
            "headGroupSpec.enableIngress", "opens the dashboard beyond the namespace. Remove it."
        )


def _check_worker(template: dict[str, Any]) -> Iterator[Problem]:
    """Yield what would cost a worker its last save, or its collectives their memory."""
    spec = lookup(template, "spec", default={})
    # Ray's container is the first one; the operator relies on it too
    container = lookup(spec, "containers", 0, default={})
    command = lookup(container, "lifecycle", "preStop", "exec", "command", default=[])
    hook = " ".join(map(str, command))

    grace_s = lookup(spec, "terminationGracePeriodSeconds", default=DEFAULT_GRACE_S)
    deadline = re.search(r"--deadline-remaining-seconds[ =](\d+)", hook)
    drain_s = int(deadline[1]) if deadline else None

    if re.search(r"\bray stop\b", hook):
        yield Problem(
            "spec.containers[0].lifecycle.preStop",
            "ray stop ends the worker that is supposed to save. Use ray drain-node with a "
            "deadline.",
        )
    elif drain_s is None or "drain-node" not in hook:
        yield Problem(
            "spec.containers[0].lifecycle.preStop",
            "no drain, so the pod ends before the run has saved. Use ray drain-node with "
            "--deadline-remaining-seconds, and wait.",
        )
    elif drain_s >= grace_s:
        yield Problem(
            "spec.terminationGracePeriodSeconds",
            f"{grace_s} s is not longer than the drain of {drain_s} s, which counts toward it. "
            "Raise it.",
        )

    yield from _check_save_time(template, grace_s, drain_s)
    yield from _check_shared_memory(spec, container)


def _check_save_time(
    template: dict[str, Any], grace_s: int, drain_s: int | None
) -> Iterator[Problem]:
    """Yield whether the grace period or the drain is shorter than a save."""
    annotation = str(lookup(template, "metadata", "annotations", SAVE_SECONDS, default="0"))
    if not annotation.isdigit():
        yield Problem(
            f"metadata.annotations.{SAVE_SECONDS}",
            f"{annotation} is not a whole number of seconds. Correct it.",
        )
        return

    # without the annotation the time is not known, but no save takes less than a second
    save_s = max(int(annotation), 1)
    periods = [("spec.terminationGracePeriodSeconds", "grace period", grace_s)]
    if drain_s is not None:
        periods.append(("spec.containers[0].lifecycle.preStop", "drain", drain_s))

    for path, name, seconds in periods:
        if seconds < save_s:
            yield Problem(
                path,
                f"the {name} of {seconds} s is shorter than a save of {save_s} s "
                f"({SAVE_SECONDS}). Raise it.",
            )


def _check_shared_memory(spec: dict[str, Any], container: dict[str, Any]) -> Iterator[Problem]:
    mounts = {}
    for mount in lookup(container, "volumeMounts", default=[]):
        mounts[lookup(mount, "mountPath")] = lookup(mount, "name")
    volume_name = mounts.get("/dev/shm")

    volumes = lookup(spec, "volumes", default=[])
    volume = next((one for one in volumes if lookup(one, "name") == volume_name), None)
    size = lookup(volume, "emptyDir", "sizeLimit")
    if lookup(volume, "emptyDir", "medium") != "Memory" or size is None:
        yield Problem(
            "spec.volumes",
            "no memory volume with a sizeLimit at /dev/shm, so NCCL and DeepSpeed get a "
            "container's default of 64 MiB. Mount an emptyDir with medium: Memory there.",
        )
        return

    # Pages of a memory volume are charged to the container that writes them.
    memory = lookup(container, "resources", "limits", "memory")
    try:
        is_too_large = memory is not None and (
            parse_gibibytes(str(size)) >= parse_gibibytes(str(memory))
        )
    except ValueError:
        yield Problem(
            "spec.volumes", f"sizeLimit={size} or memory={memory} is not a quantity. Correct it."
        )
        return

    if is_too_large:
        yield Problem(
            "spec.volumes",
            f"/dev/shm of {size} uses up the memory limit of {memory}, to which it counts. Raise "
            "the limit.",
        )


def _check_job(content: dict[str, Any]) -> Iterator[Problem]:
    spec = lookup(content, "spec", default={})
    mode = lookup(spec, "submissionMode", default="K8sJobMode")
    if mode != "HTTPMode":
        yield Problem(
            "spec.submissionMode",
            f"with {mode}, a broken log stream may fail a healthy run (kuberay#4921). Use "
            "HTTPMode.",
        )

    # a job on an existing cluster (clusterSelector) cannot get a new one
    if lookup(spec, "backoffLimit", default=0) < 1 and lookup(spec, "clusterSelector") is None:
        yield Problem(
            "spec.backoffLimit",
            "no retries, so the loss of the head ends the run. Set at least 1; the run resumes "
            "from storage.",
        )

    is_shut_down = lookup(spec, "shutdownAfterJobFinishes", default=False)
    if not is_shut_down and not lookup(spec, "deletionStrategy"):
        yield Problem(
            "spec.shutdownAfterJobFinishes",
            "is off, so GPUs are paid for after the end of the job. Set it to true.",
        )

    # A run finds its checkpoints by its name. `$` and backquotes: the shell computes the name.
    entrypoint = str(lookup(spec, "entrypoint", default=""))
    if re.search(r"run\.name=\S*[$`]", entrypoint):
        yield Problem(
            "spec.entrypoint",
            "run.name differs at each start, so nothing is resumed. Use a fixed name.",
        )

    if lookup(spec, "jobId"):
        yield Problem(
            "spec.jobId",
            "with a fixed id, the job of a new cluster is mistaken for the old one. Remove it.",
        )


def _check_exposure(content: dict[str, Any]) -> Iterator[Problem]:
    kind = content.get("kind")
    service_type = lookup(content, "spec", "type", default="ClusterIP")
    if kind == "Service" and service_type in ("LoadBalancer", "NodePort"):
        yield Problem("spec.type", f"{service_type} opens ports beyond the cluster. Use ClusterIP.")

    if kind == "Ingress":
        yield Problem(
            "kind",
            "an Ingress opens a port beyond the namespace. Remove it, and use kubectl "
            "port-forward.",
        )
