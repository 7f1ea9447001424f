"""Promise 7, one answer, and promise 3, any to any: on real rank processes, with dropout, packed, uneven lanes."""

from __future__ import annotations

import shutil
from pathlib import Path

import history
import pytest
import ranks
import tiny

from dist_ft.config.load import load_config
from dist_ft.runtime import local

STEPS = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("one-answer"))


@pytest.fixture(scope="module")
def plain(base: Path) -> list[float]:
    """The losses of the plain engine, which is the reference."""
    document = tiny.config(base, "plain")
    local.run(load_config(document))
    history.require_exactly_once(base / "runs/plain", document)
    return history.losses(base / "runs/plain")


def worst(losses: list[float], reference: list[float]) -> float:
    assert len(losses) == len(reference)
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_promise_7_every_stage_and_world_matches_the_plain_engine(
    base: Path, plain: list[float], workers: int
) -> None:
    documents = [
        tiny.config(base, f"w{workers}-z{stage}", workers=workers, stage=stage)
        for stage in (0, 1, 2, 3)
    ]
    folder = base / f"ranks-{workers}"
    ranks.require_ok(ranks.run_ranks(workers, documents, folder), folder)
    assert len(plain) >= STEPS
    for document in documents:
        run = base / "runs" / document["run"]["name"]
        assert worst(history.losses(run), plain) <= 1e-5, document["run"]["name"]
        history.require_exactly_once(run, document)


@pytest.fixture(scope="module")
def stopped(base: Path) -> Path:
    """A run of ZeRO-3 on two workers, both killed (-9) in step 11; its latest checkpoint is step 8."""
    folder = base / "ranks-stopped"
    document = tiny.config(base, "stopped", workers=2)
    codes = ranks.run_ranks(2, [document], folder, env={"DIST_FT_FAILPOINT": "train.step:11"})
    assert codes == [-9, -9], (folder / "rank-0.log").read_text()[-2000:]
    return base / "runs/stopped"


@pytest.mark.parametrize(("workers", "stage"), [(2, 3), (1, 1), (3, 2), (0, 0), (2, 0)])
def test_promise_3_a_checkpoint_resumes_in_any_world_under_any_stage(
    base: Path, plain: list[float], stopped: Path, workers: int, stage: int
) -> None:
    name = f"from-stopped-w{workers}-z{stage}"
    run = base / "runs" / name
    shutil.copytree(stopped, run)
    document = tiny.config(base, name, workers=workers, stage=stage)
    folder = base / f"ranks-{name}"
    ranks.require_ok(ranks.run_ranks(max(1, workers), [document], folder), folder)
    assert "resuming from step 8" in (folder / "rank-0.log").read_text()
    assert worst(history.losses(run), plain) <= 1e-5
    history.require_exactly_once(run, document)


def test_promise_2_resuming_in_the_same_world_is_bit_exact(base: Path, plain: list[float]) -> None:
    """Uses the runs the tests above left: the unbroken one of this shape and the killed and resumed one."""
    broken, unbroken = base / "runs/from-stopped-w2-z3", base / "runs/w2-z3"
    if not (broken.exists() and unbroken.exists()):
        pytest.skip("needs the runs of the other tests of this module; run the module whole")
    assert history.losses(broken) == history.losses(unbroken)
    assert weights(broken) == weights(unbroken)


def weights(run: Path) -> list[tuple[str, str]]:
    """Return (file, checksum) of the last checkpoint."""
    from dist_ft.checkpoint import discovery
    from dist_ft.storage.filesystem import Store

    store = Store(str(run))
    manifest = discovery.load_manifest(store, discovery.list_committed(store)[0])
    return [(item.path, item.checksum) for item in manifest.files]
