"""Broken manifests: each has one change, and the check reports it in the right line."""

from __future__ import annotations

import copy
import re

import pytest

from dist_ft.cluster.k8s import crd
from dist_ft.cluster.k8s.check import check, check_documents
from dist_ft.cluster.k8s.load_manifests import Document
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.render import render_objects
from dist_ft.config.load import load_config

pytest.importorskip("kubernetes_validate", reason="needs the extra k8s: pip install 'dist-ft[k8s]'")
pytest.importorskip("celpy", reason="needs the extra k8s: pip install 'dist-ft[k8s]'")
VERSION = "1.33"
OPTIONS = Options(image="dist-ft:0.2.0", ray_version="2.60.0")
SPEC = "spec.rayClusterSpec"
HEAD = "spec.rayClusterSpec.headGroupSpec.template"
WORKER = "spec.rayClusterSpec.workerGroupSpecs.0.template"
PATHS = {"head": HEAD, "worker": WORKER}


@pytest.fixture(scope="module")
def valid(root):
    return [
        document
        for documents in render_objects(
            load_config(str(root / "configs/llama-8b.yaml")), OPTIONS, "production-spot"
        ).values()
        for document in documents
    ]


@pytest.fixture(scope="session")
def schemas(shared):
    return crd.load_schemas(str(shared("kuberay")))


def find_field(content, path):
    """Return (where the last step of a dotted path applies, that step)."""
    *way, last = [int(step) if step.isdigit() else step for step in re.split(r"(?<!\\)\.", path)]
    for step in way:
        content = content[step.replace("\\", "") if isinstance(step, str) else step]
    return content, last.replace("\\", "") if isinstance(last, str) else last


def put(kind, path, value, index=0):
    def change(documents):
        target, last = find_field(
            [document for document in documents if document["kind"] == kind][index], path
        )
        if last == "-":
            target.append(value)
        else:
            target[last] = value

    return change


def drop(kind, path, index=0):
    def change(documents):
        target, last = find_field(
            [document for document in documents if document["kind"] == kind][index], path
        )
        del target[last]

    return change


def without(kind, index=0):
    def change(documents):
        documents.remove([document for document in documents if document["kind"] == kind][index])

    return change


def run_check(documents, schemas):
    return check_documents(
        [Document("m.yaml", document) for document in documents], schemas, VERSION
    )


def test_valid_manifests_pass(valid):
    report = run_check(valid, {})
    assert (report.problems, report.checked) == ([], 10)
    assert report.notes == [
        "RayJob: without its CRD (--crd), only the pods in it were checked against a schema"
    ]


ESCAPED = r"pod-security\.kubernetes\.io/enforce"
CONTAINER = f"{WORKER}.spec.containers.0"
BROKEN = {  # name: (change, part of the expected line)
    # Kubernetes' own schemas, strictly
    "a misspelled field": (
        put("PodDisruptionBudget", "spec.minAvailabel", 1),
        "PodDisruptionBudget/llama-8b-head spec: Additional properties are not allowed ('minAvailabel'",
    ),
    "a field of a wrong type": (
        put("NetworkPolicy", "spec.policyTypes", "Ingress", 1),
        "NetworkPolicy/llama-8b spec.policyTypes: 'Ingress' is not of type 'array'",
    ),
    "a priority without a value": (
        drop("PriorityClass", "value"),
        "PriorityClass/dist-ft-head (the whole object): 'value' is a",
    ),
    "a misspelled field in a pod of Ray": (
        put("RayJob", f"{WORKER}.spec.tolerationz", []),
        "template.spec: Additional properties are not allowed ('tolerationz' was",
    ),
    "no kind": (drop("ConfigMap", "kind"), "m.yaml: object/llama-8b-config kind: is missing"),
    "no name": (drop("ConfigMap", "metadata.name"), "ConfigMap/? metadata.name: is missing"),
    "an old version of the resource": (
        put("RayJob", "apiVersion", "ray.io/v1alpha1"),
        "apiVersion: is ray.io/v1alpha1. Only ray.io/v1 is supported",
    ),
    # the operator's own rules
    "a name that is too long": (
        put("RayJob", "metadata.name", "a" * 48),
        "metadata.name: has 48 characters. The operator allows at most 47",
    ),
    "a name that starts with a digit": (
        put("RayJob", "metadata.name", "8b"),
        "metadata.name: is not allowed by the operator. It must consist of letters",
    ),
    "a ttl without shutdown": (
        put("RayJob", "spec.shutdownAfterJobFinishes", False),
        [
            "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes: true",
            "spec.shutdownAfterJobFinishes: is off, so GPUs are paid for after the end",
        ],
    ),
    "deletionRules with shutdown": (
        put(
            "RayJob",
            "spec.deletionStrategy",
            {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]},
        ),
        "spec.deletionStrategy.deletionRules: cannot be combined with shutdownAfterJobFinishes",
    ),
    "an old Ray with tokens": (
        put("RayJob", f"{SPEC}.rayVersion", "2.51.1"),
        "rayVersion: is 2.51.1. Token authentication needs at least 2.52.0",
    ),
    "no Ray version with tokens": (
        drop("RayJob", f"{SPEC}.rayVersion"),
        "rayVersion: is missing. Token authentication needs",
    ),
    "restarts with autoscaler v2": (
        put("RayJob", f"{WORKER}.spec.restartPolicy", "Always"),
        "restartPolicy: Always is not supported by autoscaler v2. Set Never",
    ),
    "resources in two places": (
        put("RayJob", f"{SPEC}.workerGroupSpecs.0.resources", {"CPU": "8"}),
        "workerGroupSpecs[0].resources: cannot be combined with rayStartParams of num-cpus, num-gpus",
    ),
    "minimum above maximum": (
        put("RayJob", f"{SPEC}.workerGroupSpecs.0.minReplicas", 9),
        "minReplicas: 9 is more than maxRepl",
    ),
    "no bounds without autoscaling": (
        lambda documents: [
            put("RayJob", f"{SPEC}.enableInTreeAutoscaling", False)(documents),
            drop("RayJob", f"{SPEC}.workerGroupSpecs.0.maxReplicas")(documents),
        ],
        "minReplicas and maxReplicas are required",
    ),
    "a feature that is off": (
        put("RayJob", f"{SPEC}.networkPolicy", {"mode": "DenyAll"}),
        "networkPolicy: needs the operator's feature RayClusterNetworkPolicy, which is off",
    ),
    "interactive with retries": (
        put("RayJob", "spec.submissionMode", "InteractiveMode"),
        [
            "spec.backoffLimit: cannot be combined with InteractiveMode",
            "spec.submissionMode: with InteractiveMode, a broken log stream",
        ],
    ),
    "a runtime environment of the wrong type": (
        put("RayJob", "spec.runtimeEnvYAML", "- a"),
        "runtimeEnvYAML: is not a YAML mapping",
    ),
    "redis in the environment": (
        put(
            "RayJob",
            f"{HEAD}.spec.containers.0.env.-",
            {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"},
        ),
        "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions",
    ),
    # our checklist
    "latest": (
        put("RayJob", f"{CONTAINER}.image", "dist-ft:latest"),
        "image=dist-ft:latest: the tag latest moves",
    ),
    "no tag": (
        put("RayJob", f"{CONTAINER}.image", "host:5000/dist-ft"),
        "image=host:5000/dist-ft: has no tag",
    ),
    "no token": (
        drop("RayJob", f"{SPEC}.authOptions"),
        "authOptions.mode: no token authentication",
    ),
    "tokens disabled": (
        put("RayJob", f"{SPEC}.authOptions.mode", "disabled"),
        "authOptions.mode: no token authentication",
    ),
    "no memory limit": (
        drop("RayJob", f"{CONTAINER}.resources.limits.memory"),
        "resources.limits.memory: is missing",
    ),
    "no CPU request": (
        drop("RayJob", f"{CONTAINER}.resources.requests.cpu"),
        "resources.requests.cpu: is missing",
    ),
    "may gain privileges": (
        drop("RayJob", f"{CONTAINER}.securityContext.allowPrivilegeEscalation"),
        "securityContext.allowPrivilegeEscalation: must be false",
    ),
    "runs as root": (
        lambda documents: [
            put("RayJob", f"{CONTAINER}.securityContext.runAsNonRoot", False)(documents)
        ],
        "securityContext.runAsNonRoot: must be true",
    ),
    "keeps capabilities": (
        drop("RayJob", f"{CONTAINER}.securityContext.capabilities"),
        "capabilities.drop: must be [ALL]",
    ),
    "locked memory in a shared namespace": (
        put("RayJob", f"{CONTAINER}.securityContext.capabilities.add", ["IPC_LOCK"]),
        "capabilities.add: IPC_LOCK is only allowed with an RDMA device in a separate",
    ),
    "the host's disk": (
        put("RayJob", f"{WORKER}.spec.volumes.-", {"name": "h", "hostPath": {"path": "/"}}),
        "volumes[2].hostPath: is not allowed by the restricted pod security standard",
    ),
    "the host's network": (
        put("RayJob", f"{WORKER}.spec.hostNetwork", True),
        "hostNetwork: is not allowed by the restricted",
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
        "enforce: is missing, so pods may request more",
    ),
    "grace below the drain": (
        put("RayJob", f"{WORKER}.spec.terminationGracePeriodSeconds", 110),
        "terminationGracePeriodSeconds: 110 s is not longer than the drain of 110 s",
    ),
    "a save longer than the drain": (
        put("RayJob", rf"{WORKER}.metadata.annotations.dist-ft/save-seconds", "130"),
        "preStop: the drain of 110 s is shorter than a save of 130 s",
    ),
    "no drain": (
        drop("RayJob", f"{CONTAINER}.lifecycle"),
        "preStop: no drain, so the pod ends before the run has saved",
    ),
    "ray stop": (
        put("RayJob", f"{CONTAINER}.lifecycle.preStop.exec.command", ["/bin/sh", "-c", "ray stop"]),
        "preStop: ray stop ends the worker that is supposed to save",
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
        "/dev/shm of 1Ti uses up the memory limit of 172Gi",
    ),
    "work on the head": (
        put("RayJob", f"{SPEC}.headGroupSpec.rayStartParams.num-cpus", "4"),
        'num-cpus: is not "0", so workers',
    ),
    "a job followed by its log stream": (
        put("RayJob", "spec.submissionMode", "K8sJobMode"),
        "with K8sJobMode, a broken log stream may fail a",
    ),
    "no retry": (
        put("RayJob", "spec.backoffLimit", 0),
        "spec.backoffLimit: no retries, so the loss of the head ends the run",
    ),
    "a name that differs at each start": (
        put("RayJob", "spec.entrypoint", "train run.yaml run.name=x-$(date +%s)"),
        "spec.entrypoint: run.name differs at each start",
    ),
    "a secret in the environment": (
        put("RayJob", f"{CONTAINER}.env.-", {"name": "HF_TOKEN", "value": "hush-hush"}),
        "env[3].value: a secret in a file. Remove and change it",
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
        "only minAvailable as a number works",
    ),
    "a load balancer for the head": (
        put("RayJob", f"{SPEC}.headGroupSpec.serviceType", "LoadBalancer"),
        "headGroupSpec.serviceType: LoadBalancer opens the dashboard and job ports",
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
    "a missing config map": (
        put("ConfigMap", "metadata.name", "other"),
        "refers to the ConfigMap llama-8b-config, which none of these files contains",
    ),
    "a missing service account": (
        put("RayJob", f"{WORKER}.spec.serviceAccountName", "other"),
        "serviceAccountName: refers to the ServiceAccount other, which none of these files contains",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifest_is_reported_in_the_right_line(valid, case):
    """Without a CRD: Kubernetes' own schemas, the operator's rules and our checklist."""
    change, expected = BROKEN[case]
    documents = copy.deepcopy(valid)
    change(documents)
    problems = run_check(documents, {}).problems
    expected_texts = expected if isinstance(expected, list) else [expected]
    assert len(problems) == len(expected_texts), problems
    for text in expected_texts:
        assert sum(text in problem for problem in problems) == 1, problems
    assert all(problem.startswith("m.yaml: ") and "hush" not in problem for problem in problems)


CRD_VIOLATIONS = {
    "a misspelled field": (
        put("RayJob", "spec.backOffLimit", 3),
        "spec: Additional properties are not allowed ('backOffLimit'",
    ),
    "a misspelled field of a group": (
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
        'volumes: name ["cache"] is not unique',
    ),
}


@pytest.mark.parametrize("case", CRD_VIOLATIONS)
def test_crd_violations_are_reported(valid, schemas, case):
    change, expected = CRD_VIOLATIONS[case]
    documents = copy.deepcopy(valid)
    change(documents)
    (problem,) = run_check(documents, schemas).problems
    assert expected in problem


def test_valid_manifests_pass_the_crd(valid, schemas):
    report = run_check(valid, schemas)
    assert (report.problems, report.notes) == ([], [])


def test_ray_cluster_without_a_job_is_checked(valid, schemas):
    """A RayCluster: the same cluster without a job."""
    job = next(document for document in valid if document["kind"] == "RayJob")
    others = [document for document in valid if document["kind"] != "RayJob"]
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": job["metadata"],
        "spec": copy.deepcopy(job["spec"]["rayClusterSpec"]),
    }
    assert run_check([*others, cluster], schemas).problems == []
    cluster["spec"]["authOptions"]["mode"] = "disabled"
    assert run_check([*others, cluster], schemas).problems == [
        "m.yaml: RayCluster/llama-8b spec.authOptions.mode: no token authentication, so whoever "
        "reaches the port can run code in the cluster. Set authOptions: {mode: token}."
    ]


def test_all_problems_are_reported_at_once(valid):
    documents = copy.deepcopy(valid)
    for name in (
        "latest",
        "no token",
        "no drain",
        "no retry",
        "a misspelled field",
        "a secret in a config map",
    ):
        BROKEN[name][0](documents)
    assert len(run_check(documents, {}).problems) == 6


def test_wrong_structure_without_a_schema_is_reported(valid):
    documents = copy.deepcopy(valid)
    put("RayJob", f"{SPEC}.headGroupSpec.rayStartParams", ["num-cpus"])(documents)
    (problem,) = run_check(documents, {}).problems
    assert "RayJob/llama-8b spec: does not have the structure of a RayJob" in problem
    assert "Pass --crd" in problem


def test_unknown_kinds_are_noted(valid):
    queue = {
        "apiVersion": "kueue.x-k8s.io/v1beta1",
        "kind": "LocalQueue",
        "metadata": {"name": "q"},
        "spec": {},
    }
    report = run_check([*valid, queue], {})
    assert report.problems == []
    assert report.notes[-1] == (
        "m.yaml: LocalQueue/q kind: no schema of kueue.x-k8s.io/v1beta1 is known; only our checklist "
        "was applied"
    )


def test_unknown_kubernetes_version_is_refused(tmp_path):
    from dist_ft.core.errors import ConfigError

    with pytest.raises(
        ConfigError, match=r"--kubernetes=9.9: unknown version. Known versions: 1.\d+ to 1.\d+"
    ):
        check([str(tmp_path)], version="9.9")


def test_missing_extra_is_reported(monkeypatch):
    from dist_ft.cluster.k8s import check as module
    from dist_ft.core.errors import ConfigError

    monkeypatch.setitem(module.REQUIRED_PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(
        ConfigError, match=r"no-such-package: not installed.*pip install 'dist-ft\[k8s\]'"
    ):
        module.check(["x"])


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("kind", "../../../x"),
        ("kind", "Pod\ud800"),
        ("kind", "a" * 70_000),
        ("kind", ""),
        ("apiVersion", "v1/../.."),
        ("apiVersion", "\x1b[31m"),
        ("apiVersion", "/"),
    ],
)
def test_names_that_no_schema_can_have_are_problems(field, name):
    """The library would open a file of that name, and raise errors that say nothing."""
    content = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, field: name}
    problems = check_documents([Document("a.yaml", content)], {}, VERSION).problems
    assert len(problems) == 1 and f"{field}: is " in problems[0]
    assert len(problems[0]) < 500 and problems[0].isprintable()
