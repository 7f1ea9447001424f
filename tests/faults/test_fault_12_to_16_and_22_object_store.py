"""Faults 12 to 16 and 22: a real S3 server behind a proxy that injects faults."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3
import tiny
from proxy import Fault, FaultyProxy, at_first, sometimes
from resolved import loaders

from dist_ft import api
from dist_ft.checkpoint import discovery
from dist_ft.config.load import load_config
from dist_ft.core.errors import DataError, DistFtError, StorageError
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.loader import Loader
from dist_ft.data.tools.write import encode_parquet
from dist_ft.storage import retry
from dist_ft.storage.filesystem import Store

pytest.importorskip("s3fs", reason="needs s3fs (the extra `s3`)")
pytest.importorskip("moto.server", reason="needs moto[server] (the extra `dev`)")
SAMPLES = 1500


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3.server() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, port: int) -> Path:
    """A model, and data in the bucket: JSON lines in two shards of some 100 kB, and Parquet with
    page checksums."""
    folder = tmp_path_factory.mktemp("faults")
    tiny.make_model(folder / "model")
    rows = tiny.rows(SAMPLES)
    client = client_of(port)
    for shard in range(2):
        body = "".join(json.dumps(row) + "\n" for row in rows[shard::2]).encode()
        client.put_object(Bucket=s3.BUCKET, Key=f"lines/shard-{shard}.jsonl", Body=body)
        client.put_object(
            Bucket=s3.BUCKET,
            Key=f"tables/shard-{shard}.parquet",
            Body=encode_parquet(rows[shard::2]),
        )
    return folder


def client_of(port: int) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="testing-testing",
        aws_secret_access_key="testing-testing",
    )


@pytest.fixture
def faulty(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the server; all S3 requests of this process use it."""
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "DEFAULT_ATTEMPTS", 5)
    found = FaultyProxy(port)
    s3.reset_options(options(found))
    yield found
    found.close()
    s3.reset_options({})


def options(found: FaultyProxy) -> dict[str, Any]:
    return {
        "s3": {
            "endpoint_url": found.url,
            "config_kwargs": {
                "read_timeout": 2,
                "connect_timeout": 2,
                "retries": {"total_max_attempts": 1},
            },
        }
    }


@pytest.fixture
def config(base: Path, faulty: FaultyProxy, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that creates a run on the data in the bucket, with its own cache."""

    def create(where: str = "lines/*.jsonl", **changes: Any) -> Any:
        document = tiny.config(
            base, "faults", **{"storage": {"options": options(faulty)}, **changes}
        )
        document["data"] |= {
            "train": f"s3://{s3.BUCKET}/{where}",
            "block_mib": 0.05,
            "cache_dir": str(tmp_path / "cache"),
            **changes.get("data", {}),
        }
        return load_config(document)

    return create


def loaded(config: Any, tmp_path: Path, name: str = "run") -> Loader:
    return loaders(config, Store(str(tmp_path / name))).training


def tokens(loader: Loader) -> list[np.ndarray]:
    return [loader.store.block(number).tokens for number in range(len(loader.index.blocks))]


@pytest.fixture
def expected(
    config: Callable[..., Any], faulty: FaultyProxy, tmp_path: Path
) -> Callable[[str], list[np.ndarray]]:
    """Return a function that reads the data without faults."""

    def read(data: str) -> list[np.ndarray]:
        choose, faulty.choose = faulty.choose, lambda method, path: None
        found = tokens(
            loaded(config(data, data={"cache_dir": str(tmp_path / "sound")}), tmp_path, "sound")
        )
        faulty.choose = choose
        return found

    return read


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) > 0 and all(
        np.array_equal(a, b) for a, b in zip(one, other, strict=True)
    )


DATA = ["lines/*.jsonl", "tables/*.parquet"]


@pytest.mark.parametrize("data", DATA)
def test_fault_12_slow_link_gives_correct_data(config, faulty, expected, tmp_path, data):
    sound = expected(data)
    faulty.bytes_per_s = 200_000
    assert same(tokens(loaded(config(data), tmp_path)), sound)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("status", [500, 503])
def test_fault_13_temporary_errors_are_retried(config, faulty, expected, tmp_path, status, data):
    sound = expected(data)
    faulty.choose = at_first(2, Fault(status=status))
    assert same(tokens(loaded(config(data), tmp_path)), sound)
    assert faulty.num_faults >= 6, "two for the listing and two for each shard"


def test_fault_13_unavailable_store_is_one_error_in_bounded_time(config, faulty, tmp_path):
    run = config()
    faulty.choose = lambda method, path: Fault(status=503)
    started_at = time.monotonic()
    with pytest.raises(
        StorageError,
        match=rf"s3://{s3.BUCKET}/lines/.*: cannot list it .*\. Gave up after 5 attempts\. Check that "
        "the endpoint answers",
    ):
        loaded(run, tmp_path)
    assert time.monotonic() - started_at < 60


def test_fault_13_failed_save_is_logged_and_training_continues(config, faulty, capfd):
    run = config(
        run={"storage": f"s3://{s3.BUCKET}/runs"},
        schedule={"epochs": None, "steps": 6},
        checkpoint={"every_steps": 2},
        data={"overlong": "truncate"},
    )
    faulty.choose = lambda method, path: (
        Fault(status=503) if method in ("PUT", "POST") and "step-000000002" in path else None
    )
    result = api.train(run, skip_check=True)
    assert result.step == 6 and faulty.num_faults > 0
    log = capfd.readouterr().err
    assert (
        "no checkpoint at step 2, training continues: "
        "s3://bucket/runs/faults/checkpoints/step-000000002" in log
    )
    assert "SlowDown" in log


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_fault_14_reset_mid_body_continues_with_the_rest(
    config, faulty, expected, tmp_path, data, share
):
    """Every body breaks after 66,000 bytes: whole ranges never arrive; only smaller ones make
    progress."""
    sound = expected(data)
    faulty.choose = sometimes(share, Fault(reset_after=66_000), methods=("GET",))
    found = tokens(loaded(config(data, data={"block_mib": 0.5}), tmp_path))
    assert (
        len(found) == 1
        and np.array_equal(found[0], np.concatenate(sound))
        and faulty.num_faults > 0
    )


def test_fault_14_stall_mid_body_ends_by_the_read_timeout(config, faulty, expected, tmp_path):
    sound = expected("lines/*.jsonl")
    stalls = iter([Fault(stall_after=1000, stall_s=4)] * 2)
    faulty.choose = lambda method, path: (
        next(stalls, None) if method == "GET" and "shard-0" in path else None
    )
    assert same(tokens(loaded(config(), tmp_path)), sound)
    assert faulty.num_faults == 2


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    "fault",
    [Fault(truncate=100), Fault(truncate=1), Fault(error_inside=True)],
    ids=["truncated", "one byte short", "an error inside a 200"],
)
def test_fault_15_short_or_wrong_body_is_detected_and_read_again(
    config, faulty, expected, tmp_path, data, fault
):
    sound = expected(data)
    drawn = at_first(2, fault)
    faulty.choose = lambda method, path: drawn(method, path) if "/shard-" in path else None
    assert same(tokens(loaded(config(data), tmp_path)), sound)
    assert faulty.num_faults > 0


def test_fault_15_body_that_stays_short_is_one_error(config, faulty, tmp_path):
    run = config()
    faulty.choose = lambda method, path: (
        Fault(truncate=5) if method == "GET" and "/shard-" in path else None
    )
    with pytest.raises(
        StorageError,
        match=r"shard-0.jsonl: cannot read it \(OSError: got \d+ of \d+ bytes from offset "
        r"\d+\)\. Gave up after 5 attempts",
    ):
        loaded(run, tmp_path)


def test_fault_15_bytes_altered_in_transit_are_detected_by_the_index(
    config, faulty, expected, tmp_path
):
    """JSON lines have no checksums: the first read computes one, and later reads are compared
    with it."""
    sound = expected("lines/*.jsonl")
    run = config()
    assert same(tokens(loaded(run, tmp_path)), sound)
    again = loaded(config(data={"cache_dir": str(tmp_path / "another-node")}), tmp_path)
    letter = b"response"
    place = len(letter) + 30

    def alter(method: str, path: str) -> Fault | None:
        return Fault(flip=place) if method == "GET" and "/shard-1" in path else None

    faulty.choose = alter
    with pytest.raises(
        DataError, match=r"shard-1.jsonl.*(gives other tokens than when the run started|row \d+: )"
    ):
        tokens(again)


def test_fault_16_flipped_byte_in_parquet_names_the_shard(config, faulty, tmp_path, port):
    client = client_of(port)
    body = bytearray(
        client.get_object(Bucket=s3.BUCKET, Key="tables/shard-0.parquet")["Body"].read()
    )
    body[len(body) // 3] ^= 4
    client.put_object(Bucket=s3.BUCKET, Key="flipped/a.parquet", Body=bytes(body))
    with pytest.raises(
        DataError,
        match=r"s3://bucket/flipped/a.parquet: is not valid Parquet \(.*\). Write the shard",
    ):
        loaded(config("flipped/*.parquet"), tmp_path)


BAD = {
    "no JSON": (b'{"prompt": "a", "respon', r"row 301: is not JSON \(.* at column \d+\)"),
    "a missing field": (
        b'{"prompt": "a"}',
        r"row 301: has no column 'response'. Its columns: prompt",
    ),
    "an empty answer": (
        b'{"prompt": "a", "response": ""}',
        "row 301: response is empty. An answer to train on is needed",
    ),
    "a wrong encoding": (
        '{"prompt": "é", "response": "b"}'.encode("latin-1"),
        "row 301: byte 12 of the line is not UTF-8",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_fault_16_bad_row_is_named_and_skipped_only_on_request(
    config, faulty, tmp_path, port, kind, caplog
):
    line, expected_text = BAD[kind]
    rows = [json.dumps(row).encode() for row in tiny.rows(600)]
    client_of(port).put_object(
        Bucket=s3.BUCKET, Key="bad/a.jsonl", Body=b"\n".join([*rows[:300], line, *rows[300:]])
    )
    with pytest.raises(DataError, match=f"^s3://bucket/bad/a.jsonl {expected_text}"):
        loaded(config("bad/a.jsonl"), tmp_path)
    index = loaded(config("bad/a.jsonl", data={"bad_rows": "skip"}), tmp_path, "skipping").index
    assert (index.total("num_bad"), index.num_samples, index.total("num_segments")) == (1, 601, 600)
    assert (
        "data.bad_rows=skip: 1 of 601 rows cannot be used and are skipped; the first: "
        "s3://bucket/bad/a.jsonl row 301" in caplog.text
    )
    with pytest.raises(
        DataError, match=r"data.max_bad_rows=0: 1 of 601 rows cannot be used; the first: "
    ):
        loaded(
            config("bad/a.jsonl", data={"bad_rows": "skip", "max_bad_rows": 0}), tmp_path, "bounded"
        )


def test_fault_22_expired_credentials_are_reported_at_once(config, faulty, tmp_path):
    run = config()
    faulty.choose = lambda method, path: Fault(status=403)
    started_at = time.monotonic()
    with pytest.raises(
        DistFtError,
        match=r"s3://bucket/lines/.*: cannot list it \(PermissionError.*\. Access is denied\. Check "
        r"credentials \(in the environment\) and permissions",
    ):
        loaded(run, tmp_path)
    assert time.monotonic() - started_at < 10 and len(faulty.requests) < 8


def test_fault_22_wrong_clock_is_named(config, faulty, tmp_path):
    run = config()
    faulty.choose = lambda method, path: Fault(status=403, code="RequestTimeTooSkewed")
    started_at = time.monotonic()
    with pytest.raises(
        StorageError,
        match=r"s3://bucket/lines/.*\. The clock of this machine differs too much from the server's for "
        r"signed requests\. Set it \(NTP\)\.$",
    ):
        loaded(run, tmp_path)
    assert time.monotonic() - started_at < 10 and len(faulty.requests) < 8


@pytest.mark.parametrize(
    ("fault", "expected_text"),
    [
        (
            Fault(status=403, code="AccessDenied"),
            "Access is denied. Check credentials (in the environment) and permissions",
        ),
        (
            Fault(status=403, code="QuotaExceeded"),
            "The store is full. Raise its quota or keep fewer checkpoints (checkpoint.keep_last)",
        ),
        (Fault(status=507, code="XMinioStorageFull"), "The store is full"),
    ],
    ids=["read-only", "quota", "full"],
)
def test_bad_input_full_bucket_keeps_committed_checkpoints(
    config, faulty, capfd, fault, expected_text
):
    """Training continues to its end; the last save is one immediate error, and checkpoints can
    be loaded."""
    run = config(
        run={"storage": f"s3://{s3.BUCKET}/runs", "name": f"refused-{fault.code.lower()}"},
        schedule={"epochs": None, "steps": 6},
        checkpoint={"every_steps": 2},
        data={"overlong": "truncate"},
    )
    faulty.choose = lambda method, path: (
        fault
        if method in ("PUT", "POST") and ("step-000000004" in path or "step-000000006" in path)
        else None
    )
    started_at = time.monotonic()
    with pytest.raises(
        StorageError,
        match=rf"step-000000006-a0001/.*: cannot write it .*S3 code {fault.code}\)\. {re.escape(expected_text)}",
    ):
        api.train(run, skip_check=True)
    assert time.monotonic() - started_at < 60
    log = capfd.readouterr().err
    assert log.count("no checkpoint at step 4, training continues: ") == 1 and expected_text in log
    assert discovery.find_latest(Store(run.run_url), World(), Collectives()).progress.step == 2
    faulty.choose = lambda method, path: None
    assert api.train(run, skip_check=True).step == 6
    assert "resuming from step 2" in capfd.readouterr().err


def test_bad_input_bucket_in_another_region_is_reported_at_once(config, faulty, tmp_path):
    run = config()
    faulty.choose = lambda method, path: (
        Fault(status=301) if method == "GET" else None
    )  # and no header says where
    started_at = time.monotonic()
    with pytest.raises(
        StorageError,
        match=r"s3://bucket/lines/.*\. The bucket is in another region\. Set AWS_DEFAULT_REGION, or "
        r"storage.options.s3.client_kwargs.region_name",
    ):
        loaded(run, tmp_path)
    assert time.monotonic() - started_at < 10


def test_bad_input_missing_credentials_are_reported_at_once(config, faulty, tmp_path, monkeypatch):
    run = config()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3.reset_options(options(faulty))
    with pytest.raises(
        StorageError, match=r"No credentials were found\. Set them in the environment"
    ):
        loaded(run, tmp_path)


def test_fault_22_shard_that_changed_during_the_run_is_refused(config, faulty, tmp_path, port):
    client = client_of(port)
    body = b"".join(json.dumps(row).encode() + b"\n" for row in tiny.rows(300))
    client.put_object(Bucket=s3.BUCKET, Key="changing/a.jsonl", Body=body)
    loader = loaded(config("changing/*.jsonl"), tmp_path)
    client.put_object(Bucket=s3.BUCKET, Key="changing/a.jsonl", Body=body.replace(b"fox", b"cat"))
    with pytest.raises(
        DataError,
        match=r"data.train: the shard s3://bucket/changing/a.jsonl changed since the run started. A run "
        r"needs the data that it started with. Restore it, or start a run with another run.name",
    ):
        loaded(config("changing/*.jsonl"), tmp_path)
    empty = config("changing/*.jsonl", data={"cache_dir": str(tmp_path / "empty")})
    loader.store.writer.folder = Path(empty.data.cache_dir) / "tokens"
    loader.store._open.clear()
    with pytest.raises(DataError, match=r"a.jsonl: the shard changed after the data was listed"):
        tokens(loader)


def test_proxy_without_faults_is_transparent(faulty, config, expected, tmp_path):
    assert same(tokens(loaded(config(), tmp_path)), expected("lines/*.jsonl"))
    assert faulty.num_faults == 0 and len(faulty.requests) > 10
