"""Which values are anomalies. That all ranks agree and a replay does the same: tests/faults."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_ft.config.schema import AnomalySection
from dist_ft.core.errors import StorageError
from dist_ft.storage.filesystem import Store
from dist_ft.training.anomaly import (
    AnomalyDetector,
    read_skipped_steps,
    stop_error,
    write_skipped_steps,
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_always_anomalies(value):
    detector = AnomalyDetector(AnomalySection())
    assert detector.check_loss(3, value).startswith("its loss is ")
    assert detector.check_grad_norm(value).startswith("its gradient norm is ")
    assert detector.check_loss(3, 1e30) == detector.check_grad_norm(1e30) == ""
    assert detector.grad_norm_limit() == math.inf


def test_limit_is_a_multiple_of_the_median_of_a_full_window():
    detector = AnomalyDetector(AnomalySection(loss_factor=2, grad_norm_factor=10, window=4))
    for loss, norm in ((1.0, 0.1), (3.0, 0.1), (1.0, 5.0)):
        assert detector.check_loss(0, 1e9) == "" and detector.grad_norm_limit() == math.inf
        detector.record(loss, norm)
    detector.record(1.0, 0.1)
    assert detector.grad_norm_limit() == pytest.approx(1.0)
    assert (
        detector.check_loss(9, 2.0) == ""
        and detector.check_loss(9, 2.1) == "its loss is 2.1, above the limit of 2"
    )
    assert detector.check_grad_norm(1.1) == "its gradient norm is 1.1, above the limit of 1"
    for _ in range(3):
        detector.record(9.0, 9.0)
    assert detector.check_loss(9, 2.1) == "", "the window has moved on"


def test_a_good_step_ends_a_row_of_anomalies():
    detector = AnomalyDetector(AnomalySection())
    detector.num_consecutive = 2
    detector.record(1.0, 0.1)
    assert detector.num_consecutive == 0


def test_history_survives_a_restart():
    section = AnomalySection(loss_factor=2, window=4)
    detector = AnomalyDetector(section)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        detector.record(loss, 0.0)
    again = AnomalyDetector(section, detector.history)
    assert again.history == detector.history == ((2.0, 0.0), (3.0, 0.0), (4.0, 0.0), (5.0, 0.0))
    assert again.check_loss(0, 7.1) == detector.check_loss(0, 7.1) != ""
    assert AnomalyDetector(AnomalySection(), detector.history).history == (), (
        "not stored where no check uses it"
    )


def test_later_attempts_skip_the_recorded_steps(tmp_path):
    store = Store(str(tmp_path))
    assert read_skipped_steps(store) == []
    write_skipped_steps(store, range(4, 6), "its loss is nan", np.array([3, 9]))
    detector = AnomalyDetector(AnomalySection(), skipped_steps=read_skipped_steps(store))
    assert (
        detector.skipped_steps == {4, 5}
        and detector.check_loss(4, 1.0) == "an earlier attempt skipped it"
    )
    assert detector.check_loss(6, 1.0) == ""
    (tmp_path / "anomalies" / "step-x.json").write_text("{}")
    with pytest.raises(
        StorageError,
        match=r"contains a file that is not the record of a skipped step .*Move the file away",
    ):
        read_skipped_steps(store)


def test_stop_error_names_step_and_samples():
    text = str(stop_error(AnomalySection(action="stop"), 6, "its loss is nan", np.arange(40, 60)))
    assert text.startswith(
        "anomaly.action=stop: step 7 has an anomaly: its loss is nan; the ids of its 20 samples "
        "start with 40, 41, 42, 43, 44, 45, 46, 47; committed checkpoints are kept. Check the data"
    )
    assert "step 7 has an anomaly, and so had more than 5 steps in a row: x" in str(
        stop_error(AnomalySection(), 6, "x", np.arange(2))
    )
