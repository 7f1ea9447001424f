"""The card of a dataset names its own files only: no request goes elsewhere, no local file is read."""

from __future__ import annotations

import json

import pytest
from recorder import Answer, recording

from dist_ft.core.errors import DataError
from dist_ft.data.sources import hub


def write_dataset(folder, *data_files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir()
    (folder / "data/train.jsonl").write_text('{"text": "own"}\n')
    lines = "\n".join(f"  - {json.dumps(path)}" for path in data_files)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{lines}\n---\n"
    (folder / "README.md").write_text(card)
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub._load_dataset.cache_clear()


def load(path):
    return hub._load_or_raise(path, None, "train", "data.train=x").rows.to_list()


def test_own_files_are_read(tmp_path):
    assert load(write_dataset(tmp_path / "set", "data/*.jsonl")) == [{"text": "own"}]


def test_card_that_names_another_host_gets_no_request(tmp_path):
    with recording(lambda request: Answer(200, b'{"text": "evil"}\n')) as server:
        path = write_dataset(tmp_path / "set", f"{server.url}/x.jsonl")
        with pytest.raises(
            DataError, match=r"the dataset's card names http://127\.0\.0\.1:"
        ) as caught:
            load(path)
    assert server.requests == []
    assert "Only its own files are read. Set the config to that file itself" in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "{outside}",
        "../private.jsonl",
        "data/../../private.jsonl",
        "s3://bucket/x.jsonl",
        "zip://x.jsonl::http://127.0.0.1:9/a.zip",
        "hf://datasets/other/name/x.jsonl",
        "file://{outside}",
    ],
)
def test_card_that_names_files_elsewhere_is_refused(tmp_path, pattern):
    outside = tmp_path / "private.jsonl"
    outside.write_text('{"text": "private"}\n')
    path = write_dataset(tmp_path / "set", pattern.format(outside=outside))
    with pytest.raises(DataError, match="which is no file of the dataset"):
        load(path)


def test_own_files_by_their_full_name():
    base = "hf://datasets/org/name@abc"
    assert hub._is_own_file("data/*.parquet", base, "org/name")
    assert hub._is_own_file("hf://datasets/org/name@refs/x.parquet", base, "org/name")
    assert hub._is_own_file("x", "hf://datasets/rajpurkar/squad@abc", "squad"), "a short name"
    assert not hub._is_own_file("hf://datasets/org/name-2@abc/x.parquet", base, "org/name")
    assert not hub._is_own_file("x.parquet", "s3://bucket", "org/name")


def test_the_library_is_as_before_afterwards(tmp_path):
    from datasets import data_files

    before = data_files.resolve_pattern
    with pytest.raises(DataError):
        load(write_dataset(tmp_path / "set", "../x.jsonl"))
    assert data_files.resolve_pattern is before
