"""Sources: which files become shards, which are refused, and rows read as they were written."""

import gzip
import json
import os

import pytest

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.data.sources import hub, readers
from dist_ft.data.sources.discovery import Shard, discover_shards, is_hub_name, require_unchanged
from dist_ft.data.tools.write import write_jsonl, write_parquet
from dist_ft.storage.filesystem import Store

ROWS = [{"prompt": f"p{i}", "response": "é" * i, "n": i} for i in range(10)]


def shards_of(path, **values):
    return discover_shards([Source(path=str(path), **values)])[0]


def read_rows(shard):
    """Return all rows of a shard as dictionaries; the first that cannot be decoded is raised."""
    rows = []
    for _, found in readers.read_ranges(shard, readers.split_into_ranges(shard, 0, 2**20)):
        rows += found if isinstance(found, list) else found.to_pylist()
    for row in rows:
        if isinstance(row, DataError):
            raise row
    require_unchanged(shard)
    return rows


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize(
    ("write", "suffix", "kind"),
    [(write_parquet, "parquet", "parquet"), (write_jsonl, "jsonl", "jsonl")],
)
def test_written_rows_are_read_back_in_order(tmp_path, where, write, suffix, kind):
    store = Store(str(tmp_path) if where == "file" else f"memory://{tmp_path.name}-{suffix}")
    urls = write(ROWS, store, "train", 4)
    assert [url.rsplit("/", 1)[1] for url in urls] == [
        f"train-{i:05d}-of-00003.{suffix}" for i in range(3)
    ]
    shards = shards_of(store.url)
    assert [shard.kind for shard in shards] == [kind] * 3
    assert [row for shard in shards for row in read_rows(shard)] == ROWS
    assert shards == shards_of(store.full_url(f"train-*.{suffix}"))
    assert shards[:1] == shards_of(urls[0])


def test_shards_are_ordered_by_source_then_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    sources = [Source(path=str(tmp_path / "c.txt")), Source(path=str(tmp_path / "*.jsonl"))]
    assert [
        os.path.basename(shard.url) for found in discover_shards(sources) for shard in found
    ] == [
        "c.txt",
        "a.jsonl",
        "b.jsonl",
    ]


def test_text_file_is_one_sample(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_rows(shards_of(tmp_path)[0]) == [{"text": "one\n\ntwo\n"}]


def test_gzip_and_json_arrays_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert [row["text"] for shard in shards_of(tmp_path) for row in read_rows(shard)] == [
        "zipped",
        "one",
        "two",
    ]


def test_folder_ignores_other_files_but_glob_refuses_them(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "_SUCCESS").write_text("")
    assert len(shards_of(tmp_path)) == 1
    with pytest.raises(
        DataError,
        match=r"data.train=.*/\*: .*README.md has an unknown suffix. "
        r"Allowed are \.jsonl, .*. Rename or convert the file",
    ):
        shards_of(tmp_path / "*")


def test_source_without_files_is_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"evaluation.data=.*\*.jsonl: matches no file. It must be .*, .*. Check the path",
    ):
        discover_shards([Source(path=str(tmp_path / "*.jsonl"))], field="evaluation.data")


def test_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(DataError, match=r"data.train=.*a.xls: .*a.xls has an unknown suffix"):
        shards_of(tmp_path / "a.xls")
    with pytest.raises(DataError, match=r"a.xls has an unknown suffix"):
        shards_of(tmp_path)


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(
        DataError,
        match=r"the shard .*a.jsonl is empty. Each shard must hold at least one row. Remove or fill it",
    ):
        shards_of(tmp_path)


def test_duplicate_shard_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(
        DataError, match=r"data.train: the shard .*a.jsonl is listed twice. Each sample counts once"
    ):
        discover_shards([Source(path=str(tmp_path)), Source(path=str(tmp_path / "a.jsonl"))])


def test_credentials_are_refused_and_redacted():
    with pytest.raises(DataError, match="holds a credential") as caught:
        discover_shards([Source(path="ftp://me:hunter2@host/x.jsonl")])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            b'{"a": 1',
            r"is not JSON \(.* at column \d+\). Each line must be one object. Repair or remove the line",
        ),
        (b"[1]", "is a list. It must be an object with named fields"),
        (b'{"a": "\xff"}', "byte 7 of the line is not UTF-8. Convert the shard"),
    ],
)
def test_error_of_bad_row_names_shard_and_row(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"/a\.jsonl row 2: {problem}"):
        read_rows(shards_of(tmp_path)[0])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"ab\xff", "byte 2 is not UTF-8"),
        ("a.parquet", b"PAR1 not really", "is not valid Parquet"),
        ("a.jsonl.gz", b"\x1f\x8b broken", "is truncated or not gzip"),
        ("a.json", b"[1,", "is not a JSON array"),
    ],
)
def test_error_of_bad_shard_names_it(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"/{name}: {problem}"):
        read_rows(shards_of(tmp_path)[0])


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
@pytest.mark.parametrize("where", ["file", "memory"])
def test_vanished_shard_is_refused(tmp_path, write, where):
    store = Store(str(tmp_path) if where == "file" else f"memory://gone-{tmp_path.name}")
    write(ROWS, store, "train", 100)
    shard = shards_of(store.url)[0]
    store.remove(shard.url.rsplit("/", 1)[1])
    with pytest.raises(
        DataError,
        match=r"train-00000-of-00001\.\w+: the shard vanished after the data was listed. "
        r"Shards must not be removed while a run uses them. Put the shard back",
    ):
        read_rows(shard)


def test_changed_shard_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    shard = shards_of(tmp_path)[0]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"a.jsonl: the shard changed after the data was listed"):
        read_rows(shard)


def test_hub_names_are_recognized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/local")
    assert is_hub_name("other/name") and is_hub_name("squad")
    assert not is_hub_name("org/name")  # a local folder org exists: a mistyped local path
    for path in (
        "org/local",
        "./data",
        "/abs/data",
        "s3://b/k",
        "data/*",
        "a.jsonl",
        "data/a.parquet",
        "../up",
        "a/b/c",
    ):
        assert not is_hub_name(path), path


def test_hub_dataset_is_read_in_row_ranges(tmp_path, monkeypatch):
    """A folder loaded by the datasets library itself stands in for a repository of the hub."""
    monkeypatch.setattr(hub, "ROWS_PER_SHARD", 4)
    write_jsonl(ROWS, Store(str(tmp_path / "org" / "name")), "train", 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    found = hub.list_row_ranges("org/name", None, "train", "data.train=org/name")
    assert [rows for _, rows, _ in found] == [4, 4, 2] and len({url for url, _, _ in found}) == 3
    shards = [Shard(url, "hub", rows, version) for url, rows, version in found]
    assert shards[0].url.startswith("hub://org/name?") and shards[0].version
    assert [row for shard in shards for row in read_rows(shard)] == ROWS
    assert hub.list_row_ranges("org/name", None, "train", "x") == found
    with pytest.raises(
        DataError,
        match=r"data.train=org/name: cannot be loaded as a Hugging Face dataset .*valid",
    ):
        hub.list_row_ranges("org/name", None, "valid", "data.train=org/name")


def test_unknown_hub_name_is_refused(monkeypatch):
    def absent(path, subset):
        raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr("datasets.load_dataset_builder", absent)
    with pytest.raises(
        DataError,
        match=r"data.train=no/where: cannot be loaded as a Hugging Face dataset "
        r"\(FileNotFoundError: .*\). .*. If you meant a local path: it does not exist",
    ):
        discover_shards([Source(path="no/where")])
