"""Fault 32, decompression and parsing bombs: bounded memory and time, one line.

Real processes of the command line; memory is what the kernel measured, time what the wall clock did.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

GIB = 2**30
MIB = 2**20


class Measured(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float
    peak_bytes: int


def measure(arguments: list[str], limit_s: float = 60) -> Measured:
    """Run a command, and return how it ended with its time and its largest memory."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    peak = 0
    # VmHWM: the largest memory that the process had resident so far.
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(
                peak,
                *(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line),
                0,
            )
        except (OSError, ValueError):
            pass
        if time.monotonic() - started > limit_s:
            process.kill()
        time.sleep(0.02)
    out, err = process.communicate()
    return Measured(process.returncode, out, err, time.monotonic() - started, peak)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The same command on a harmless shard."""
    path = tmp_path_factory.mktemp("harmless") / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 10)
    return measure(["data", "inspect", str(path)])


ROW = b'{"text": "first"}\n'
END = b'{"text": "last"}\n'


def gz_line(path: Path, num_bytes: int) -> None:
    """Write a .gz with a row, a line of `num_bytes` and another row."""
    # One compressed member for many repetitions of a chunk: gzip allows several in a file.
    member = gzip.compress(b"x" * (16 * MIB), 9)
    with open(path, "wb") as file:
        file.write(gzip.compress(ROW + b'{"text": "'))
        for _ in range(num_bytes // (16 * MIB)):
            file.write(member)
        file.write(gzip.compress(b'"}\n' + END))


def zst_line(path: Path, num_bytes: int) -> None:
    import pyarrow

    with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as stream:
        stream.write(ROW + b'{"text": "')
        for _ in range(num_bytes // (16 * MIB)):
            stream.write(b"x" * (16 * MIB))
        stream.write(b'"}\n' + END)


def parquet_dictionary(path: Path, num_bytes: int) -> None:
    import pyarrow
    import pyarrow.parquet

    # One text of a MiB that every row refers to.
    text = pyarrow.array(["x" * MIB])
    rows = pyarrow.DictionaryArray.from_arrays([0] * (num_bytes // MIB), text)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), str(path), compression="zstd")


def parquet_row(path: Path, num_bytes: int) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["x" * num_bytes]})
    pyarrow.parquet.write_table(table, str(path), compression="zstd", use_dictionary=False)


def gz_rows(path: Path, num_bytes: int) -> None:
    """Write a .gz that is small enough for one block, with far more rows than fit into it."""
    member = gzip.compress((b'{"text": "' + b"x" * 1000 + b'"}\n') * 16384, 9)
    with open(path, "wb") as file:
        for _ in range(num_bytes // (16 * MIB)):
            file.write(member)


def sparse(path: Path, num_bytes: int) -> None:
    with open(path, "wb") as file:
        file.write(ROW)
        file.truncate(num_bytes)


BOMBS: dict[str, tuple[str, Callable[[Path, int], None], int]] = {
    "line in gz": ("a.jsonl.gz", gz_line, 20 * GIB),
    "line in zst": ("a.jsonl.zst", zst_line, 4 * GIB),
    "line in csv.gz": ("a.csv.gz", gz_line, 20 * GIB),
    "rows in gz": ("a.jsonl.gz", gz_rows, 1 * GIB),
    "rows in json.gz": ("a.json.gz", gz_rows, 1 * GIB),
    "text": ("a.txt", sparse, 200 * GIB),
    "dictionary": ("a.parquet", parquet_dictionary, 64 * GIB),
    "row of parquet": ("a.parquet", parquet_row, GIB // 4),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "write", "num_bytes"), BOMBS.values(), ids=BOMBS)
def test_a_shard_that_expands_far_is_one_line(
    name: str,
    write: Callable[[Path, int], None],
    num_bytes: int,
    baseline: Measured,
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    write(path, num_bytes)
    assert path.stat().st_size < 64 * MIB or name == "a.txt"

    ended = measure(["data", "inspect", str(path)])
    shown = ended.err + ended.out
    assert "Traceback" not in shown and "unexpected" not in shown, shown
    assert str(path) in shown
    assert (ended.code == 2 and len(ended.err.splitlines()) == 1) or ended.code == 0
    assert ended.seconds - baseline.seconds < 20, ended
    assert ended.peak_bytes - baseline.peak_bytes < 1.2 * GIB, ended


def test_a_long_row_is_skipped_and_the_others_are_read(baseline: Measured, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    gz_line(path, 512 * MIB)

    ended = measure(["data", "inspect", str(path)])
    assert ended.code == 0, ended
    assert "is longer than 64 MiB" in ended.out and "row 2" in ended.out
    assert ended.peak_bytes - baseline.peak_bytes < 300 * MIB, ended


CONFIGS: dict[str, str] = {
    "laughs": "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(20)
    ),
    "depth": "[" * 1_000_000,
    "blocks": "".join(" " * n + "a:\n" for n in range(1400)),
    "size": "a: 1\n" * 10_000_000,
    "numbers": "a: " + "9" * 1_000_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_expands_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    ended = measure(["check", str(path)])
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    assert len(ended.err.splitlines()) == 2 and ended.seconds < 15, ended
    assert ended.peak_bytes < GIB, ended


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"[" * 10_000_000, b'{"a":' * 5_000_000, b"[[],[" * 5_000_000])
def test_json_that_expands_is_one_line(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    (folder / "attempts").mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({"run": {"name": "mine"}}))
    (folder / "attempts" / "000001.json").write_bytes(content)
    (folder / "metrics.jsonl").write_bytes(json.dumps({"step": 1}).encode() + b"\n" + content)

    for arguments in (["runs", "show", str(folder)], ["runs", "watch", str(folder), "--once"]):
        ended = measure(arguments)
        assert "Traceback" not in ended.err and "unexpected" not in ended.err, ended
        assert ended.seconds < 15 and ended.peak_bytes < GIB, ended


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    """`dist-ft ... | head -1`, and a terminal without UTF-8: one line at most, no traceback."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "spalte_ü_日本": 1}\n')
    command = [sys.executable, "-m", "dist_ft.cli", "data", "inspect", str(path)]

    for encoding, shown in (("latin-1", b"spalte_\xfc_\\u65e5\\u672c"), ("ascii", b"spalte_")):
        environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        ended = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert ended.returncode == 0, ended
        assert shown in ended.stdout

    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert closed.returncode in (0, 1), closed
    assert b"Traceback" not in closed.stderr and b"Exception" not in closed.stderr, closed
    assert len(closed.stderr.splitlines()) <= 1


def limited(kind: int, amount: int) -> Callable[[], None]:
    import resource

    return lambda: resource.setrlimit(kind, (amount, amount))


def test_limits_of_the_machine_are_one_line(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "%s"}\n' % ("x" * 1000) * 20_000)
    out = tmp_path / "out"
    split: list[Any] = [
        sys.executable,
        "-m",
        "dist_ft.cli",
        "data",
        "split",
        str(path),
        "--out",
        str(out),
    ]

    # A file may have at most a MiB: writing fails as on a full disk (EFBIG).
    started = time.monotonic()
    ended = subprocess.run(
        split,
        preexec_fn=limited(resource.RLIMIT_FSIZE, MIB),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1, ended
    assert ended.stderr.startswith("dist-ft: ") and "File too large" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert time.monotonic() - started < 20, "not retried"
