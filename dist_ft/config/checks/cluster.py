"""Contradictions in where workers run: what placement and the network settings ask for together. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig

PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "RDMAV_")
"""What names of cluster.network_variables may begin with: nothing that changes what is computed, or holds a secret."""
NODE_ID = "ray.io/node-id"
"""The label by which Ray names a node."""
OWN = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def _workers_per_node(config: RunConfig) -> Iterator[str]:
    each, placement = config.cluster.workers_per_node, config.cluster.placement
    if not each:
        return
    if config.max_workers == 0:
        yield (
            f"cluster.workers_per_node={each}: cluster.workers=0 is this process alone; allowed with Ray workers; "
            f"set cluster.workers, or leave it out"
        )
    if placement != "PACK":
        yield (
            f"cluster.workers_per_node={each}: cluster.placement={placement} says too how workers are spread; one "
            f"of them decides; set cluster.placement=PACK, or workers_per_node=0"
        )
    pinned = [name for name in config.cluster.labels if name == NODE_ID]
    if pinned:
        yield (
            f"cluster.labels.{NODE_ID}: with cluster.workers_per_node nodes are chosen by dist_ft; other labels are "
            f"allowed; leave it out"
        )


def _network_variables(config: RunConfig) -> Iterator[str]:
    for name in config.cluster.network_variables:
        if name in OWN and config.cluster.network_interface is not None:
            yield (
                f"cluster.network_variables.{name}: cluster.network_interface={config.cluster.network_interface} "
                f"sets it; one of them is allowed; remove the other"
            )
        elif not name.startswith(PREFIXES):
            yield (
                f"cluster.network_variables.{name}: is no variable of nccl, gloo, UCX or libfabric; names that "
                f"begin with {', '.join(PREFIXES)} are allowed; set others in the cluster's own environment"
            )


CHECKS = (_workers_per_node, _network_variables)
