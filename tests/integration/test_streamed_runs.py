"""Runs over streamed data: exact resumes, one answer in every world, a history that is proved."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny

from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.runs.ledger_audit import audit, verify_shards
from dist_ft.runtime import local

STEPS = 14
ROWS = 6000
"""About 0.7 MB: a stream of 32 blocks for each of two lanes of 32 tokens needs half a megabyte."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny.base(tmp_path_factory.mktemp("streamed"))
    write_rows(base / "large", ROWS, seed=0)
    write_rows(base / "small", 60, seed=1)
    return base


def write_rows(folder: Path, count: int, seed: int) -> None:
    folder.mkdir()
    rng = random.Random(seed)
    for shard in range(3):
        lines = []
        for number in range(shard, count, 3):
            words = " ".join(rng.choices(tiny.WORDS, k=rng.randint(2, 30)))
            lines.append(json.dumps({"prompt": f"say {number}", "response": words}))
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")


def document(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Return a run of two lanes over a stream."""
    data = {"train": str(base / "large" / "*.jsonl"), "overlong": "truncate", "bad_rows": "skip"}
    checkpoint = {"every_steps": 4, "background": False}
    config = tiny.config(base, name, checkpoint=checkpoint, **changes)
    config["schedule"] = {**config["schedule"], "epochs": None, "steps": STEPS}
    config["data"] = {**config["data"], **data, **changes.get("data", {})}
    config["batch"] = {"global_batch": 4, "micro_batch": 2, "sequence_length": 32}
    config["evaluation"] = {}
    return config


@pytest.fixture(scope="module")
def unbroken(base: Path) -> Path:
    local.run(load_config(document(base, "unbroken")))
    return base / "runs/unbroken"


def test_the_run_streams_and_says_so(base: Path, unbroken: Path, capsys: Any) -> None:
    config = document(base, "shown")
    config["schedule"]["steps"] = 3
    local.run(load_config(config))
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"data streamed, 0\.00 GB in \d+ blocks", text)
    stored = sorted(path.name for path in (unbroken / "data").iterdir())
    assert stored == ["data.train.stream.arrow", "data.train.stream.json"]


@pytest.mark.parametrize("step", [3, 9])
def test_promise_2_a_killed_run_resumes_bit_exact(base: Path, unbroken: Path, step: int) -> None:
    config = document(base, f"killed-{step}")
    folder = base / f"killed-{step}-ranks"
    codes = ranks.run_ranks(1, [config], folder, env={"DIST_FT_FAILPOINT": f"train.step:{step}"})
    assert codes == [-9]

    local.run(load_config(config))
    run = base / f"runs/killed-{step}"
    assert history.losses(run) == history.losses(unbroken)
    assert history.ledger(run).tolist() == history.ledger(unbroken).tolist()
    found = audit(str(run))
    assert found.is_sound and found.attempts == 2


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_promise_7_two_ranks_read_the_same_samples(base: Path, unbroken: Path, stage: int) -> None:
    name = f"two-{stage}"
    config = document(base, name, workers=2, stage=stage)
    folder = base / f"{name}-ranks"
    ranks.require_ok(ranks.run_ranks(2, [config], folder), folder)
    history.require_same(base / "runs" / name, unbroken)


def test_promise_3_a_streamed_run_resumes_in_another_world(base: Path, unbroken: Path) -> None:
    config = document(base, "moved", workers=2)
    folder = base / "moved-ranks"
    codes = ranks.run_ranks(2, [config], folder, env={"DIST_FT_FAILPOINT": "train.step:7"})
    assert -9 in codes
    config["cluster"]["workers"] = 0
    local.run(load_config(config))
    history.require_same(base / "runs/moved", unbroken)


def test_a_mixture_of_a_stream_and_an_indexed_source(base: Path) -> None:
    sources = [
        {"path": str(base / "large" / "*.jsonl"), "name": "large", "weight": 3},
        {"path": str(base / "small" / "*.jsonl"), "name": "small", "weight": 1},
    ]
    config = document(base, "mixed", data={"train": sources})
    folder = base / "mixed-ranks"
    codes = ranks.run_ranks(1, [config], folder, env={"DIST_FT_FAILPOINT": "train.step:9"})
    assert codes == [-9]
    local.run(load_config(config))

    whole = document(base, "mixed-unbroken", data={"train": sources})
    local.run(load_config(whole))
    run, other = base / "runs/mixed", base / "runs/mixed-unbroken"
    assert history.losses(run) == history.losses(other)
    assert history.ledger(run).tolist() == history.ledger(other).tolist()
    found = audit(str(run))
    assert found.is_sound
    assert {count.source for count in found.epochs} == {"large", "small"}
    # the small source was passed by all lanes, and each of its rows came once
    first = next(count for count in found.epochs if count.source == "small")
    assert (first.num_segments, first.num_seen) == (60, first.num_seen)


def test_an_order_is_kept(base: Path, unbroken: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.order=indexed: the run started streamed"):
        local.run(load_config(document(base, "unbroken", data={"order": "indexed"})))
    local.run(load_config(document(base, "indexed", data={"order": "indexed"})))
    assert (base / "runs/indexed/data/data.train.json").exists()
    with pytest.raises(ConfigError, match=r"data\.order=streamed: the run started indexed"):
        local.run(load_config(document(base, "indexed", data={"order": "streamed"})))


def test_what_needs_the_index_is_refused_by_name(base: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            document(
                base, "refused", data={"order": "streamed", "overlong": "error", "shuffle": False}
            )
        )
    text = str(caught.value)
    assert "data.order=streamed: cannot be used with data.overlong=error" in text
    assert "data.shuffle=false" in text


def interrupted(base: Path, name: str) -> dict[str, Any]:
    """Return the config of a run that was killed after a checkpoint."""
    config = document(base, name)
    folder = base / f"{name}-ranks"
    codes = ranks.run_ranks(1, [config], folder, env={"DIST_FT_FAILPOINT": "train.step:6"})
    assert codes == [-9]
    return config


def test_a_lost_description_is_made_again(base: Path, unbroken: Path) -> None:
    config = interrupted(base, "lost")
    (base / "runs/lost/data/data.train.stream.json").unlink()
    local.run(load_config(config))
    assert history.losses(base / "runs/lost") == history.losses(unbroken)


def test_a_lost_description_with_other_data_is_refused(base: Path) -> None:
    config = interrupted(base, "changed")
    data = base / "runs/changed/data"
    shutil.rmtree(data)
    other = base / "other"
    write_rows(other, ROWS + 900, seed=9)
    config["data"]["train"] = str(other / "*.jsonl")
    stored = base / "runs/changed/run.yaml"
    stored.write_text(stored.read_text().replace(str(base / "large"), str(other)))
    with pytest.raises(DataError, match="other rows come than the run was trained on"):
        local.run(load_config(config))


def test_a_shard_that_changes_is_named(base: Path) -> None:
    folder = base / "changing"
    write_rows(folder, ROWS, seed=3)
    config = document(base, "changing", data={"train": str(folder / "*.jsonl")})
    assert ranks.run_ranks(
        1, [config], base / "changing-ranks", env={"DIST_FT_FAILPOINT": "train.step:6"}
    ) == [-9]
    shutil.rmtree(base / "cache", ignore_errors=True)
    config["data"]["cache_dir"] = str(base / "empty-cache")
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("the", "The"))
    with pytest.raises(DataError, match=r"changing/part-\d\.jsonl: the shard changed after"):
        local.run(load_config(config))
    with pytest.raises(DataError):
        (folder / "part-0.jsonl").unlink()
        verify_shards(str(base / "runs/changing"))


def test_too_many_bad_rows_end_the_run(base: Path) -> None:
    folder = base / "bad"
    write_rows(folder, ROWS, seed=4)
    for path in folder.iterdir():
        lines = path.read_text().splitlines()
        lines[::5] = ["{broken"] * len(lines[::5])
        path.write_text("\n".join(lines) + "\n")
    data = {"train": str(folder / "*.jsonl"), "max_bad_rows": 10}
    with pytest.raises(
        DataError, match=r"data.max_bad_rows=10: \d+ rows so far cannot be used"
    ) as e:
        local.run(load_config(document(base, "bad", data=data)))
    assert re.search(r"part-\d\.jsonl row \d+: is not JSON", str(e.value))
    with pytest.raises(DataError, match=r"data.max_bad_rows=10"):
        config = document(base, "bad-two", workers=2, data=data)
        folder = base / "bad-two-ranks"
        codes = ranks.run_ranks(2, [config], folder, timeout_s=120)
        assert 0 not in codes
        raise DataError((folder / "rank-0.log").read_text())
