"""A URL that is stored in a folder is followed only in the folder's own place, or where a user says."""

from __future__ import annotations

import pytest

from dist_ft.storage import places

S3_RUN = "s3://bucket/runs/mine"


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("data/*.jsonl", "runs/mine"),
        ("/data/x.jsonl", "/runs/mine"),
        ("file:///data/x.jsonl", "~/runs/mine"),
        ("s3://bucket/data/*.jsonl", S3_RUN),
        ("s3a://bucket/data", S3_RUN),
        ("S3://bucket/data", S3_RUN),
        ("gcs://b/x", "gs://b/runs/mine"),
        ("abfss://c@account.dfs.core.windows.net/x", "abfs://c@account.dfs.core.windows.net/runs"),
        ("https://Host/x.jsonl", "https://host/runs/mine"),
        ("memory://runs/x", "memory://runs/mine"),
    ],
)
def test_same_place_is_read(url, folder):
    assert places.may_follow(url, folder)


ELSEWHERE = [
    "s3://other/data",
    "s3://bucket.evil/data",
    "s3://bucket@evil/data",
    "gs://bucket/data",
    "http://169.254.169.254/latest/meta-data/x.json",
    "https://evil/x.jsonl",
    "simplecache::s3://bucket/data",
    "filecache::https://evil/x.jsonl",
    "zip://x.jsonl::s3://bucket/a.zip",
    "simplecache::/data/x.jsonl",
    "reference://",
    "reference::/data/refs.json",
    "github://org:repo@main/x.jsonl",
    "sftp://evil/x.jsonl",
    "ftp://evil/x",
    "smb://evil/share/x",
    "memory://x",
    "hf://datasets/org/name/x.jsonl",
    "data:text/plain,{}",
    "dask://evil/x",
    "local://x::https://evil/x",
    "/data/x\0.jsonl",
]


@pytest.mark.parametrize("url", ELSEWHERE)
@pytest.mark.parametrize("folder", ["runs/mine", S3_RUN, "http://host/runs/mine"])
def test_other_places_are_not_read(url, folder):
    assert not places.may_follow(url, folder)


def test_local_paths_are_not_read_for_a_remote_folder():
    assert not places.may_follow("/home/me/private.jsonl", S3_RUN)
    assert not places.may_follow("org/name", S3_RUN)


@pytest.mark.parametrize("url", ELSEWHERE)
def test_what_the_user_named_is_read(url):
    assert places.may_follow(url, S3_RUN, [url])


def test_a_named_place_is_all_of_its_bucket_or_host():
    assert places.may_follow("s3://other/data/*.jsonl", S3_RUN, ["s3://other"])
    assert places.may_follow("https://host/a", S3_RUN, ["https://host/b"])
    assert places.may_follow("/data/x", S3_RUN, ["data"])
    assert not places.may_follow("https://host:8443/a", S3_RUN, ["https://host/b"])
    assert not places.may_follow("zip://x::s3://other/a", S3_RUN, ["s3://other"])


def test_error_names_the_field_and_no_credential():
    text = places.not_followed("data.train", "s3://key:hush@other/x", S3_RUN)
    assert text.startswith("data.train=s3://") and "named by s3://bucket/runs/mine" in text
    assert "hush" not in text
