"""Broken manifests: each has one thing changed, and is told by one line, the right one."""

from __future__ import annotations

import copy
import re

import pytest

from dist_ft.cluster.k8s import crd
from dist_ft.cluster.k8s.check import check, check_documents
from dist_ft.cluster.k8s.load_manifests import Document
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.render import rendered
from dist_ft.config.load import load_config

pytest.importorskip("kubernetes_validate", reason="needs the extra k8s: pip install 'dist-ft[k8s]'")
pytest.importorskip("celpy", reason="needs the extra k8s: pip install 'dist-ft[k8s]'")
VERSION = "1.33"
OPTIONS = Options(image="dist-ft:0.1.0", ray_version="2.60.0")
SPEC = "spec.rayClusterSpec"
HEAD = "spec.rayClusterSpec.headGroupSpec.template"
WORKER = "spec.rayClusterSpec.workerGroupSpecs.0.template"
PATHS = {"head": HEAD, "worker": WORKER}


@pytest.fixture(scope="module")
def sound(root):
    return [
        document
        for documents in rendered(
            load_config(str(root / "configs/llama-8b.yaml")), OPTIONS, "production-spot"
        ).values()
        for document in documents
    ]


@pytest.fixture(scope="session")
def schemas(shared):
    return crd.load(str(shared("kuberay")))


def reach(content, path):
    """Return (where the last step of a dotted path applies, that step)."""
    *way, last = [int(step) if step.isdigit() else step for step in re.split(r"(?<!\\)\.", path)]
    for step in way:
        content = content[step.replace("\\", "") if isinstance(step, str) else step]
    return content, last.replace("\\", "") if isinstance(last, str) else last


def put(kind, path, value, index=0):
    def change(documents):
        target, last = reach(
            [document for document in documents if document["kind"] == kind][index], path
        )
        if last == "-":
            target.append(value)
        else:
            target[last] = value

    return change


def drop(kind, path, index=0):
    def change(documents):
        target, last = reach(
            [document for document in documents if document["kind"] == kind][index], path
        )
        del target[last]

    return change


def without(kind, index=0):
    def change(documents):
        documents.remove([document for document in documents if document["kind"] == kind][index])

    return change


def told(documents, schemas):
    return check_documents(
        [Document("m.yaml", document) for document in documents], schemas, VERSION
    )


def test_the_sound_ones_pass(sound):
    report = told(sound, {})
    assert (report.problems, report.checked) == ([], 10)
    assert report.notes == [
        "RayJob: no CRD was given (--crd), so of its own fields only those of pods were checked"
    ]


ESCAPED = r"pod-security\.kubernetes\.io/enforce"
CONTAINER = f"{WORKER}.spec.containers.0"
BROKEN = {  # what is changed: (change, what the one line says)
    # Kubernetes' own schemas, strictly
    "a misspelt field": (
        put("PodDisruptionBudget", "spec.minAvailabel", 1),
        "PodDisruptionBudget/llama-8b-head spec: Additional properties are not allowed ('minAvailabel'",
    ),
    "a field of a wrong type": (
        put("NetworkPolicy", "spec.policyTypes", "Ingress", 1),
        "NetworkPolicy/llama-8b spec.policyTypes: 'Ingress' is not of type 'array'",
    ),
    "no value of a priority": (
        drop("PriorityClass", "value"),
        "PriorityClass/dist-ft-head (all of it): 'value' is a",
    ),
    "a misspelt field in a pod of Ray": (
        put("RayJob", f"{WORKER}.spec.tolerationz", []),
        "template.spec: Additional properties are not allowed ('tolerationz' was",
    ),
    "no kind": (drop("ConfigMap", "kind"), "m.yaml: object/llama-8b-config kind: not said"),
    "no name": (drop("ConfigMap", "metadata.name"), "ConfigMap/? metadata.name: not said"),
    "an old version of the resource": (
        put("RayJob", "apiVersion", "ray.io/v1alpha1"),
        "apiVersion: ray.io/v1alpha1: allowed: ray.io/v1",
    ),
    # the operator's own rules
    "a name that is too long": (
        put("RayJob", "metadata.name", "a" * 48),
        "metadata.name: 48 characters; the operator takes",
    ),
    "a name that begins with a digit": (
        put("RayJob", "metadata.name", "8b"),
        "metadata.name: the operator takes letters",
    ),
    "a ttl without shutdown": (
        put("RayJob", "spec.shutdownAfterJobFinishes", False),
        [
            "spec.ttlSecondsAfterFinished: only with shutdownAfterJobFinishes: true",
            "spec.shutdownAfterJobFinishes: off: GPUs are paid for after the end",
        ],
    ),
    "deletionRules with shutdown": (
        put(
            "RayJob",
            "spec.deletionStrategy",
            {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]},
        ),
        "spec.deletionStrategy.deletionRules: not with shutdownAfterJobFinishes: true",
    ),
    "an old Ray with tokens": (
        put("RayJob", f"{SPEC}.rayVersion", "2.51.1"),
        "rayVersion: 2.51.1: token authentication came with 2.52.0",
    ),
    "no Ray version with tokens": (
        drop("RayJob", f"{SPEC}.rayVersion"),
        "rayVersion: none: token authentication needs",
    ),
    "restarts with autoscaler v2": (
        put("RayJob", f"{WORKER}.spec.restartPolicy", "Always"),
        "restartPolicy: Always: autoscaler v2 wants Never",
    ),
    "resources in two places": (
        put("RayJob", f"{SPEC}.workerGroupSpecs.0.resources", {"CPU": "8"}),
        "workerGroupSpecs[0].resources: not beside rayStartParams of num-cpus, num-gpus",
    ),
    "fewest above most": (
        put("RayJob", f"{SPEC}.workerGroupSpecs.0.minReplicas", 9),
        "minReplicas: 9 is more than maxRepl",
    ),
    "no bounds without autoscaling": (
        lambda documents: [
            put("RayJob", f"{SPEC}.enableInTreeAutoscaling", False)(documents),
            drop("RayJob", f"{SPEC}.workerGroupSpecs.0.maxReplicas")(documents),
        ],
        "minReplicas and maxReplicas are needed",
    ),
    "a feature that is off": (
        put("RayJob", f"{SPEC}.networkPolicy", {"mode": "DenyAll"}),
        "networkPolicy: needs the operator's feature RayClusterNetworkPolicy, which is off",
    ),
    "interactive with retries": (
        put("RayJob", "spec.submissionMode", "InteractiveMode"),
        [
            "spec.backoffLimit: not with InteractiveMode",
            "spec.submissionMode: InteractiveMode: a broken log stream",
        ],
    ),
    "a runtime environment that is none": (
        put("RayJob", "spec.runtimeEnvYAML", "- a"),
        "runtimeEnvYAML: not a mapping",
    ),
    "redis in the environment": (
        put(
            "RayJob",
            f"{HEAD}.spec.containers.0.env.-",
            {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"},
        ),
        "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions",
    ),
    # our checklist
    "latest": (
        put("RayJob", f"{CONTAINER}.image", "dist-ft:latest"),
        "image=dist-ft:latest: latest is another image",
    ),
    "no tag": (
        put("RayJob", f"{CONTAINER}.image", "host:5000/dist-ft"),
        "image=host:5000/dist-ft: it has no tag",
    ),
    "no token": (
        drop("RayJob", f"{SPEC}.authOptions"),
        "authOptions.mode: no token authentication",
    ),
    "tokens disabled": (
        put("RayJob", f"{SPEC}.authOptions.mode", "disabled"),
        "authOptions.mode: no token authentication",
    ),
    "no limit of memory": (
        drop("RayJob", f"{CONTAINER}.resources.limits.memory"),
        "resources.limits.memory: not said",
    ),
    "no request of CPUs": (
        drop("RayJob", f"{CONTAINER}.resources.requests.cpu"),
        "resources.requests.cpu: not said",
    ),
    "may gain privileges": (
        drop("RayJob", f"{CONTAINER}.securityContext.allowPrivilegeEscalation"),
        "securityContext.allowPrivilegeEscalation: has to be false",
    ),
    "runs as root": (
        lambda documents: [
            put("RayJob", f"{CONTAINER}.securityContext.runAsNonRoot", False)(documents)
        ],
        "securityContext.runAsNonRoot: has to be true",
    ),
    "keeps capabilities": (
        drop("RayJob", f"{CONTAINER}.securityContext.capabilities"),
        "capabilities.drop: has to be [ALL]",
    ),
    "locked memory in a shared namespace": (
        put("RayJob", f"{CONTAINER}.securityContext.capabilities.add", ["IPC_LOCK"]),
        "capabilities.add: IPC_LOCK goes with an RDMA device in a namespace of its",
    ),
    "the host's disk": (
        put("RayJob", f"{WORKER}.spec.volumes.-", {"name": "h", "hostPath": {"path": "/"}}),
        "volumes[2].hostPath: refused by the restricted pod standard",
    ),
    "the host's network": (
        put("RayJob", f"{WORKER}.spec.hostNetwork", True),
        "hostNetwork: refused by the restricted",
    ),
    "an autoscaler that may gain privileges": (
        drop("RayJob", f"{SPEC}.autoscalerOptions.securityContext"),
        [
            f"autoscalerOptions.securityContext.{part}"
            for part in (
                "allowPrivilegeEscalation",
                "runAsNonRoot",
                "seccompProfile.type",
                "capabilities.drop",
            )
        ],
    ),
    "a namespace without a level": (
        drop("Namespace", f"metadata.labels.{ESCAPED}"),
        "enforce: none: pods may ask for more",
    ),
    "grace below the drain": (
        put("RayJob", f"{WORKER}.spec.terminationGracePeriodSeconds", 110),
        "terminationGracePeriodSeconds: 110 is not above the drain of 110 s",
    ),
    "a save longer than the drain": (
        put("RayJob", rf"{WORKER}.metadata.annotations.dist-ft/save-seconds", "130"),
        "preStop: a drain of 110 s, and a save takes 130 s",
    ),
    "no drain": (
        drop("RayJob", f"{CONTAINER}.lifecycle"),
        "preStop: no drain: the pod ends before the run has saved",
    ),
    "ray stop": (
        put("RayJob", f"{CONTAINER}.lifecycle.preStop.exec.command", ["/bin/sh", "-c", "ray stop"]),
        "preStop: ray stop ends the worker that is to save",
    ),
    "no shared memory": (
        put("RayJob", f"{CONTAINER}.volumeMounts", []),
        "no memory volume with a sizeLimit at /dev/shm",
    ),
    "shared memory without a size": (
        drop("RayJob", f"{WORKER}.spec.volumes.0.emptyDir.sizeLimit"),
        "no memory volume with a sizeLimit at /dev/shm",
    ),
    "shared memory above the limit": (
        put("RayJob", f"{WORKER}.spec.volumes.0.emptyDir.sizeLimit", "1Ti"),
        "/dev/shm of 1Ti leaves nothing of the memory limit of 172Gi",
    ),
    "work on the head": (
        put("RayJob", f"{SPEC}.headGroupSpec.rayStartParams.num-cpus", "4"),
        'num-cpus: not "0": workers',
    ),
    "a job by log stream": (
        put("RayJob", "spec.submissionMode", "K8sJobMode"),
        "K8sJobMode: a broken log stream may fail a",
    ),
    "no retry": (
        put("RayJob", "spec.backoffLimit", 0),
        "spec.backoffLimit: none: the loss of the head ends the run",
    ),
    "another name at each start": (
        put("RayJob", "spec.entrypoint", "train run.yaml run.name=x-$(date +%s)"),
        "spec.entrypoint: a run.name that is another at each start",
    ),
    "a secret in the environment": (
        put("RayJob", f"{CONTAINER}.env.-", {"name": "HF_TOKEN", "value": "hush-hush"}),
        "env[2].value: a secret in a file; take it out",
    ),
    "a secret in the runtime environment": (
        put("RayJob", "spec.runtimeEnvYAML", "env_vars: {}\nAWS_SECRET_ACCESS_KEY: hush"),
        "runtimeEnvYAML (AWS_SECRET_ACCESS_KEY): a secret in a file",
    ),
    "a secret in a config map": (
        put("ConfigMap", "data.HF_TOKEN", "hush-hush"),
        "data.HF_TOKEN: a secret in a file",
    ),
    "a secret in a URL": (
        put("ConfigMap", "data.run\\.yaml", "storage: https://me:hush-hush@host/b"),
        "data.run.yaml: a secret in a file",
    ),
    "a Secret with its values": (
        lambda documents: documents.append(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "s", "namespace": "dist-ft"},
                "stringData": {"token": "hush-hush"},
            }
        ),
        "Secret/s stringData: a Secret with its values in a file",
    ),
    "no network policy": (
        lambda documents: [
            without("NetworkPolicy")(documents),
            without("NetworkPolicy")(documents),
        ],
        [
            "headGroupSpec.template: no NetworkPolicy",
            "workerGroupSpecs[0].template: no NetworkPolicy",
        ],
    ),
    "a policy in another namespace": (
        lambda documents: [
            without("NetworkPolicy")(documents),
            put("NetworkPolicy", "metadata.namespace", "elsewhere")(documents),
        ],
        [
            "headGroupSpec.template: no NetworkPolicy",
            "workerGroupSpecs[0].template: no NetworkPolicy",
        ],
    ),
    "a dashboard for all": (
        put("NetworkPolicy", "spec.ingress.1.from", [{"namespaceSelector": {}}], 1),
        "spec.ingress[1]: opens the dashboard's port 8265 beyond the namespace",
    ),
    "every port for all": (
        put("NetworkPolicy", "spec.ingress.-", {}, 1),
        "spec.ingress[3]: opens the dashboard's port",
    ),
    "a port range for the world": (
        put(
            "NetworkPolicy",
            "spec.ingress.-",
            {
                "from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}],
                "ports": [{"port": 8000, "endPort": 9000}],
            },
            1,
        ),
        "spec.ingress[3]: opens the dashboard's port",
    ),
    "a budget that selects nothing": (
        put("PodDisruptionBudget", "spec.selector.matchLabels", {"app": "x"}, 1),
        [
            "workerGroupSpecs[0].template: no PodDisruptionBudget",
            "spec.selector: selects no pods of these files",
        ],
    ),
    "a budget in per cent": (
        put("PodDisruptionBudget", "spec.minAvailable", "50%"),
        "only minAvailable, a number, works",
    ),
    "a balancer before the head": (
        put("RayJob", f"{SPEC}.headGroupSpec.serviceType", "LoadBalancer"),
        "headGroupSpec.serviceType: LoadBalancer: opens the dashboard and job ports",
    ),
    "an ingress": (
        lambda documents: documents.append(
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "Ingress",
                "metadata": {"name": "i"},
                "spec": {"defaultBackend": {"service": {"name": "s", "port": {"number": 8265}}}},
            }
        ),
        "Ingress/i kind: an Ingress opens a port",
    ),
    "a config map nobody makes": (
        put("ConfigMap", "metadata.name", "other"),
        "llama-8b-config: none of these files makes",
    ),
    "a service account nobody makes": (
        put("RayJob", f"{WORKER}.spec.serviceAccountName", "other"),
        "serviceAccountName: other: none of these files makes such a ServiceAccount",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_manifest_is_told_by_the_right_line(sound, what):
    """Without a CRD: what Kubernetes' own schemas, the operator's rules and our checklist say."""
    change, said = BROKEN[what]
    documents = copy.deepcopy(sound)
    change(documents)
    problems = told(documents, {}).problems
    expected = said if isinstance(said, list) else [said]
    assert len(problems) == len(expected), problems
    for text in expected:
        assert sum(text in problem for problem in problems) == 1, problems
    assert all(problem.startswith("m.yaml: ") and "hush" not in problem for problem in problems)


OF_THE_CRD = {
    "a misspelt field": (
        put("RayJob", "spec.backOffLimit", 3),
        "spec: Additional properties are not allowed ('backOffLimit'",
    ),
    "a misspelt field of a group": (
        put("RayJob", f"{SPEC}.workerGroupSpecs.0.replica", 3),
        "spec.rayClusterSpec.workerGroupSpecs[0]: Additional properties are not allowed",
    ),
    "a number as text": (
        put("RayJob", "spec.backoffLimit", "3"),
        "spec.backoffLimit: '3' is not of type 'integer'",
    ),
    "a number among texts": (
        put("RayJob", f"{SPEC}.headGroupSpec.rayStartParams.num-cpus", 0),
        "rayStartParams.num-cpus: 0 is not of type 'string'",
    ),
    "no such mode of authentication": (
        put("RayJob", f"{SPEC}.authOptions.mode", "none"),
        "authOptions.mode: 'none' is not",
    ),
    "no head": (
        drop("RayJob", f"{SPEC}.headGroupSpec"),
        "spec.rayClusterSpec: 'headGroupSpec' is a required property",
    ),
    "a rule: managed by nobody": (
        put("RayJob", "spec.managedBy", "me"),
        "spec.managedBy: the managedBy field value must be either 'ray.io/kuberay-operator' or",
    ),
    "a rule: an empty strategy": (
        put("RayJob", "spec.deletionStrategy", {}),
        "spec.deletionStrategy: deletionStrategy requires either BOTH onSuccess and onFailure, OR",
    ),
    "a rule: a condition on two things": (
        put(
            "RayJob",
            "spec.deletionStrategy",
            {
                "deletionRules": [
                    {
                        "policy": "DeleteSelf",
                        "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"},
                    }
                ]
            },
        ),
        "deletionRules[0].condition: JobStatus and JobDeploymentStatus cannot be used together",
    ),
    "two containers of one name": (
        put("RayJob", f"{WORKER}.spec.volumes.-", {"name": "cache", "emptyDir": {}}),
        'volumes: name ["cache"] stands there twice',
    ),
}


@pytest.mark.parametrize("what", OF_THE_CRD)
def test_what_the_crd_refuses(sound, schemas, what):
    change, said = OF_THE_CRD[what]
    documents = copy.deepcopy(sound)
    change(documents)
    (problem,) = told(documents, schemas).problems
    assert said in problem


def test_the_sound_ones_pass_the_crd(sound, schemas):
    report = told(sound, schemas)
    assert (report.problems, report.notes) == ([], [])


def test_a_cluster_by_itself_is_checked_too(sound, schemas):
    """A RayCluster: the same cluster, no job around it."""
    job = next(document for document in sound if document["kind"] == "RayJob")
    others = [document for document in sound if document["kind"] != "RayJob"]
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": job["metadata"],
        "spec": copy.deepcopy(job["spec"]["rayClusterSpec"]),
    }
    assert told([*others, cluster], schemas).problems == []
    cluster["spec"]["authOptions"]["mode"] = "disabled"
    assert told([*others, cluster], schemas).problems == [
        "m.yaml: RayCluster/llama-8b spec.authOptions.mode: no token authentication: whoever reaches the port runs code in "
        "the cluster; set authOptions: {mode: token}"
    ]


def test_all_that_is_wrong_is_told_at_once(sound):
    documents = copy.deepcopy(sound)
    for name in (
        "latest",
        "no token",
        "no drain",
        "no retry",
        "a misspelt field",
        "a secret in a config map",
    ):
        BROKEN[name][0](documents)
    assert len(told(documents, {}).problems) == 6


def test_without_a_schema_a_wrong_shape_is_a_line_and_no_crash(sound):
    documents = copy.deepcopy(sound)
    put("RayJob", f"{SPEC}.headGroupSpec.rayStartParams", ["num-cpus"])(documents)
    (problem,) = told(documents, {}).problems
    assert "RayJob/llama-8b spec: not shaped as a RayJob" in problem and "give --crd" in problem


def test_kinds_nobody_knows_are_noted(sound):
    queue = {
        "apiVersion": "kueue.x-k8s.io/v1beta1",
        "kind": "LocalQueue",
        "metadata": {"name": "q"},
        "spec": {},
    }
    report = told([*sound, queue], {})
    assert report.problems == []
    assert report.notes[-1] == (
        "m.yaml: LocalQueue/q kind: kueue.x-k8s.io/v1beta1 has no schema here; only our checklist was "
        "held against it"
    )


def test_a_version_of_kubernetes_nobody_knows(tmp_path):
    from dist_ft.core.errors import ConfigError

    with pytest.raises(
        ConfigError, match=r"--kubernetes=9.9: not known here; allowed: 1.\d+ to 1.\d+"
    ):
        check([str(tmp_path)], version="9.9")


def test_without_the_extra_there_is_one_clear_line(monkeypatch):
    from dist_ft.cluster.k8s import check as module
    from dist_ft.core.errors import ConfigError

    monkeypatch.setitem(module.NEEDS, "no_such_module", "no-such-package")
    with pytest.raises(
        ConfigError, match=r"no-such-package: not installed.*pip install 'dist-ft\[k8s\]'"
    ):
        module.check(["x"])
