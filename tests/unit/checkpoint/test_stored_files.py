"""What a run stores next to its checkpoints: complete, written back while it trains, or refused."""

from __future__ import annotations

import logging

import pytest

from dist_ft.checkpoint.stored_files import (
    StoredFiles,
    find_lost_model_file,
    model_is_stored,
    read_labels,
    require_stored_files,
    store_model_files,
)
from dist_ft.core.errors import CheckpointError

FILES = {"config.json": b"{}", "tokenizer.json": b"[1, 2]"}


@pytest.fixture
def stored(store):
    """A run with all of its small files."""
    store_model_files(store, FILES)
    store.write("run.yaml", b"run: {name: r}\n")
    store.write("data/labels.json", b'["a", "b"]')
    store.write("data/data.train.json", b"{}\n{}\n")
    return store


@pytest.mark.parametrize(
    ("path", "content", "text"),
    [
        ("model/config.json", None, "the file is missing"),
        ("model/tokenizer.json", None, "the file is missing"),
        ("model/config.json", b"", "has 0 bytes, but other content was stored"),
        ("model/tokenizer.json", b"[1", "has 2 bytes, but other content was stored"),
        ("model", None, "the file is missing"),
    ],
)
def test_fault_26_a_lost_file_of_the_model_is_found(stored, path, content, text):
    assert model_is_stored(stored) and find_lost_model_file(stored) == ""
    require_stored_files(stored)
    stored.remove(path)
    if content is not None:
        stored.write(path, content)
    assert not model_is_stored(stored)
    with pytest.raises(CheckpointError, match=f"{text}.*Run `dist-ft train`") as caught:
        require_stored_files(stored)
    assert "\n" not in str(caught.value)


def test_a_run_of_0_1_0_stored_no_lengths(stored):
    stored.write("model/.complete", b"{}")
    assert model_is_stored(stored)
    stored.write("model/config.json", b"")
    assert not model_is_stored(stored)


@pytest.mark.parametrize("marker", [b"", b"[]", b'{"files": 1}', b"\xff"])
def test_a_damaged_marker_is_no_error(stored, marker):
    stored.write("model/.complete", marker)
    assert model_is_stored(stored)


@pytest.mark.parametrize("content", [None, b"", b" \n"])
def test_fault_26_no_checkpoint_is_used_without_the_config(stored, content):
    stored.remove("run.yaml")
    if content is not None:
        stored.write("run.yaml", content)
    with pytest.raises(CheckpointError, match=r"run\.yaml: the file is (missing|empty)"):
        require_stored_files(stored)


@pytest.mark.parametrize(
    "lost", ["model", "data", "run.yaml", "model/config.json", "data/labels.json"]
)
def test_fault_26_what_is_removed_while_a_run_trains_is_written_back(stored, caplog, lost):
    files = StoredFiles(stored)
    files.remember()
    before = {path: stored.read(path) for path in stored.walk()}
    stored.remove(lost)
    with caplog.at_level(logging.WARNING, "dist_ft"):
        files.restore()
    assert {path: stored.read(path) for path in stored.walk()} == before
    assert "was removed or altered while this run trains; written again" in caplog.text


@pytest.mark.parametrize("lost", ["run.yaml", "model/tokenizer.json", "data/labels.json"])
def test_fault_26_what_is_torn_while_a_run_trains_is_written_back(stored, lost):
    files = StoredFiles(stored)
    files.remember()
    before = stored.read(lost)
    stored.write(lost, before[:-2])
    files.restore()
    assert stored.read(lost) == before


def test_nothing_is_written_without_a_loss(stored, monkeypatch):
    files = StoredFiles(stored)
    files.remember()
    monkeypatch.setattr(type(stored), "write", lambda *_: pytest.fail("written"))
    files.restore()


@pytest.mark.parametrize("lost", ["run.yaml", "model"])
def test_fault_26_what_cannot_be_written_back_is_logged(stored, caplog, lost):
    files = StoredFiles(stored)
    files.remember()
    stored.remove(lost)
    stored.write(f"{lost}/other" if lost == "run.yaml" else lost, b"")
    with caplog.at_level(logging.WARNING, "dist_ft"):
        files.restore()
    assert "files of the run were lost and cannot be restored" in caplog.text


@pytest.mark.parametrize(
    "content", [b"", b'["a"', b"{}", b"[1]", b"[]", b"null", b"\xff", b"[" * 9999]
)
def test_fault_26_damaged_labels_are_refused_in_one_line(store, content):
    store.write("data/labels.json", content)
    with pytest.raises(
        CheckpointError, match=r"labels.json: the file is damaged \(.*remove it"
    ) as caught:
        read_labels(store)
    assert "\n" not in str(caught.value)
