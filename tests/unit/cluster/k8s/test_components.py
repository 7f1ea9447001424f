"""Components and overlays: each does what it says, alone and together, and passes the check."""

from __future__ import annotations

import itertools

import pytest
from unit.cluster.k8s.test_sizing import OPTIONS, with_

from dist_ft.cluster.k8s.check import check_documents
from dist_ft.cluster.k8s.components import COMPONENTS, OVERLAYS
from dist_ft.cluster.k8s.load_manifests import Document
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.render import rendered
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
def test_every_combination_passes(root, name, overlay, components):
    pytest.importorskip(
        "kubernetes_validate", reason="needs the extra k8s: pip install 'dist-ft[k8s]'"
    )
    files = rendered(load_config(str(root / f"configs/{name}.yaml")), OPTIONS, overlay, components)
    found = [Document(file, one) for file, documents in files.items() for one in documents]
    assert check_documents(found, {}, "1.33").problems == []


def job(overlay="", *components, config=None, options=OPTIONS):
    files = rendered(
        config or with_("cluster.workers=8..16", "checkpoint.every_steps=9"),
        options,
        overlay,
        components,
    )
    return files["rayjob.yaml"][0], list(itertools.chain(*files.values()))


def test_spot_workers_and_a_head_elsewhere():
    made, _ = job(
        "production-spot",
        options=Options(
            image="a:1",
            ray_version="2.60.0",
            spot_notice_s=60,
            spot_label="cloud.google.com/gke-spot=true",
        ),
    )
    cluster = made["spec"]["rayClusterSpec"]
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
    assert made["spec"]["backoffLimit"] == 50


def test_a_save_longer_than_the_notice_of_a_spot_node_fails_the_check():
    pytest.importorskip(
        "kubernetes_validate", reason="needs the extra k8s: pip install 'dist-ft[k8s]'"
    )
    options = Options(image="a:1", ray_version="2.60.0", parameters=70e9)
    _, documents = job("production-spot", options=options)
    grace, held = check_documents([Document("m", one) for one in documents], {}, "1.33").problems
    assert "a grace period of 140 s, and a save takes 525 s" in grace
    assert "preStop: a drain of 110 s, and a save takes 525 s" in held


def test_kueue_takes_a_job_of_fixed_size_that_waits():
    made, _ = job("", "kueue")
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "dist-ft"
    cluster = made["spec"]["rayClusterSpec"]
    assert made["spec"]["suspend"] and not cluster["enableInTreeAutoscaling"]
    assert [
        cluster["workerGroupSpecs"][0][f] for f in ("replicas", "minReplicas", "maxReplicas")
    ] == [2, 2, 2]
    assert job("", "kueue", config=with_())[0]["spec"]["suspend"], "a fixed run too"


@pytest.mark.parametrize(
    ("component", "device"), [("efa", "vpc.amazonaws.com/efa"), ("rdma", "rdma/hca")]
)
def test_rdma_has_a_namespace_of_its_own(component, device):
    made, documents = job("", component)
    container = made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"][
        "containers"
    ][0]
    head = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
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


def test_redis_by_reference_and_a_way_to_it():
    made, documents = job(
        "",
        "gcs-fault-tolerance",
        options=Options(image="a:1", redis="r.x.svc:6380", redis_secret="mine"),
    )
    assert made["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"] == {
        "redisAddress": "r.x.svc:6380",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "mine", "key": "password"}}},
    }
    policy = next(
        one
        for one in documents
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "x"
    )
    assert policy["spec"]["egress"][-1]["ports"] == [{"protocol": "TCP", "port": 6380}]


def test_a_try_is_another_run_in_another_namespace():
    made, documents = job("development")
    assert made["spec"]["entrypoint"].endswith(
        "run.name=x-dev cluster.workers=8 schedule.epochs=null schedule.steps=20 --skip-check"
    )
    assert made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == 1
    assert documents[0]["metadata"]["name"] == "dist-ft-dev"
    long = with_("run.name=" + "a" * 47)
    assert f"run.name={'a' * 43}-dev " in job("development", config=long)[0]["spec"]["entrypoint"]


def test_the_overrides_of_a_try_are_a_sound_config(root):
    config = load_config(str(root / "configs/llama-8b.yaml"))
    entry = job("development", config=config)[0]["spec"]["entrypoint"]
    overrides = [word for word in entry.split() if "=" in word]
    tried = load_config(str(root / "configs/llama-8b.yaml"), overrides)
    assert (tried.run.name, tried.max_workers, tried.schedule.steps) == ("llama-8b-dev", 8, 20)


def test_production_takes_s3_by_role_and_lets_prometheus_in():
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
    ("overlay", "components", "said"),
    [
        (
            "prod",
            (),
            "--overlay=prod: no such one; allowed: development, production, production-spot; correct it",
        ),
        (
            "",
            ("spto",),
            "--with=spto: no such one; allowed: kueue, spot, efa, rdma, s3-service-account, gcs-fault-tolerance",
        ),
    ],
)
def test_overlays_and_components_nobody_knows(overlay, components, said):
    with pytest.raises(ConfigError) as caught:
        job(overlay, *components)
    assert caught.value.problems[0].startswith(said)
