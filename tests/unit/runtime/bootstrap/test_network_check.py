"""Which nodes are paired, which links are slow, and when the check is skipped."""

from __future__ import annotations

import pytest
from unit.small import run_config

from dist_ft.core.errors import ConfigError
from dist_ft.core.world import Collectives, World
from dist_ft.runtime import machine
from dist_ft.runtime.bootstrap import network_check
from dist_ft.runtime.bootstrap.network_check import find_slow_links
from dist_ft.runtime.bootstrap.network_measurement import Link, tournament_rounds
from dist_ft.storage.filesystem import Store


@pytest.mark.parametrize("count", range(2, 12))
def test_all_pairs_meet_once_and_no_player_twice_in_a_round(count):
    found = tournament_rounds(count)
    pairs = [pair for each in found for pair in each]
    assert sorted(pairs) == [
        (one, other) for one in range(count) for other in range(one + 1, count)
    ]
    assert len(found) == count - 1 + count % 2
    for each in found:
        assert len({player for pair in each for player in pair}) == 2 * len(each)


def links(**speeds):
    return [Link(*map(int, name[1:].split("_")), value) for name, value in speeds.items()]


def test_slow_node_is_reported_instead_of_its_pairs():
    assert find_slow_links(links(p0_1=10, p0_2=1000, p1_2=12), "abc") == [
        "node b is slow to 2 of 2 other nodes: 10 MB/s (usual here: 1,000)"
    ]


def test_slow_pair_is_reported_if_both_nodes_are_fast_otherwise():
    even = {f"p{one}_{other}": 1000.0 for one in range(4) for other in range(one + 1, 4)}
    assert find_slow_links(links(**even), "abcd") == []
    assert find_slow_links(links(**{**even, "p1_3": 499.0}), "abcd") == [
        "nodes b and d: 499 MB/s each way (usual here: 1,000)"
    ]


def test_two_nodes_are_compared_with_the_required_speed():
    assert find_slow_links(links(p0_1=100), "ab") == []
    assert find_slow_links(links(p0_1=100), "ab", 1000) == [
        "nodes a and b: 100 MB/s each way (usual here: 100, required: 1,000)"
    ]
    assert find_slow_links([], "a") == []


class Answers(Collectives):
    """Two workers; the other one answers the same, except for its rank on the node."""

    def all_gather(self, value):
        return [value, value]


@pytest.mark.parametrize(
    ("world", "cluster"), [(World(), {}), (World(0, 2, 0, 2), {"network_check": "off"})]
)
def test_check_is_skipped_for_one_node_and_if_off(world, cluster, tmp_path):
    network_check.check(
        run_config("runs", cluster={"workers": 2, **cluster}),
        world,
        Answers(),
        Store(str(tmp_path)),
    )
    assert list(tmp_path.iterdir()) == []


def test_same_nodes_are_not_checked_again_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv(network_check.NODE, "n")
    store, config = Store(str(tmp_path)), run_config("runs", cluster={"workers": 2})
    store.write(network_check.FILE, b'{"nodes": ["n", "n"]}')
    network_check.check(
        config, World(0, 2, 0, 1), Answers(), store, previous_end="worker 1 was lost"
    )  # else it would want a group
    store.write(network_check.FILE, b"torn")
    assert network_check.stored_nodes(store) is None


def test_network_variables_are_set(monkeypatch):
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "before")
    network_check.configure_interfaces(
        run_config(
            "runs",
            cluster={
                "workers": 2,
                "network_interface": "lo",
                "network_variables": {"NCCL_DEBUG": "INFO"},
            },
        )
    )
    import os

    assert [
        os.environ[name] for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG")
    ] == ["=lo", "lo", "INFO"]
    with pytest.raises(
        ConfigError, match=r"has no interface eth99\. It has .*lo.*\. Name one that all nodes have"
    ):
        network_check.configure_interfaces(
            run_config("runs", cluster={"workers": 2, "network_interface": "eth99"})
        )


def test_node_description_holds_no_host_name_and_no_path():
    import socket

    text = str(machine.describe(False))
    assert (
        socket.gethostname() not in text
        and "/" not in text.replace("+cpu", "")
        and "'torch'" in text
    )
