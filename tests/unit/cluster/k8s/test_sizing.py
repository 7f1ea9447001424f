"""What a run needs on Kubernetes: the sums are repeated here from the config alone."""

from __future__ import annotations

import math

import pytest
import yaml

from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.render import render_objects
from dist_ft.cluster.k8s.sizing import compute_sizing, describe_sizing, num_parameters
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError

GIB = 2**30
OPTIONS = Options(image="dist-ft:1", ray_version="2.60.0")
BASE = {
    "run": {"name": "x", "storage": "s3://b/runs"},
    "model": {"path": "org/m-1B"},
    "data": {"train": "s3://b/d/"},
    "batch": {"global_batch": 64, "sequence_length": 8},
    "schedule": {"steps": 3},
    "cluster": {"workers": 8, "gpus_per_worker": 1},
}


def with_(*overrides):
    return load_config(BASE, overrides)


def job(config, options=OPTIONS):
    return render_objects(config, options)["rayjob.yaml"][0]["spec"]


@pytest.mark.parametrize("name", ["llama-8b", "llama-70b"])
def test_sums_of_a_run_follow_from_its_config(root, name):
    """GPUs, CPUs, memory, /dev/shm, disk and grace from the YAML file and the documented constants."""
    document = yaml.safe_load((root / f"configs/{name}.yaml").read_text())
    fewest, most = map(int, document["cluster"]["workers"].split(".."))
    billions = {"llama-8b": 8, "llama-70b": 70}[name]
    parameters = billions * 1e9 * 1.1  # from the name, plus 10 %
    spec = job(load_config(str(root / f"configs/{name}.yaml")))
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]

    assert int(limits["nvidia.com/gpu"]) == 8
    assert group["maxReplicas"] * 8 == most, "GPUs of all pods are the most workers"
    assert group["minReplicas"] * 8 == fewest
    assert cluster["enableInTreeAutoscaling"] and group["replicas"] == group["minReplicas"]
    assert group["rayStartParams"]["num-gpus"] == "8"
    assert group["rayStartParams"]["num-cpus"] == str(8 * document["cluster"]["cpus_per_worker"])
    assert int(limits["cpu"]) == 8 * document["cluster"]["cpus_per_worker"] + 1

    state = 12 * parameters / fewest  # float32 master and two moments of AdamW, fewest workers
    shared = 1 + 8 * 1  # object store, and 1 GiB per worker
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{shared}Gi"}
    memory = (
        8 * 6 + 8 * 1 + 8 * state / GIB + shared + 8
    )  # processes, spares, the copy being saved, /dev/shm, node
    assert limits["memory"] == f"{math.ceil(memory)}Gi"
    disk = 4 * parameters / GIB + 200 + 20  # model, data.cache_gib, room
    assert (
        limits["ephemeral-storage"]
        == f"{math.ceil(disk)}Gi"
        == pod["volumes"][1]["emptyDir"]["sizeLimit"]
    )

    save = math.ceil(state / 200e6)  # at 200 MB/s per worker
    drain = math.ceil((save + 60) / 10) * 10
    assert (
        f"--deadline-remaining-seconds {drain}\n"
        in container["lifecycle"]["preStop"]["exec"]["command"][-1]
    )
    assert pod["terminationGracePeriodSeconds"] == drain + 30 > save
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(drain)}
    }
    assert {"llama-8b": (172, 9, 253, 160), "llama-70b": (217, 9, 507, 190)}[name] == (
        math.ceil(memory),
        shared,
        math.ceil(disk),
        drain + 30,
    ), "as in docs/kubernetes.md"


def test_larger_models_need_more_memory_disk_and_grace():
    small, large = (
        compute_sizing(with_(), Options(image="a:1", ray_version="2.60.0", parameters=n))
        for n in (1e9, 80e9)
    )
    assert small.memory_gib == 8 * 6 + 8 + 9 + 8, (
        "without a save in the background, nothing grows with the model"
    )
    assert large.grace_s > small.grace_s and large.disk_gib > small.disk_gib
    sizes_by_part = [
        compute_sizing(
            with_("checkpoint.every_steps=1"),
            Options(image="a:1", ray_version="2.60.0", parameters=n),
        ).memory
        for n in (8e9, 16e9)
    ]
    assert (
        sizes_by_part[1]["save in progress"]
        == 2 * sizes_by_part[0]["save in progress"]
        == 12 * 16e9
    )


@pytest.mark.parametrize(
    ("overrides", "part", "size"),
    [
        (["zero.offload_optimizer=cpu"], "optimizer offload", 8 * (12 + 4) * 1e9 / 8),
        (["zero.offload_param=cpu"], "weights offload", 8 * 2 * 1e9 / 8),
        (["zero.stage=2"], "loading", 8 * 2 * 1e9),
        (["zero.stage=2", "model.dtype=float32"], "loading", 8 * 4 * 1e9),
        (["checkpoint.every_steps=5", "optimizer.name=sgd"], "save in progress", 8 * 1e9),
        (["cluster.standby=false"], "spares", None),
    ],
)
def test_memory_by_part(overrides, part, size):
    options = Options(image="a:1", ray_version="2.60.0", parameters=1e9)
    assert compute_sizing(with_(*overrides), options).memory.get(part) == size


def test_local_checkpoints_in_shared_memory_are_counted():
    options = Options(image="a:1", ray_version="2.60.0", parameters=1e9)
    sizes = compute_sizing(
        with_("checkpoint.local_folder=/dev/shm/dist_ft", "checkpoint.every_steps=9"), options
    )
    assert sizes.shared["checkpoints in memory"] == 2 * 12e9, "one complete, one being written"
    assert sizes.memory["/dev/shm"] == sum(sizes.shared.values())


@pytest.mark.parametrize(
    ("workers", "per_node", "pods", "gpus"),
    [
        ("8", 8, (1, 1), 8),
        ("4", 8, (1, 1), 4),
        ("16", 8, (2, 2), 8),
        ("12", 4, (3, 3), 4),
        ("10..16", 8, (2, 2), 8),
        ("1..4", 1, (1, 4), 1),
    ],
)
def test_workers_fill_nodes(workers, per_node, pods, gpus):
    sizes = compute_sizing(
        with_(f"cluster.workers={workers}", "checkpoint.every_steps=1"),
        Options(image="a:1", ray_version="2.60.0", workers_per_node=per_node),
    )
    assert ((sizes.min_pods, sizes.max_pods), sizes.gpus_per_pod) == (pods, gpus)


def test_workers_per_node_of_the_config_overrides_the_option():
    assert compute_sizing(with_("cluster.workers_per_node=4"), OPTIONS).max_pods == 2
    assert compute_sizing(with_(), OPTIONS.model_copy(update={"workers_per_node": 2})).max_pods == 4


def test_run_without_gpus_requests_none():
    spec = job(
        with_("cluster.gpus_per_worker=0", "cluster.workers=2", "cluster.cpus_per_worker=0.5")
    )
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert set(limits) == {"cpu", "memory", "ephemeral-storage"} and limits["cpu"] == "2"
    assert (group["rayStartParams"]["num-cpus"], group["template"]["spec"]["tolerations"]) == (
        "1",
        [],
    )
    assert (
        not spec["rayClusterSpec"]["enableInTreeAutoscaling"]
        and "autoscalerOptions" not in spec["rayClusterSpec"]
    )


def test_partly_idle_nodes_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"cluster.workers=12: with 8 workers per node, the last node has room for 4 more "
        r"workers that would be paid for but idle. Use a multiple of 8, or "
        r"--workers-per-node 1, 2, 3, 4",
    ):
        compute_sizing(with_("cluster.workers=12"), OPTIONS)


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8.8e9),
        ("s3://b/m/Llama-3.1-70B-Instruct/", 77e9),
        ("a/SmolLM2-135M", 148.5e6),
        ("mistralai/Mixtral-8x7B-v0.1", 61.6e9),
        ("Qwen/Qwen2.5-0.5b", 0.55e9),
        ("x/phi-3.5B-2", 3.85e9),
    ],
)
def test_model_size_from_its_name(path, count):
    assert num_parameters(with_(f"model.path={path}"), OPTIONS) == pytest.approx(count)


def test_model_of_unknown_size_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"model.path=org/mine: the name does not contain the model's size.*"
        r"--model-config FILE, or --parameters such as 8e9",
    ):
        compute_sizing(with_("model.path=org/mine"), OPTIONS)
    assert num_parameters(with_("model.path=org/mine"), Options(image="a:1", parameters=5)) == 5


def test_arithmetic_is_described():
    text = dict(
        describe_sizing(
            compute_sizing(
                with_("cluster.workers=8..16", "checkpoint.every_steps=1"),
                Options(image="a:1", ray_version="2.60.0", parameters=8e9),
            )
        )
    )
    assert text["pods"] == "1..2 × 8 GPUs = up to 16"
    assert text["parameters"] == "8.00 G (given or counted)"
    assert text["grace"] == "150 s = save 60 + notice 60, rounded up: drain 120, + shutdown 30"
    assert text["memory"].startswith(
        "163 GiB per pod = processes 48.0 + spares 8.0 + save in progress 89.4 + "
    )
