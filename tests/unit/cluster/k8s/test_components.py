"""Components and overlays: each has its effect, alone and combined, and passes the check."""

from __future__ import annotations

import itertools

import pytest
from unit.cluster.k8s.test_sizing import OPTIONS, with_

from dist_ft.cluster.k8s.check import check_documents
from dist_ft.cluster.k8s.components import COMPONENTS, OVERLAYS
from dist_ft.cluster.k8s.load_manifests import Document
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.render import render_objects
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError

RUNS = [
    *(
        ("llama-8b", overlay, components)
        for overlay in ("", *OVERLAYS)
        for components in [(), ("efa", "spot"), ("spot", "kueue", "gcs-fault-tolerance")]
    ),
    *(("llama-8b", "", (name,)) for name in COMPONENTS),
    *(("llama-70b", overlay, ()) for overlay in ("", *OVERLAYS)),
]


@pytest.mark.parametrize(("name", "overlay", "components"), RUNS)
def test_every_combination_passes_the_check(root, name, overlay, components):
    pytest.importorskip(
        "kubernetes_validate", reason="needs the extra k8s: pip install 'dist-ft[k8s]'"
    )
    files = render_objects(
        load_config(str(root / f"configs/{name}.yaml")), OPTIONS, overlay, components
    )
    found = [Document(file, one) for file, documents in files.items() for one in documents]
    assert check_documents(found, {}, "1.33").problems == []


def job(overlay="", *components, config=None, options=OPTIONS):
    files = render_objects(
        config or with_("cluster.workers=8..16", "checkpoint.every_steps=9"),
        options,
        overlay,
        components,
    )
    return files["rayjob.yaml"][0], list(itertools.chain(*files.values()))


def test_spot_workers_and_head_on_other_nodes():
    job_spec, _ = job(
        "production-spot",
        options=Options(
            image="a:1",
            ray_version="2.60.0",
            spot_notice_s=60,
            spot_label="cloud.google.com/gke-spot=true",
        ),
    )
    cluster = job_spec["spec"]["rayClusterSpec"]
    worker, head = (
        group["template"]["spec"]
        for group in (cluster["workerGroupSpecs"][0], cluster["headGroupSpec"])
    )
    assert worker["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert worker["tolerations"][-1] == {
        "key": "cloud.google.com/gke-spot",
        "operator": "Equal",
        "value": "true",
        "effect": "NoSchedule",
    }
    (term,) = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term["matchExpressions"] == [
        {"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}
    ]
    hook = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert (
        "--deadline-remaining-seconds 50\n" in hook
        and worker["terminationGracePeriodSeconds"] == 80
    )
    assert job_spec["spec"]["backoffLimit"] == 50


def test_save_longer_than_the_spot_notice_fails_the_check():
    pytest.importorskip(
        "kubernetes_validate", reason="needs the extra k8s: pip install 'dist-ft[k8s]'"
    )
    options = Options(image="a:1", ray_version="2.60.0", parameters=70e9)
    _, documents = job("production-spot", options=options)
    grace, drain = check_documents([Document("m", one) for one in documents], {}, "1.33").problems
    assert "the grace period of 140 s is shorter than a save of 525 s" in grace
    assert "preStop: the drain of 110 s is shorter than a save of 525 s" in drain


def test_kueue_job_is_suspended_and_of_fixed_size():
    job_spec, _ = job("", "kueue")
    assert job_spec["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "dist-ft"
    cluster = job_spec["spec"]["rayClusterSpec"]
    assert job_spec["spec"]["suspend"] and not cluster["enableInTreeAutoscaling"]
    assert [
        cluster["workerGroupSpecs"][0][f] for f in ("replicas", "minReplicas", "maxReplicas")
    ] == [2, 2, 2]
    assert job("", "kueue", config=with_())[0]["spec"]["suspend"], "also for a run of fixed size"


@pytest.mark.parametrize(
    ("component", "device"), [("efa", "vpc.amazonaws.com/efa"), ("rdma", "rdma/hca")]
)
def test_rdma_uses_a_separate_namespace(component, device):
    job_spec, documents = job("", component)
    container = job_spec["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"][
        "containers"
    ][0]
    head = job_spec["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert device in container["resources"]["limits"] and container["securityContext"][
        "capabilities"
    ]["add"] == ["IPC_LOCK"]
    assert "add" not in head["securityContext"]["capabilities"]
    assert {one["metadata"].get("namespace") for one in documents} == {None, "dist-ft-rdma"}
    namespace = documents[0]["metadata"]
    assert (
        namespace["name"] == "dist-ft-rdma"
        and namespace["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    )


def test_redis_is_referenced_and_reachable():
    job_spec, documents = job(
        "",
        "gcs-fault-tolerance",
        options=Options(image="a:1", redis="r.x.svc:6380", redis_secret="mine"),
    )
    assert job_spec["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"] == {
        "redisAddress": "r.x.svc:6380",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "mine", "key": "password"}}},
    }
    policy = next(
        one
        for one in documents
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "x"
    )
    assert policy["spec"]["egress"][-1]["ports"] == [{"protocol": "TCP", "port": 6380}]


def test_development_is_a_separate_run_in_a_separate_namespace():
    job_spec, documents = job("development")
    assert job_spec["spec"]["entrypoint"].endswith(
        "run.name=x-dev cluster.workers=8 schedule.epochs=null schedule.steps=20 --skip-check"
    )
    assert job_spec["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == 1
    assert documents[0]["metadata"]["name"] == "dist-ft-dev"
    long = with_("run.name=" + "a" * 47)
    assert f"run.name={'a' * 43}-dev " in job("development", config=long)[0]["spec"]["entrypoint"]


def test_development_overrides_are_a_valid_config(root):
    config = load_config(str(root / "configs/llama-8b.yaml"))
    entry = job("development", config=config)[0]["spec"]["entrypoint"]
    overrides = [word for word in entry.split() if "=" in word]
    trial = load_config(str(root / "configs/llama-8b.yaml"), overrides)
    assert (trial.run.name, trial.max_workers, trial.schedule.steps) == ("llama-8b-dev", 8, 20)


def test_production_uses_an_s3_role_and_admits_prometheus():
    _, documents = job("production", options=Options(image="a:1", s3_role="arn:aws:iam::1:role/r"))
    account = next(one for one in documents if one["kind"] == "ServiceAccount")
    assert account["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/r"
    }
    policy = next(
        one
        for one in documents
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "x"
    )
    assert policy["spec"]["ingress"][-1]["ports"] == [{"protocol": "TCP", "port": 8080}]


@pytest.mark.parametrize(
    ("overlay", "components", "expected"),
    [
        (
            "prod",
            (),
            "--overlay=prod: unknown name. Allowed: development, production, production-spot.",
        ),
        (
            "",
            ("spto",),
            "--with=spto: unknown name. Allowed: kueue, spot, efa, rdma, s3-service-account, gcs-fault-tolerance",
        ),
    ],
)
def test_unknown_overlays_and_components_are_refused(overlay, components, expected):
    with pytest.raises(ConfigError) as caught:
        job(overlay, *components)
    assert caught.value.problems[0].startswith(expected)
