"""The objects of a run on Kubernetes: plain values that follow from its config. Pure.

`k8s/base` in the repository is the result for configs/llama-8b.yaml; a test compares them.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import yaml

from dist_ft.cluster.k8s import pods
from dist_ft.cluster.k8s.config_checks import find_config_problems
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.pods import CACHE_MOUNT, CONFIG_MOUNT, RAY_PORTS, Json, run_labels
from dist_ft.cluster.k8s.sizing import OBJECT_STORE_BYTES, Sizing, compute_sizing
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError

RESTARTS = 10
"""New clusters that a job may get; each resumes from storage."""
TTL_S = 600
"""Seconds that a finished job's cluster stays for inspection."""
IDLE_CHECKS = 3
"""An idle node stays for this number of the run's checks for more nodes, so that it is used."""
ALL_ADDRESSES: Json = {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}
"""All but the machine's own identity (link-local addresses)."""


def build_objects(config: RunConfig, options: Options) -> dict[str, list[Json]]:
    """Return the objects of the run by file, in the order in which they must be created.

    Raises:
        ConfigError: the run cannot run on Kubernetes.
    """
    problems = find_config_problems(config, options)
    if problems:
        raise ConfigError(problems, f"run {config.run.name} on Kubernetes")

    sizes = compute_sizing(config, options)

    # from here on, the config is the one that pods run: the ConfigMap stores it
    config = config_in_cluster(config)
    metadata = {"namespace": options.namespace, "labels": run_labels(config)}
    files = {
        "namespace.yaml": [_namespace(options), _deny_ingress_policy(options)],
        "priority-class.yaml": [_priority_class("head", 1100), _priority_class("worker", 1000)],
        "service-account.yaml": [_service_account(options)],
        "config.yaml": [_config_map(config, metadata)],
        "network-policy.yaml": [_network_policy(config, metadata)],
        "disruption-budget.yaml": [
            _disruption_budget(config, metadata, "head", 1),
            _disruption_budget(config, metadata, "worker", sizes.min_pods),
        ],
        "rayjob.yaml": [_ray_job(config, options, sizes, metadata)],
    }

    if options.claim:
        files["claim.yaml"] = [_volume_claim(options)]

    return files


def config_in_cluster(config: RunConfig) -> RunConfig:
    """Return the config as pods run it.

    It uses the cluster around the pods and their own disk, and waits for lost pods.
    """
    # wait_for_nodes: a new node for a lost pod may take longer than cluster.start_timeout_s.
    cluster = config.cluster.model_copy(update={"address": "auto", "wait_for_nodes": True})

    data = config.data.model_copy(update={"cache_dir": config.data.cache_dir or CACHE_MOUNT})
    return config.model_copy(update={"cluster": cluster, "data": data})


def config_to_yaml(config: RunConfig) -> str:
    """Return the config's differences from defaults as YAML, which `load_config` reads back."""
    return yaml.safe_dump(
        config.model_dump(mode="json", exclude_defaults=True),
        sort_keys=False,
        allow_unicode=True,
        width=110,
    )


def entrypoint(*overrides: str) -> str:
    """Return the job's command."""
    return " ".join(
        ["python -m dist_ft.cli train", f"{CONFIG_MOUNT}/run.yaml", *overrides, "--skip-check"]
    )


def _ray_job(config: RunConfig, options: Options, sizes: Sizing, metadata: Json) -> Json:
    """Return the RayJob.

    It is submitted over HTTP; after a failure, a new cluster resumes it from storage.
    """
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": config.run.name, **metadata},
        "spec": {
            "submissionMode": "HTTPMode",
            "entrypoint": entrypoint(),
            "backoffLimit": RESTARTS,
            "runtimeEnvYAML": yaml.safe_dump(
                {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(sizes.drain_s)}}
            ),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": TTL_S,
            "suspend": False,
            "rayClusterSpec": _ray_cluster(config, options, sizes),
        },
    }


def _ray_cluster(config: RunConfig, options: Options, sizes: Sizing) -> Json:
    cluster: Json = {
        "rayVersion": options.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": sizes.elastic,
    }
    if options.token_secret:
        cluster["authOptions"]["secretName"] = options.token_secret

    if sizes.elastic:
        # the job starts with the fewest pods and uses more as they become available
        amounts = {"cpu": "500m", "memory": "1Gi"}
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": int(IDLE_CHECKS * config.cluster.resize_interval_s),
            "resources": {"requests": amounts, "limits": dict(amounts)},
            "securityContext": pods.SECURITY,
        }

    # no CPUs for Ray, so that no worker is placed on the head, whose loss ends the job
    cluster["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "template": pods.head_template(config, options, sizes),
        "rayStartParams": {
            "num-cpus": "0",
            "dashboard-host": "0.0.0.0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
    }

    cluster["workerGroupSpecs"] = [
        {
            "groupName": "workers",
            "replicas": sizes.min_pods if sizes.elastic else sizes.max_pods,
            "minReplicas": sizes.min_pods,
            "maxReplicas": sizes.max_pods,
            "rayStartParams": pods.start_params(config, sizes),
            "template": pods.worker_template(config, options, sizes),
        }
    ]

    return cluster


def _namespace(options: Options) -> Json:
    levels = {
        f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")
    }
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": options.namespace,
            "labels": {"app.kubernetes.io/part-of": "dist-ft", **levels},
        },
    }


def _service_account(options: Options) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {
            "name": "dist-ft",
            "namespace": options.namespace,
            "labels": {"app.kubernetes.io/part-of": "dist-ft"},
        },
        "automountServiceAccountToken": False,
    }


def _config_map(config: RunConfig, metadata: Json) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{config.run.name}-config", **metadata},
        "data": {"run.yaml": config_to_yaml(config)},
    }


def _deny_ingress_policy(options: Options) -> Json:
    """Return the policy that denies ingress to the namespace unless another policy allows it."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "deny-ingress", "namespace": options.namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    }


def _priority_class(component: str, value: int) -> Json:
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {
            "name": f"dist-ft-{component}",
            "labels": {"app.kubernetes.io/part-of": "dist-ft"},
        },
        "value": value,
        "globalDefault": False,
        "description": f"{component.capitalize()} pods of fine-tuning runs.",
    }


def _network_policy(config: RunConfig, metadata: Json) -> Json:
    """Return the policy of the run's pods.

    They reach one another and the services that they need; the operator reaches the dashboard.
    """
    own_pods: Json = {"podSelector": {"matchLabels": run_labels(config)}}
    operator: Json = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    cluster_dns: Json = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
    }
    node_dns_cache: Json = {"ipBlock": {"cidr": "169.254.20.10/32"}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": config.run.name, **metadata},
        "spec": {
            "podSelector": {"matchLabels": run_labels(config)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own_pods]},
                {"from": [operator], "ports": _ports("TCP", RAY_PORTS["dashboard"])},
            ],
            "egress": [
                {"to": [own_pods]},
                {
                    "to": [cluster_dns, node_dns_cache],
                    "ports": _ports("UDP", 53) + _ports("TCP", 53),
                },
                *_google_metadata_egress(config),
                {
                    "to": [{"ipBlock": ALL_ADDRESSES}],
                    "ports": _ports("TCP", *_egress_ports(config)),
                },
            ],
        },
    }


def _google_metadata_egress(config: RunConfig) -> list[Json]:
    """Return the rule for GKE's metadata server, which gives pods an identity for gs://.

    Empty for other stores.
    """
    # Other runs do not get it: through this address a pod could get the identity of its node.
    urls = [config.run.storage, config.model.path, *(source.path for source in config.data.train)]
    if not any(url.startswith(("gs://", "gcs://")) for url in urls):
        return []

    # which of the two addresses a policy sees depends on the data plane of the cluster
    servers = [{"ipBlock": {"cidr": f"169.254.169.{last}/32"}} for last in (252, 254)]
    return [{"to": servers, "ports": _ports("TCP", 80, 987, 988)}]


def _egress_ports(config: RunConfig) -> list[int]:
    """Return the ports of object stores, hubs and the API server.

    These are 443, 6443 and those in `storage.options`.
    """
    ports = {443, 6443}
    for settings in config.storage.options.values():
        url = urlsplit(str(settings.get("endpoint_url") or ""))
        if url.hostname:
            default_port = 80 if url.scheme == "http" else 443
            ports.add(url.port or default_port)

    # sorted: the same config must render to the same file
    return sorted(ports)


def _ports(protocol: str, *numbers: int) -> list[Json]:
    return [{"protocol": protocol, "port": number} for number in numbers]


def _disruption_budget(
    config: RunConfig, metadata: Json, component: str, min_available: int
) -> Json:
    """Return how many pods voluntary disruptions leave.

    It is a number, as no owner with a scale has these pods.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {**metadata, "name": f"{config.run.name}-{component}"},
        "spec": {
            "minAvailable": min_available,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": run_labels(config, component)},
        },
    }


def _volume_claim(options: Options) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": options.claim,
            "namespace": options.namespace,
            "labels": {"app.kubernetes.io/part-of": "dist-ft"},
        },
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Ti"}}},
    }
