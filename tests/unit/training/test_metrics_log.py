"""metrics.jsonl always holds one history, as strict JSON."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dist_ft.core.errors import StorageError
from dist_ft.storage.filesystem import Store
from dist_ft.training import metrics_log as module
from dist_ft.training.metrics_log import MetricsLog, read_metrics


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Store(str(tmp_path / "run"))


def steps(store: Store) -> list[tuple[int, str]]:
    return [(line["step"], line["kind"]) for line in read_metrics(store)]


def test_lines_after_the_checkpoint_are_dropped_on_resume(store):
    first = MetricsLog(store, [], 1, False)
    first.add(0, "evaluation", {"loss": 3.0})
    for step in range(1, 6):
        first.add(step, "train", {"loss": 1.0 / step})
    first.add(4, "evaluation", {"loss": 2.0})
    first.close()
    second = MetricsLog(store, read_metrics(store, 3), 2, False)
    second.add(4, "train", {"loss": 9.0})
    second.close()
    assert steps(store) == [
        (0, "evaluation"),
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (4, "train"),
    ]
    assert read_metrics(store)[-1] == {"step": 4, "kind": "train", "loss": 9.0}


def test_run_that_starts_over_has_no_lines(store):
    log = MetricsLog(store, [], 1, False)
    log.add(0, "evaluation", {"loss": 3.0})
    log.close()
    assert read_metrics(store, 0) == []
    assert read_metrics(Store(store.full_url("elsewhere"))) == []


def test_nan_and_infinity_are_null(store):
    log = MetricsLog(store, [], 1, False)
    log.add(1, "train", {"loss": float("nan"), "grad_norm": float("inf"), "step_s": 1.0})
    log.close()
    text = store.read("metrics.jsonl").decode()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "kind": "train",
        "loss": None,
        "grad_norm": None,
        "step_s": 1.0,
    }


def test_lines_are_written_by_a_flush_or_after_some_time(store, monkeypatch):
    log = MetricsLog(store, [], 1, False)
    log.add(1, "train", {"loss": 1.0})
    assert not store.exists("metrics.jsonl")
    log.flush().result()
    assert steps(store) == [(1, "train")]
    monkeypatch.setattr(module, "FLUSH_S", 0.0)
    log.flush().result()
    log._next_flush_s = 0.0
    log.add(2, "train", {"loss": 1.0})
    log._last_flush.result()
    assert steps(store) == [(1, "train"), (2, "train")]


def test_training_does_not_wait_for_storage(store, monkeypatch):
    gate, real = threading.Event(), Store.write
    monkeypatch.setattr(
        Store, "write", lambda self, path, content: (gate.wait(20), real(self, path, content))[1]
    )
    log = MetricsLog(store, [], 1, False)
    log.add(1, "train", {"loss": 1.0})
    first = log.flush()
    while not first.running():
        time.sleep(0.001)
    log.add(2, "train", {"loss": 1.0})
    second, third = log.flush(), log.flush()
    assert second is third is not first and not first.done()
    gate.set()
    second.result()
    assert steps(store) == [(1, "train"), (2, "train")]


def test_tensorboard_events_are_in_the_runs_storage(store, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(store, [], 3, True)
    log.add(1, "train", {"loss": 2.0})
    log.add(2, "train", {"loss": 1.5})
    log.close()
    (name,) = store.list("tensorboard/attempt-0003")
    events = EventAccumulator(store.full_url(f"tensorboard/attempt-0003/{name}")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 2.0),
        (2, 1.5),
    ]
    # Nothing temporary is left.
    own = tmp_path / f"dist_ft-{os.geteuid()}"
    assert sorted(tmp_path.iterdir()) == [own, tmp_path / "run"] and not list(own.iterdir())


def test_lost_tensorboard_files_do_not_end_the_run(store, tmp_path, caplog):
    """A cleaner of temporary files may remove them while the run trains."""
    log = MetricsLog(store, [], 1, True)
    log.add(1, "train", {"loss": 2.0})
    log.flush().result()
    (folder,) = filter(Path.is_dir, tmp_path.glob("dist_ft-*/tensorboard-*"))
    shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING, "dist_ft"):
        log.flush().result()
        for step in range(2, 5):
            log.add(step, "train", {"loss": 1.0})
        log.close()
    assert [step for step, _ in steps(store)] == [1, 2, 3, 4]
    (message,) = caplog.messages
    assert message.startswith("TensorBoard gets no more events (")
    assert len(store.list("tensorboard/attempt-0001")) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_error_of_an_earlier_event_does_not_end_the_run(store, tmp_path, caplog):
    """TensorBoard writes in a thread of its own, and raises its error at a later event."""
    log = MetricsLog(store, [], 1, True)
    log.add(1, "train", {"loss": 2.0})
    (folder,) = filter(Path.is_dir, tmp_path.glob("dist_ft-*/tensorboard-*"))
    shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING, "dist_ft"):
        for step in range(2, 100):
            log.add(step, "train", {"loss": 1.0})
            time.sleep(0.001)
        log.close()
    assert len(steps(store)) == 99
    (message,) = caplog.messages
    assert message.startswith("TensorBoard gets no more events ([Errno 2] No such file")


def test_failing_storage_is_logged_and_written_later(store, tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the folder should be")
    log = MetricsLog(store, [], 1, False)
    log.add(1, "train", {"loss": 1.0})
    with caplog.at_level(logging.WARNING, "dist_ft"):
        log.flush().result()
    assert caplog.messages[0].startswith(
        f"metrics were not written: {tmp_path}/run/metrics.jsonl: cannot write it ("
    )
    os.remove(tmp_path / "run")
    log.close()
    assert steps(store) == [(1, "train")]


@pytest.mark.parametrize("content", [b"{broken\n", b'{"loss": 1}\n', b"[1]\n", b"\xff\n"])
def test_file_that_is_not_a_metrics_file_is_not_overwritten(store, content):
    store.write("metrics.jsonl", content)
    with pytest.raises(
        StorageError,
        match=r"metrics\.jsonl: not a file of metrics \(.*\)\. "
        r"Allowed: lines of JSON with a step\. "
        r"Move the file away\.",
    ):
        read_metrics(store, 3)


def test_lines_that_are_not_objects_are_an_error_without_a_step_too(store):
    store.write("metrics.jsonl", b"[1]\n")
    with pytest.raises(StorageError, match="not a file of metrics"):
        read_metrics(store)


def test_metric_names_of_version_0_1_0_are_renamed(store):
    old = {"step": 1, "kind": "pace", "stood_share/n/rank-00000": 0.5, "probe_s/n/rank-00000": 1.0}
    store.write("metrics.jsonl", json.dumps(old).encode() + b"\n")
    assert read_metrics(store) == [
        {
            "step": 1,
            "kind": "pace",
            "stalled_share/n/rank-00000": 0.5,
            "probe_s/n/rank-00000": 1.0,
        }
    ]
