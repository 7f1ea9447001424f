"""All process groups time out after the watchdog, also those that DeepSpeed creates."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_ft.config.sections.cluster import HEARTBEAT_VARIABLE, ClusterSection
from dist_ft.runtime.bootstrap import collective_timeouts


@pytest.mark.parametrize(
    ("fields", "expected_s"),
    [
        pytest.param({}, 1860, id="above the watchdog by default"),
        pytest.param({"progress_timeout_s": 3600}, 3660, id="derived from the watchdog"),
        pytest.param({"collective_timeout_s": 5000}, 5000, id="long enough"),
        pytest.param({"collective_timeout_s": 1800.0}, 1860, id="as stored by 0.1.0"),
        pytest.param(
            {"progress_timeout_s": 0, "collective_timeout_s": 20}, 20, id="without a watchdog"
        ),
    ],
)
def test_timeout_of_groups(fields: dict[str, Any], expected_s: float) -> None:
    assert ClusterSection(**fields).group_timeout_s == expected_s


def test_groups_without_a_timeout_get_that_of_the_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """DeepSpeed creates its groups so; torch would give them its own default, below ours."""
    monkeypatch.delenv(HEARTBEAT_VARIABLE, raising=False)
    store = dist.FileStore(str(tmp_path / "store"), 1)

    def timeout_s(group: Any) -> float:
        backend = group._get_backend(torch.device("cpu"))
        return backend.options._timeout.total_seconds()

    with collective_timeouts.apply(ClusterSection(progress_timeout_s=4000)) as timeout:
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timeout)
        try:
            assert timeout_s(dist.group.WORLD) == timeout_s(dist.new_group([0])) == 4060
        finally:
            dist.destroy_process_group()

        from torch.distributed import distributed_c10d

        assert distributed_c10d.default_pg_nccl_timeout == timeout, "for nccl too"
    assert distributed_c10d.default_pg_timeout.total_seconds() == 1800


@pytest.mark.parametrize(
    ("variable", "expected", "is_logged"),
    [(None, "1860", False), ("480", "1860", True), ("9999", "9999", False), ("x", "1860", False)],
)
def test_torch_waits_for_its_watchdog_longer_than_ours_for_progress(
    variable: str | None,
    expected: str,
    is_logged: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import os

    monkeypatch.setattr(logging.getLogger("dist_ft"), "propagate", True)
    monkeypatch.setenv(HEARTBEAT_VARIABLE, variable or "")
    if variable is None:
        monkeypatch.delenv(HEARTBEAT_VARIABLE)
    with collective_timeouts.apply(ClusterSection()):
        assert os.environ[HEARTBEAT_VARIABLE] == expected
    assert (f"{HEARTBEAT_VARIABLE}={variable} of the environment" in caplog.text) == is_logged
    monkeypatch.delenv(HEARTBEAT_VARIABLE)


def test_without_a_watchdog_the_heartbeat_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv(HEARTBEAT_VARIABLE, "5")
    with collective_timeouts.apply(ClusterSection(progress_timeout_s=0)):
        assert os.environ[HEARTBEAT_VARIABLE] == "5"
