"""Which numbers are bad. That all ranks agree and a replay does the same: tests/faults."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_ft.config.schema import AnomalySection
from dist_ft.core.errors import StorageError
from dist_ft.storage.filesystem import Store
from dist_ft.training.anomaly import AnomalyDetector, stop_error, read_skipped_steps, write_skipped_steps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_always_bad(value):
    anomaly_detector = AnomalyDetector(AnomalySection())
    assert anomaly_detector.check_loss(3, value).startswith("its loss is ")
    assert anomaly_detector.check_grad_norm(value).startswith("its gradient norm is ")
    assert anomaly_detector.check_loss(3, 1e30) == anomaly_detector.check_grad_norm(1e30) == ""
    assert anomaly_detector.grad_norm_limit() == math.inf


def test_a_leap_is_measured_by_the_median_of_a_full_window():
    anomaly_detector = AnomalyDetector(AnomalySection(loss_factor=2, grad_norm_factor=10, window=4))
    for loss, norm in ((1.0, 0.1), (3.0, 0.1), (1.0, 5.0)):
        assert anomaly_detector.check_loss(0, 1e9) == "" and anomaly_detector.grad_norm_limit() == math.inf
        anomaly_detector.record(loss, norm)
    anomaly_detector.record(1.0, 0.1)
    assert anomaly_detector.grad_norm_limit() == pytest.approx(1.0)
    assert (
        anomaly_detector.check_loss(9, 2.0) == ""
        and anomaly_detector.check_loss(9, 2.1) == "its loss is 2.1, above the limit of 2"
    )
    assert anomaly_detector.check_grad_norm(1.1) == "its gradient norm is 1.1, above the limit of 1"
    for _ in range(3):
        anomaly_detector.record(9.0, 9.0)
    assert anomaly_detector.check_loss(9, 2.1) == "", "the window has moved on"


def test_what_was_known_before_a_stop_is_known_after():
    section = AnomalySection(loss_factor=2, window=4)
    anomaly_detector = AnomalyDetector(section)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        anomaly_detector.record(loss, 0.0)
    again = AnomalyDetector(section, anomaly_detector.history)
    assert again.history == anomaly_detector.history == ((2.0, 0.0), (3.0, 0.0), (4.0, 0.0), (5.0, 0.0))
    assert again.check_loss(0, 7.1) == anomaly_detector.check_loss(0, 7.1) != ""
    assert AnomalyDetector(AnomalySection(), anomaly_detector.history).history == (), (
        "not kept where nothing is judged by it"
    )


def test_records_are_obeyed_by_later_attempts(tmp_path):
    store = Store(str(tmp_path))
    assert read_skipped_steps(store) == []
    write_skipped_steps(store, range(4, 6), "its loss is nan", np.array([3, 9]))
    anomaly_detector = AnomalyDetector(AnomalySection(), skipped_steps=read_skipped_steps(store))
    assert anomaly_detector.skipped_steps == {4, 5} and anomaly_detector.check_loss(4, 1.0) == "it was bad in an earlier attempt"
    assert anomaly_detector.check_loss(6, 1.0) == ""
    (tmp_path / "anomalies" / "step-x.json").write_text("{}")
    with pytest.raises(
        StorageError, match=r"holds a file that is no record of a skipped step .*; move it away"
    ):
        read_skipped_steps(store)


def test_the_end_names_steps_and_samples():
    text = str(stop_error(AnomalySection(action="stop"), 6, "its loss is nan", np.arange(40, 60)))
    assert text.startswith(
        "anomaly.action=stop: step 7 went bad: its loss is nan; its 20 samples begin with 40, 41, 42, 43, "
        "44, 45, 46, 47; what was committed is kept; look at the data"
    )
    assert "step 7 went bad for more than 5 steps one after the other: x" in str(
        stop_error(AnomalySection(), 6, "x", np.arange(2))
    )
