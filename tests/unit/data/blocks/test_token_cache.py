"""The cache files: plain safetensors, checked, rebuilt when damaged, and limited in size."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unit.data.data_helpers import data_section

from dist_ft.data.block import Block, ShardRange
from dist_ft.data.blocks import token_cache as module
from dist_ft.data.blocks.token_cache import (
    cache_key,
    compute_fingerprint,
    evict,
    load_block,
    write_block,
)
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.encoding.encoded import EncodedRows
from dist_ft.data.sources.discovery import Shard

ENCODED = EncodedRows(
    np.arange(6, dtype=np.int32),
    np.array([0, 1, 1, 0, 1, 1], np.uint8),
    np.array([0, 2, 6]),
    "text",
    (1, 1),
    ("row 9: no",),
)
SHARD = Shard("s3://b/a.jsonl", "jsonl", 100, "v1")


def test_written_block_is_read_unchanged(tmp_path):
    write_block(tmp_path / "a.safetensors", ENCODED)
    found = load_block(tmp_path / "a.safetensors")
    for name in ("tokens", "targets", "offsets"):
        assert np.array_equal(getattr(found, name), getattr(ENCODED, name))
    assert (found.format, found.rows_per_range, found.bad_rows) == ("text", (1, 1), ("row 9: no",))


def test_file_is_plain_safetensors(tmp_path):
    from safetensors.numpy import load_file

    write_block(tmp_path / "a.safetensors", ENCODED)
    assert np.array_equal(load_file(tmp_path / "a.safetensors")["tokens"], ENCODED.tokens)


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body[: len(body) // 2],
        lambda body: b"",
        lambda body: b"\xff" * len(body),
        lambda body: body[:-3] + bytes([body[-3] ^ 1]) + body[-2:],
        lambda body: body[:9] + b"x" + body[10:],
        lambda body: body.replace(b"row 9", b"row 8"),
        lambda body: bytes(len(body)),
    ],
)
def test_damaged_file_is_removed(tmp_path, damage, caplog):
    path = tmp_path / "a.safetensors"
    write_block(path, ENCODED)
    path.write_bytes(damage(path.read_bytes()))
    assert load_block(path) is None and not path.exists()
    assert "the cached block is damaged" in caplog.text and "it is rebuilt" in caplog.text


@pytest.mark.parametrize("offsets", [[0, 10**30], [-8, 8], [8, 0], [True, 8], [0.0, 8.0], [0]])
def test_arrays_outside_the_file_are_damage(tmp_path, offsets):
    """Numpy would raise OverflowError for the first, which no reader of the cache expects."""
    path = tmp_path / "a.safetensors"
    write_block(path, ENCODED)
    body = path.read_bytes()
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    header["tokens"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body[8 + length :])
    assert load_block(path) is None


def write_blocks(folder, count=5):
    paths = [folder / f"{i}.safetensors" for i in range(count)]
    for age, path in enumerate(paths):
        write_block(path, ENCODED)
        os.utime(path, (1000 + age, 1000 + age))
    return paths


def test_least_recently_used_blocks_are_evicted_first(tmp_path):
    paths = write_blocks(tmp_path)
    load_block(paths[0])  # used just now
    assert evict(tmp_path, 2 * paths[0].stat().st_size) == 3
    assert [path.exists() for path in paths] == [True, False, False, False, True]


def test_writing_stays_within_the_limit(tmp_path):
    paths = write_blocks(tmp_path)
    size = paths[0].stat().st_size
    write_block(tmp_path / "new.safetensors", ENCODED, 3 * size)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * size
    assert (tmp_path / "new.safetensors").exists()


def test_fault_18_full_disk_evicts_blocks_and_retries(tmp_path, monkeypatch):
    paths, write = write_blocks(tmp_path), module._write_atomically
    calls = []

    def full_once(path, body):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, body)

    monkeypatch.setattr(module, "_write_atomically", full_once)
    write_block(tmp_path / "new.safetensors", ENCODED)
    assert load_block(tmp_path / "new.safetensors") is not None and not any(
        path.exists() for path in paths
    )
    monkeypatch.setattr(
        module,
        "_write_atomically",
        lambda path, body: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")),
    )
    (tmp_path / "new.safetensors").unlink()
    with pytest.raises(OSError, match="full"):
        write_block(tmp_path / "new.safetensors", ENCODED)


def test_fingerprint_depends_on_what_decides_tokens(tokenizer):
    base = compute_fingerprint(Encoder(tokenizer, data_section()))
    tokenizer("a b c", max_length=2, truncation=True)
    assert compute_fingerprint(Encoder(tokenizer, data_section())) == base, (
        "state left by a call does not belong to the tokenizer"
    )
    assert (
        compute_fingerprint(
            Encoder(tokenizer, data_section(shuffle=False, overlong="drop", block_mib=8))
        )
        == base
    )
    others = {
        compute_fingerprint(Encoder(tokenizer, data_section(**values)))
        for values in (
            {"targets": "all"},
            {"format": "chat"},
            {"fields": {"text": "t"}},
            {"prompt_template": "{prompt}"},
            {"system_prompt": "be brief"},
            {"bad_rows": "skip"},
        )
    }
    tokenizer.chat_template += " "
    others.add(compute_fingerprint(Encoder(tokenizer, data_section())))
    tokenizer.add_tokens(["<extra>"])
    others.add(compute_fingerprint(Encoder(tokenizer, data_section())))
    assert len(others | {base}) == 9


def test_cache_key_depends_on_shard_and_range():
    def name(shard=SHARD, start=0, stop=50):
        return cache_key("fp", Block(0, (ShardRange(0, start, stop, 50),)), [shard])

    names = {
        name(),
        name(replace(SHARD, version="v2")),
        name(replace(SHARD, size=1)),
        name(start=1),
        name(stop=51),
        cache_key("other", Block(0, (ShardRange(0, 0, 50, 50),)), [SHARD]),
    }
    assert len(names) == 6
    assert name() == cache_key("fp", Block(3, (ShardRange(0, 0, 50, 1),)), [SHARD]), (
        "source and estimated size do not decide the content"
    )


def test_fingerprint_depends_on_the_template_date(tokenizer, monkeypatch):
    plain = compute_fingerprint(Encoder(tokenizer, data_section()))
    dated = tokenizer.chat_template + "{{ strftime_now('%Y') }}"
    tokenizer.chat_template = dated
    before = compute_fingerprint(Encoder(tokenizer, data_section()))
    monkeypatch.setattr(module, "TEMPLATE_DATE", module.TEMPLATE_DATE.replace(year=1999))
    assert compute_fingerprint(Encoder(tokenizer, data_section())) != before
    tokenizer.chat_template = dated.removesuffix("{{ strftime_now('%Y') }}")
    assert compute_fingerprint(Encoder(tokenizer, data_section())) == plain, (
        "without a date in the template, the date does not matter"
    )


def test_file_whose_times_cannot_be_set_is_read(tmp_path, monkeypatch):
    write_block(tmp_path / "a.safetensors", ENCODED)
    monkeypatch.setattr(
        module.os, "utime", lambda path: (_ for _ in ()).throw(PermissionError(1, "not yours"))
    )
    assert load_block(tmp_path / "a.safetensors") is not None


def test_files_of_killed_writers_are_removed(tmp_path):
    """Those of 0.1.0 have no lock, so their age decides."""
    old, new = tmp_path / "a.tmp-17", tmp_path / "b.tmp-18"
    for path, age_s in ((old, 7200), (new, 60)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age_s,) * 2)
    write_block(tmp_path / "c.safetensors", ENCODED, 10**6)
    assert not old.exists() and new.exists()


def test_file_of_a_writer_is_removed_once_it_is_killed(tmp_path):
    """At once: a run that is started again right after a kill leaves nothing behind."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom dist_ft.core import scratch\n"
        "with scratch.new_file(Path(sys.argv[1], 'b.safetensors')) as new:\n"
        "    print(new.path, flush=True)\n    time.sleep(600)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    unfinished, lock = Path(writer.stdout.readline().strip()), tmp_path / "b.lock"
    lock.touch()
    write_block(tmp_path / "c.safetensors", ENCODED, 10**6)
    assert unfinished.exists() and not lock.exists()

    writer.kill()
    writer.wait()
    write_block(tmp_path / "d.safetensors", ENCODED, 10**6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "d.safetensors"]


def test_open_blocks_respect_the_limit_of_open_files(monkeypatch):
    limits = [1024, 4096]
    monkeypatch.setattr(module.resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(
        module.resource, "setrlimit", lambda kind, both: limits.__setitem__(slice(2), both)
    )
    assert module.max_open_blocks(100) == 100 and limits == [4096, 4096]
    assert module.max_open_blocks(5000) == 1024
    limits[:] = [module.resource.RLIM_INFINITY] * 2
    assert module.max_open_blocks(5000) == 5000 and limits[0] == module.resource.RLIM_INFINITY
