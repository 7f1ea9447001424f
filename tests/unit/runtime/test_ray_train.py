"""The parts of the Ray runtime that need no Ray: what is asked of a cluster, and what is made of its failures."""

from __future__ import annotations

import pytest
from unit.small import run_config

from dist_ft.errors import DataError, WorkerError
from dist_ft.runtime.ray_train import _explain, _require_resources, _resources


def config(**cluster):
    return run_config("runs", cluster={"workers": 2, **cluster})


class Cluster:
    """Stands where the ray module stands: it is asked for its resources only."""

    def __init__(self, **resources: float) -> None:
        self._resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self._resources


def test_resources_of_a_worker():
    assert _resources(config(cpus_per_worker=0.5)) == {"CPU": 0.5}
    assert _resources(config(gpus_per_worker=1, resources_per_worker={"fast": 2})) == {"CPU": 1, "GPU": 1.0, "fast": 2}


def test_a_cluster_that_is_too_small():
    _require_resources(Cluster(CPU=2), config())
    _require_resources(Cluster(CPU=1), config(workers=[1, 4]))
    _require_resources(Cluster(), config(wait_for_nodes=True))
    with pytest.raises(WorkerError) as caught:
        _require_resources(Cluster(CPU=1), config())
    assert str(caught.value) == (
        "cluster.workers=2: they need 2 CPU, the cluster has 1; lower cluster.workers or cluster.cpus_per_worker, add "
        "nodes, or set cluster.wait_for_nodes=true if an autoscaler will")
    with pytest.raises(WorkerError, match="they need 2 GPU, the cluster has 0"):
        _require_resources(Cluster(CPU=8), config(gpus_per_worker=1))


def failure(**workers: Exception) -> Exception:
    error = RuntimeError("Training failed\nmany lines\nthe last one")
    error.worker_failures = {int(rank[1:]): problem for rank, problem in workers.items()}  # type: ignore[attr-defined]
    return error


def test_the_error_of_a_worker_is_the_runs():
    own = DataError("a.jsonl row 3: no")
    wrapped = RuntimeError("ray says")
    wrapped.__cause__ = own
    assert _explain(failure(w1=own), config()) is own
    assert _explain(failure(w0=ValueError("x"), w1=wrapped), config()) is own


@pytest.mark.parametrize(("error", "said"), [
    (failure(w1=ValueError("long\ntrace\nKeyError: 'x'"), w0=OSError("gone")), "worker 0: gone; worker 1: KeyError: 'x'"),
    (failure(), "the last one")])
def test_other_failures_are_one_line(error, said):
    assert str(_explain(error, config(max_failures=2))) == (
        f"run r: gave up after cluster.max_failures=2 restarts ({said}); what was committed is kept; the same command goes "
        "on from there")


def test_a_failure_that_says_nothing():
    for silent in (failure(w0=OSError()), RuntimeError()):
        assert str(_explain(silent, config())).startswith("run r: gave up after cluster.max_failures=3 restarts (")


def test_no_result_and_no_failure():
    assert str(_explain(None, config())) == (
        "run r: the workers ended without a result; see the Ray logs in /tmp/ray")
