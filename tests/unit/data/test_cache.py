"""The token cache: made once, checked, rebuilt."""

import os

import numpy as np
import pytest
from unit.data.data_helpers import chat, data_section

from dist_ft.data import cache as module
from dist_ft.data.cache import TokenCache, fingerprint
from dist_ft.errors import DataError, StorageError
from dist_ft.world import World

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(10)]


def same(a, b):
    return a.format == b.format and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "offsets"))


def test_made_once_then_read(make, monkeypatch):
    shards, cache = make(ROWS)
    first = cache.shard(shards[0])
    assert len(first.offsets) == 8 and first.tokens.dtype == np.int32
    assert first is cache.shard(shards[0])
    monkeypatch.setattr(module, "read_rows", lambda shard: pytest.fail("read again"))
    assert same(first, TokenCache(cache.folder, cache.encoder).shard(shards[0]))


def test_file_is_plain_safetensors(make):
    from safetensors.numpy import load_file

    shards, cache = make(ROWS)
    made = cache.shard(shards[0])
    assert np.array_equal(load_file(cache.path(shards[0]))["tokens"], made.tokens)


@pytest.mark.parametrize("damage", [
    lambda body: body[: len(body) // 2],
    lambda body: b"",
    lambda body: b"\xff" * len(body),
    lambda body: body[:-3] + bytes([body[-3] ^ 1]) + body[-2:],
    lambda body: body[:9] + b"x" + body[10:],
    lambda body: bytes(len(body)),
])
def test_damaged_file_is_made_again(make, damage, caplog):
    shards, cache = make(ROWS)
    made = cache.shard(shards[0])
    path = cache.path(shards[0])
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(whole))
    again = TokenCache(cache.folder, cache.encoder).shard(shards[0])
    assert same(made, again) and len(path.read_bytes()) == len(whole)
    assert "the cached shard is damaged" in caplog.text


def test_evicted_shards_come_back(make, monkeypatch):
    monkeypatch.setattr(module, "OPEN_SHARDS", 1)
    shards, cache = make(ROWS, rows_per_shard=2)
    before = [cache.shard(shard) for shard in shards]
    assert all(same(one, cache.shard(shard)) for one, shard in zip(before, shards, strict=True))


def test_bad_row_leaves_nothing_behind(make):
    shards, cache = make([*ROWS[:3], chat("a", "")])
    with pytest.raises(DataError, match=r"train-00000-of-00001.jsonl row 4: messages\[1\].content is empty"):
        cache.shard(shards[0])
    assert [name for name in os.listdir(cache.folder) if not name.endswith(".lock")] == []


def test_unwritable_folder(make, tmp_path):
    shards, cache = make(ROWS)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data.cache_dir=.*file: can not be used .*; name another"):
        TokenCache(tmp_path / "file", cache.encoder).shard(shards[0])


def test_prepare_shares_the_work_of_a_machine(make):
    shards, cache = make(ROWS, rows_per_shard=2)
    for rank in range(2):
        TokenCache(cache.folder, cache.encoder).prepare(shards, World(rank, 2, rank, 2))
        done = sum(cache.path(shard).exists() for shard in shards)
        assert done == (3, 5)[rank]


def test_fingerprint_follows_what_matters(tokenizer):
    base = fingerprint(tokenizer, data_section())
    tokenizer("a b c", max_length=2, truncation=True)
    assert fingerprint(tokenizer, data_section()) == base, "state of a call is no property of the tokenizer"
    assert fingerprint(tokenizer, data_section(shuffle=False, overlong="drop", packing_window=8)) == base
    others = {fingerprint(tokenizer, data_section(**values)) for values in (
        {"targets": "all"}, {"format": "chat"}, {"fields": {"text": "t"}}, {"prompt_template": "{prompt}"})}
    tokenizer.chat_template += " "
    others.add(fingerprint(tokenizer, data_section()))
    tokenizer.add_tokens(["<extra>"])
    others.add(fingerprint(tokenizer, data_section()))
    assert len(others | {base}) == 7


def test_key_follows_the_shard(make):
    from dataclasses import replace

    shards, cache = make(ROWS)
    paths = {cache.path(shards[0]), cache.path(replace(shards[0], version="2")), cache.path(replace(shards[0], size=1))}
    assert len(paths) == 3
