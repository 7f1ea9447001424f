"""The objects of a run: what follows from its config, and what is refused."""

from __future__ import annotations

import json

import pytest
import yaml
from unit.cluster.k8s.test_sizing import OPTIONS, job, with_

from dist_ft.cluster.k8s.manifests import config_in_cluster, config_to_yaml
from dist_ft.cluster.k8s.options import parse_options
from dist_ft.cluster.k8s.render import render_objects
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError


def objects_of(kind, config, options=OPTIONS):
    return [
        document
        for documents in render_objects(config, options).values()
        for document in documents
        if document["kind"] == kind
    ]


@pytest.mark.parametrize("name", ["llama-8b", "llama-70b"])
def test_stored_config_is_the_config_in_the_cluster(root, name):
    config = load_config(str(root / f"configs/{name}.yaml"))
    text = objects_of("ConfigMap", config)[0]["data"]["run.yaml"]
    assert load_config(yaml.safe_load(text)) == config_in_cluster(config)
    assert load_config(yaml.safe_load(text)).cluster.wait_for_nodes
    assert config_to_yaml(config_in_cluster(config)) == text


def test_job_mounts_its_config_and_resumes_under_a_fixed_name():
    spec = job(with_())
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert spec["entrypoint"] == "python -m dist_ft.cli train /etc/dist_ft/run.yaml --skip-check"
    assert {"name": "config", "mountPath": "/etc/dist_ft", "readOnly": True} in head["containers"][
        0
    ]["volumeMounts"]
    assert {"name": "config", "configMap": {"name": "x-config"}} in head["volumes"]
    assert (spec["submissionMode"], spec["backoffLimit"]) == ("HTTPMode", 10)


def test_cache_folder_is_a_disk_of_the_pod():
    pod = job(with_("data.cache_dir=/mnt/disk"))["rayClusterSpec"]["workerGroupSpecs"][0][
        "template"
    ]["spec"]
    assert {"name": "cache", "mountPath": "/mnt/disk"} in pod["containers"][0]["volumeMounts"]
    assert {"name": "HF_HOME", "value": "/mnt/disk/hf"} in pod["containers"][0]["env"]

    # Kubernetes mounts it as a folder that every user may write to.
    shared = {"name": "DIST_FT_SHARED_FOLDERS", "value": "/mnt/disk"}
    assert shared in pod["containers"][0]["env"]
    assert config_in_cluster(with_()).data.cache_dir == "/var/cache/dist_ft"


def test_ports_of_a_custom_store_are_opened():
    policy = objects_of(
        "NetworkPolicy", with_("storage.options={s3: {endpoint_url: http://minio.store:9000}}")
    )[1]
    assert [port["port"] for port in policy["spec"]["egress"][-1]["ports"]] == [443, 6443, 9000]


def test_metadata_server_is_reachable_only_with_google_storage():
    def num_metadata_rules(*overrides):
        return str(objects_of("NetworkPolicy", with_(*overrides))[1]["spec"]["egress"]).count(
            "169.254.169.254/32"
        )

    assert (num_metadata_rules(), num_metadata_rules("run.storage=gs://b/runs")) == (0, 1)


def test_only_the_run_and_the_operator_reach_the_pods():
    default, policy = objects_of("NetworkPolicy", with_())
    assert default["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    mine = {
        "matchLabels": {"app.kubernetes.io/part-of": "dist-ft", "app.kubernetes.io/instance": "x"}
    }
    assert policy["spec"]["ingress"] == [
        {"from": [{"podSelector": mine}]},
        {
            "from": [
                {
                    "namespaceSelector": {},
                    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
                }
            ],
            "ports": [{"protocol": "TCP", "port": 8265}],
        },
    ]


def test_custom_resources_are_passed_to_ray():
    params = job(with_("cluster.resources_per_worker={fast: 2}"))["rayClusterSpec"][
        "workerGroupSpecs"
    ][0]["rayStartParams"]
    assert json.loads(json.loads(params["resources"])) == {"fast": 16.0}


def test_claim_allows_paths_below_its_mount():
    options = parse_options({}, ["claim=shared", "image=a:1"])
    config = with_(
        "run.storage=/mnt/dist_ft/runs",
        "data.train=/mnt/dist_ft/d/*.jsonl",
        "model.path=/mnt/dist_ft/m-1B",
    )
    assert objects_of("PersistentVolumeClaim", config, options)[0]["spec"]["accessModes"] == [
        "ReadWriteMany"
    ]
    head = objects_of("RayJob", config, options)[0]["spec"]["rayClusterSpec"]["headGroupSpec"][
        "template"
    ]["spec"]
    assert {"name": "claim", "mountPath": "/mnt/dist_ft"} in head["containers"][0]["volumeMounts"]
    with pytest.raises(ConfigError, match="3 problems"):
        render_objects(config, OPTIONS)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "run.name=7b",
            "run.name=7b: not allowed by Kubernetes as the name of a RayJob. It must start with a letter",
        ),
        ("run.storage=./runs", "run.storage=./runs: a local path, which pods cannot see"),
        ("run.storage=runs", "run.storage=runs: a local path, which pods cannot see"),
        ("model.path=./m-1B", "model.path=./m-1B: a local path, which pods cannot see"),
        ("model.chat_template=t.jinja", "model.chat_template=t.jinja: a local path"),
        ("data.train=mine.jsonl", "data.train.0.path=mine.jsonl: a local path"),
        ("evaluation.data=/d/*.jsonl", "evaluation.data.0.path=/d/*.jsonl: a local path"),
        (
            "tuning.anchor={method: ewc, strength: 1, data: old.jsonl}",
            "tuning.anchor.data.0.path=old.jsonl: a local path",
        ),
        (
            "data.cache_dir=cache",
            "data.cache_dir=cache: not an absolute path. Pods mount their disk there",
        ),
        (
            "cluster.workers=0",
            "cluster.workers=0: a single local process, which needs no Kubernetes",
        ),
    ],
)
def test_config_that_pods_cannot_run_is_refused(override, expected):
    with pytest.raises(ConfigError) as caught:
        render_objects(with_(override), OPTIONS)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(expected)


def test_hub_names_are_not_paths():
    assert render_objects(with_("data.train=org/set", "model.path=org/m-8B"), OPTIONS)


@pytest.mark.parametrize(
    ("given", "more", "expected"),
    [
        (
            {"image": "a:latest"},
            [],
            "image=a:latest: the tag latest moves. Use another tag or a digest",
        ),
        ({"image": "host:5000/a"}, [], "image=host:5000/a: has no tag, which means latest"),
        (
            {},
            ["image=a@sha256:12"],
            "image=a@sha256:12: the digest is not sha256: and 64 hexadecimal digits",
        ),
        ({"namespace": "Mine"}, [], "namespace=Mine: String should match"),
        (
            {},
            ["nope=1"],
            "--set=nope: unknown option. Use NAME=VALUE with one of these names: image, ",
        ),
        ({}, ["claim"], "--set=claim: unknown option"),
        ({}, ["redis=redis://:hush@h:1"], "redis: the URL has a user name, password"),
        (
            {"node_selector": ("a",)},
            [],
            "node_selector=a: is not a node label, which has the form key=value",
        ),
    ],
)
def test_invalid_options_are_refused(given, more, expected):
    with pytest.raises(ConfigError) as caught:
        parse_options({"image": "a:1", **given}, more)
    assert caught.value.problems[0].startswith(expected)


def test_image_with_digest_or_port_is_accepted():
    assert (
        parse_options({"image": f"host:5000/a@sha256:{'0' * 64}"}).image
        and parse_options({"image": "host:5000/a/b:1.2"}).image
    )
    assert parse_options({"image": "a:1"}, ["node_selector=gpu=h100,zone=a"]).node_selector == (
        "gpu=h100",
        "zone=a",
    )
