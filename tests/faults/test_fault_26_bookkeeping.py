"""Fault 26: a file or folder of a run is lost or damaged, between starts and under a running run.

Each loss is recovered from, with the same weights at the end, or refused in one line. No run and no
export goes back to an earlier checkpoint without a word, and no attempt number comes again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import re
import shutil
import signal
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_tasks
from bookkeeping import ROWS

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.export import export_run
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config.load import load_config
from dist_ft.core import logs
from dist_ft.core.errors import DistFtError, Interrupted
from dist_ft.core.world import Collectives, World
from dist_ft.runs import catalog, model_card, report
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store
from dist_ft.training.callbacks import Callback, CallbackList
from dist_ft.training.console import Console
from dist_ft.training.run_context import RunContext

NAME, STEPS, STOPPED = "sequence-classification-run", 20, 14
QUICK = (
    "attempts removed",
    "attempt record torn",
    "ledger removed",
    "data removed",
    "model removed",
    "frozen removed",
    "config removed",
    "checkpoints removed",
)
"""Rows of the CI tier; the others are slow."""
SLOW = [pytest.param(row, marks=pytest.mark.slow) for row in ROWS if row not in QUICK]


class StopAt(Callback):
    """Requests a stop, so that the run ends after `step` steps; 0: never."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0

    def on_step_end(self, step: int, loss: float) -> None:
        self.done = step

    def is_due(self) -> bool:
        return bool(self.step) and self.done >= self.step - 1


@cache
def template(base: Path) -> dict[str, Any]:
    """Return a run that stores all there is: labels, frozen weights, evaluations."""
    found = tiny_tasks.config(
        base,
        "sequence_classification",
        "run",
        tuning={"method": "lora"},
        schedule={"epochs": None, "steps": STEPS},
        checkpoint={"every_steps": 6, "keep_last": 9},
    )
    found["evaluation"]["every_steps"] = 5
    return found


def document(base: Path, storage: Path) -> dict[str, Any]:
    """Return the run below `storage`."""
    # A copy: writing the data again would change its modification time.
    found = copy.deepcopy(template(base))
    found["run"]["storage"] = str(storage)
    return found


def go(content: dict[str, Any], stop_at: int = 0) -> None:
    stop = StopAt(stop_at)
    context = RunContext(
        console=Console(io.StringIO()), callbacks=CallbackList([stop]), should_stop=stop.is_due
    )
    with contextlib.suppress(Interrupted):
        local.run(load_config(content), context)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.base(tmp_path_factory.mktemp("bookkeeping"))


@pytest.fixture(scope="module")
def unbroken(base: Path) -> dict[str, bytes]:
    """The weights of the run that lost nothing."""
    content = document(base, base / "unbroken")
    go(content)
    return weights(base / "unbroken" / NAME)


@pytest.fixture(scope="module")
def stopped(base: Path) -> Path:
    """The storage of a run that its second attempt left at step 14."""
    content = document(base, base / "stopped")
    go(content, stop_at=8)
    go(content, stop_at=STOPPED)
    assert names(base / "stopped" / NAME) == [
        "step-000000014-a0002",
        "step-000000012-a0002",
        "step-000000008-a0001",
        "step-000000006-a0001",
    ]
    return base / "stopped"


def names(run: Path) -> list[str]:
    return discovery.list_committed(Store(str(run)))


def latest(run: Path) -> Manifest:
    found = discovery.find_latest(Store(str(run)), World(), Collectives())
    assert found is not None
    return found


def weights(run: Path) -> dict[str, bytes]:
    """Return the weights of the last step."""
    manifest = latest(run)
    assert manifest.progress.step == STEPS
    reader = discovery.open_reader(Store(str(run)), manifest)
    pairs = reader.keys()
    keys = dict(sorted(pair for pair in pairs if pair[1] in ("frozen", "param")))
    return {
        name: reader.read(name, keys[name], 0, math.prod(info.shape)).tobytes()
        for name, info in manifest.tensors.items()
    }


def require_one_line(error: BaseException, pattern: str) -> None:
    """Fail unless an error of ours names what is wrong, once."""
    assert pattern and re.search(pattern, str(error)), f"{type(error).__name__}: {error}"
    assert isinstance(error, DistFtError) and "unexpected" not in str(error)


def try_export(run: Path, out: Path) -> int:
    """Export a run with its model card; return the step."""
    steps: list[int] = []

    def finish(folder: Path, manifest: Manifest) -> None:
        steps.append(manifest.progress.step)
        model_card.render(Store(str(run)), manifest, folder, None)

    export_run(str(run), str(out), finish=finish)
    return steps[0]


def names_a_loss(logged: str) -> bool:
    """Return whether a log says why an earlier checkpoint is used."""
    return (
        "the checkpoint of step 14 was committed and is missing; the latest there is" in logged
        or "checkpoint step-000000014-a0002 is skipped" in logged
    )


@pytest.mark.parametrize("row", [*QUICK, *SLOW])
def test_fault_26_between_starts(
    base: Path,
    unbroken: dict[str, bytes],
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: str,
) -> None:
    logs.setup_logging()  # to this test's stderr
    storage = shutil.copytree(stopped, tmp_path / "runs")
    run, outcome = storage / NAME, ROWS[row]
    outcome.damage(run)

    # An export shows the state that is lost; it never is an earlier one without a word.
    try:
        step = try_export(run, tmp_path / "out")
    except DistFtError as error:
        require_one_line(error, outcome.export)
    else:
        assert not outcome.export
        assert step == STOPPED or (step == 12 and names_a_loss(capsys.readouterr().err))

    # Looking at the run does not fail unexpectedly.
    if not row.startswith("config"):
        assert "step-000000006-a0001" in catalog.describe(str(run)) or row == "checkpoints removed"
        with contextlib.suppress(DistFtError):
            report.gather(str(run))

    capsys.readouterr()
    try:
        go(document(base, storage))
    except DistFtError as error:
        require_one_line(error, outcome.start)
        return

    assert not outcome.start
    assert weights(run) == unbroken
    assert latest(run).attempt == 3, "no number comes again"
    if row in ("latest checkpoint removed", "latest manifest torn"):
        assert names_a_loss(capsys.readouterr().err)
    else:
        assert names(run)[1:3] == ["step-000000018-a0003", "step-000000014-a0002"]

    # And what was lost is back.
    assert try_export(run, tmp_path / "after") == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].running is not None])
def test_fault_26_under_a_running_run(
    base: Path, unbroken: dict[str, bytes], tmp_path: Path, row: str
) -> None:
    """A real process stops itself at step 9, loses the file, and continues."""
    content, outcome = document(base, tmp_path / "runs"), ROWS[row]
    content["checkpoint"]["background"] = False  # so that step 6 is committed when it stops
    run = tmp_path / "runs" / NAME
    failpoint = {"DIST_FT_FAILPOINT": "train.step:9!sleep2+stop"}
    (process,) = ranks.start_ranks(1, [content], tmp_path / "rank", failpoint)
    try:
        wait_until_stopped(process.pid)
        assert names(run) == ["step-000000006-a0001"]
        outcome.damage(run)
        process.send_signal(signal.SIGCONT)
        code = process.wait(120)
    finally:
        process.kill()

    log = (tmp_path / "rank" / "rank-0.log").read_text()
    if outcome.running:
        assert code == 1 and re.search(outcome.running, log.strip().splitlines()[-1]), log[-3000:]
        return

    assert code == 0, log[-3000:]
    assert weights(run) == unbroken
    assert latest(run).attempt == 1 and try_export(run, tmp_path / "out") == STEPS
    go(document(base, tmp_path / "runs"))  # it is complete, and whole
    assert latest(run).progress.step == STEPS


def wait_until_stopped(pid: int) -> None:
    """Wait until a process has stopped itself."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            return
        assert state not in "ZX", "the process ended"
        time.sleep(0.05)
    raise AssertionError("the process does not reach step 9")


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpoint", [{}, {"every_steps": 0}, {"every_steps": 0, "at_end": False}]
)
def test_finding_6_a_run_whose_folder_is_removed_ends_with_an_error(
    base: Path, tmp_path: Path, checkpoint: dict[str, Any]
) -> None:
    """Not with exit code 0 and the advice to export what is gone."""
    content = document(base, tmp_path / "runs")
    content["checkpoint"] |= checkpoint
    failpoint = {"DIST_FT_FAILPOINT": "train.step:9!sleep2+stop"}
    (process,) = ranks.start_ranks(1, [content], tmp_path / "rank", failpoint)
    try:
        wait_until_stopped(process.pid)
        shutil.rmtree(tmp_path / "runs" / NAME)
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 1
    finally:
        process.kill()
    log = (tmp_path / "rank" / "rank-0.log").read_text()
    assert "the run's folder was removed while the run trains" in log.strip().splitlines()[-1]
    assert "dist-ft export" not in log


def test_fault_26_a_complete_run_gets_back_what_it_lost(base: Path, tmp_path: Path) -> None:
    """The same command again restores it, although nothing is left to train."""
    storage = tmp_path / "runs"
    go(document(base, storage))
    run = storage / NAME
    for lost in ("model", "run.yaml"):
        before = weights(run)
        Store(str(run)).remove(lost)
        with pytest.raises(DistFtError):
            try_export(run, tmp_path / "x")
        go(document(base, storage))
        assert try_export(run, tmp_path / lost) == STEPS and weights(run) == before


@pytest.mark.slow
def test_fault_26_an_index_of_other_data_is_refused(
    base: Path, stopped: Path, tmp_path: Path
) -> None:
    """The index is lost, and a row of the data has changed since."""
    storage = shutil.copytree(stopped, tmp_path / "runs")
    content = document(base, storage)
    rows = sorted(Path(content["data"]["train"]).parent.glob("*.jsonl"))
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in rows:
        lines = shard.read_text().splitlines(keepends=True)
        (folder / shard.name).write_text("".join(lines[1:]))
    content["data"]["train"] = f"{folder}/*.jsonl"
    Store(str(storage / NAME)).remove("data")
    config = storage / NAME / "run.yaml"
    before, after = template(base)["data"]["train"], content["data"]["train"]
    config.write_text(config.read_text().replace(before, after))
    with pytest.raises(DistFtError, match=r"the run's index was lost, .* the data has changed"):
        go(content)


@pytest.mark.slow
def test_fault_26_early_stopping_needs_the_evaluations(base: Path, tmp_path: Path) -> None:
    """Without them the run would train on where it ended."""
    content = document(base, tmp_path / "runs")
    content["evaluation"] |= {"patience": 2}
    go(content, stop_at=STOPPED)
    store = Store(str(tmp_path / "runs" / NAME))
    store.remove("metrics.jsonl")
    for _ in range(2):
        with pytest.raises(
            DistFtError,
            match=r"metrics.jsonl: the file is missing or empty, and evaluation.patience=2 needs",
        ):
            go(content)
        store.write("metrics.jsonl", b"")
