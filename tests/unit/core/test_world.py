"""Shares of ranks, and control messages: an error of one rank reaches all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ports
import pytest

from dist_ft.core.errors import ConfigError, DataError
from dist_ft.core.world import (
    VARIABLES,
    Collectives,
    World,
    collectives,
    on_rank0,
    raise_together,
)

RANK_PROGRAM = """
import json, os, sys
import torch.distributed as dist
from dist_ft.core.errors import ConfigError, DataError, WorkerError
from dist_ft.core.world import World, collectives, on_rank0, raise_together

dist.init_process_group("gloo")
world = World.from_environment()
comms = collectives(world, 60)
result = {
    "sum": comms.sum([world.rank + 1, 2**53 - 1, world.rank == 1]),
    "all": comms.all_gather({"rank": world.rank}),
    "gather": comms.gather(world.rank),
    "broadcast": comms.broadcast(f"from {world.rank}"),
}
comms.barrier()
ran = []

def act(outcome):
    ran.append(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome

def text(action):
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

result["result"] = text(lambda: on_rank0(world, comms, lambda: act("done")))
result["error"] = text(lambda: on_rank0(world, comms, lambda: act(ConfigError(["a=1: no"], "x"))))
result["bug"] = text(lambda: on_rank0(world, comms, lambda: act(KeyError("b"))))
result["ran"] = len(ran)
mine = DataError(f"row of rank {world.rank}: no") if world.rank == 1 else None
result["together"] = text(lambda: raise_together(comms, mine))
result["no error"] = text(lambda: raise_together(comms, None))
comms.close()
dist.destroy_process_group()
with open(sys.argv[1] + f"/{world.rank}.json", "w") as file:
    json.dump(result, file)
"""


@pytest.mark.parametrize("count", range(14))
@pytest.mark.parametrize("num_ranks", range(1, 8))
def test_shares_are_contiguous_complete_and_differ_by_at_most_one(count, num_ranks):
    worlds = [World(rank, num_ranks) for rank in range(num_ranks)]
    shares = [world.share(count) for world in worlds]
    assert [item for share in shares for item in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert {world.largest_share(count) for world in worlds} == {max(lengths)}


def test_world_from_the_environment(monkeypatch):
    for name, _ in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(0, 1, 0, 1)
    for (name, _), value in zip(VARIABLES, ["5", "8", "1", "4"], strict=True):
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("x 1 0 1", r"invalid literal for int\(\) with base 10: 'x'"),
        ("2 2 0 1", "rank 2 of 2, 0 of 1 on this node"),
        ("0 0 0 1", "rank 0 of 0"),
        ("0 2 3 2", "3 of 2 on this node"),
        ("-1 2 0 1", "rank -1 of 2"),
    ],
)
def test_inconsistent_variables_are_an_error(monkeypatch, values, reason):
    for (name, _), value in zip(VARIABLES, values.split(), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError,
        match=rf"inconsistent \(.*{reason}.*\)\. Allowed: the values that torchrun sets\. "
        r"Unset them to run alone\.",
    ):
        World.from_environment()


def test_a_single_rank_gets_its_own_values():
    alone = collectives(World())
    assert type(alone) is Collectives
    assert alone.sum([1, True, 2.5]) == [1.0, 1.0, 2.5]
    assert alone.all_gather("x") == alone.gather("x") == ["x"]
    assert alone.broadcast("x") == "x" == on_rank0(World(), alone, lambda: "x")
    with pytest.raises(DataError, match="no such row"):
        raise_together(alone, DataError("no such row"))
    with pytest.raises(KeyError):
        on_rank0(World(), alone, lambda: {}["bug"])
    alone.barrier()
    alone.close()


@pytest.fixture(scope="module")
def results_of_two_ranks(tmp_path_factory) -> list[dict]:
    """Results of two real gloo ranks, by rank."""
    folder: Path = tmp_path_factory.mktemp("two")
    port = ports.find_free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(folder)],
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1].decode()[-2000:] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_ranks_exchange(results_of_two_ranks):
    for rank, result in enumerate(results_of_two_ranks):
        assert result["sum"] == [3.0, 2.0**54 - 2, 1.0]  # float64: token counts stay exact
        assert result["all"] == [{"rank": 0}, {"rank": 1}]
        assert result["gather"] == ([0, 1] if rank == 0 else None)
        assert result["broadcast"] == "from 0"


def test_only_rank_0_runs_the_action_and_all_ranks_get_its_outcome(results_of_two_ranks):
    assert [result["ran"] for result in results_of_two_ranks] == [3, 0]
    assert [result["result"] for result in results_of_two_ranks] == ["done", "done"]
    assert [result["error"] for result in results_of_two_ranks] == [
        "ConfigError: x: 1 problem\n  - a=1: no"
    ] * 2
    assert [result["bug"] for result in results_of_two_ranks] == [
        "KeyError: 'b'",
        "PeerError: rank 0 failed (KeyError: 'b'). See its own error.",
    ]


def test_an_error_of_one_rank_is_raised_on_all(results_of_two_ranks):
    assert [result["together"] for result in results_of_two_ranks] == [
        "DataError: row of rank 1: no"
    ] * 2
    assert [result["no error"] for result in results_of_two_ranks] == [None, None]
