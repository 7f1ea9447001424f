"""The tables at the start and at the end of a run."""

from __future__ import annotations

from unit.small import run_config

from dist_ft.config.schema import StorageSection
from dist_ft.runtime.bootstrap.summary import at_end, memory_line
from dist_ft.training.result import Result


def test_table_at_the_end_of_a_run():
    config = run_config("s3://user:secret@bucket/runs")
    text = at_end(
        config,
        Result(config.run_url, 6, 6, 1.23456, 2.0, 1.5, config.run_url + "/checkpoints/x", 0.0123),
    )
    assert "1.2% of the time of all steps" in text
    assert "run r: done" in text and "6 of 6" in text and "1.2346" in text
    assert "2.0000 before, 1.5000 after (-25.0 %)" in text
    assert "dist-ft export s3://<redacted>@bucket/runs/r --out DIR" in text
    assert "secret" not in text


def test_export_hint_names_the_config_if_storage_has_options():
    config = run_config("s3://bucket/runs").model_copy(
        update={"storage": StorageSection(options={"s3": {"endpoint_url": "http://h"}})}
    )
    assert "dist-ft export CONFIG.yaml --out DIR  (the config of this run" in at_end(
        config, Result("r", 1, 1)
    )


def test_missing_results_are_left_out():
    text = at_end(run_config("runs"), Result("runs/r", 3, 6))
    assert "loss" not in text and "checkpoint" not in text


def test_memory_shrinks_with_workers_and_stage():
    def gib(workers: int, stage: int) -> float:
        config = run_config("runs", cluster={"workers": workers}, zero={"stage": stage})
        return float(
            memory_line(10**9, 10**9, max(1, workers), config).split(" GiB")[0].split()[-1]
        )

    alone = gib(0, 3)
    assert gib(4, 0) == alone > gib(4, 1) > gib(4, 2) > gib(4, 3) > alone / 5
