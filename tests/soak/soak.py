"""Kills a run repeatedly at random moments and checks that nothing was lost.

    python tests/soak/soak.py --mode ranks --kills 160   # two ranks without Ray
    python tests/soak/soak.py --mode ray --kills 40      # under Ray
    python tests/soak/soak.py --report                   # print the results in the journal

Without Ray the ranks are killed with -9: at random, inside a save, or where a bookkeeping file is
written or removed. Under Ray the training processes, their keepers, the Ray workers and the driver
are killed, at random or at such a file.

Each run trains a small model with dropout and packing, and saves in the background every four
steps. After every kill all checkpoints are compared with their checksums. At the end of a run its
losses must equal those of an undisturbed run to the last bit, and the ledger must hold every sample
once. Each event is a line of the journal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
FAILPOINTS = (
    "checkpoint.before_file",
    "checkpoint.after_file",
    "checkpoint.before_manifest",
    "checkpoint.after_manifest",
)
FIRST_START = ("write.run.yaml", "write.model", "write.data", "write.attempts")
"""Storage calls at which the first start of a run is killed (see `Store._call`)."""
BOOKKEEPING = (
    "write.attempts",
    "write.ledger",
    "write.metrics.jsonl",
    "write.time",
    "write.manifest.json",
    "remove.checkpoints",
    "remove.ledger",
)
"""Storage calls at which any start is killed."""
MARK = "DIST_FT_SOAK"
"""Marks all processes of the run: keepers and their processes are no children of the driver."""
RUNTIME_MODULES = {"worker_process": "process", "process_keeper": "keeper"}
"""Kind of victim by module."""
CHECKPOINT_WAIT_S = 120.0
STEPS = {"ranks": 240, "ray": 300}


def main() -> None:
    """Run the soak test, or print the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--mode", choices=["ranks", "ray"], default="ranks")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--seed", type=int, default=None, help="default: from the clock; the journal contains it"
    )
    parser.add_argument(
        "--minutes", type=float, default=14, help="start no further run after this time"
    )
    parser.add_argument("--journal", default=str(HERE / "journal.jsonl"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    journal = Journal(Path(args.journal))
    if not args.report:
        os.environ.update(
            OMP_NUM_THREADS="1",
            DS_ACCELERATOR="cpu",
            PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
        )
        os.environ.pop("RAY_ADDRESS", None)
        soak(args, journal)
    journal.report()


class Journal:
    """The kills and the results of all runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **values: Any) -> None:
        """Append a line."""
        line = {"at": datetime.now(timezone.utc).isoformat(timespec="seconds"), **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def report(self) -> None:
        """Print the totals; exit 1 if any check failed."""
        lines = (
            [json.loads(line) for line in self.path.read_text().splitlines()]
            if self.path.exists()
            else []
        )
        kills = [line for line in lines if line["what"] == "kill"]
        ends = [line for line in lines if line["what"] == "end"]
        ended = {(line["mode"], line["seed"], line["number"]) for line in ends}
        for mode in ("ranks", "ray"):
            of_mode = [line for line in kills if line["mode"] == mode]
            counts = Counter(line["victim"].split(":")[0] for line in of_mode)
            in_ended = sum((mode, line["seed"], line["number"]) in ended for line in of_mode)
            print(
                f"{mode}: {len(of_mode)} kills, {in_ended} of them in runs followed to their end: "
                f"{dict(counts)}"
            )
        bad = [line for line in lines if line["what"] == "failed" or not line.get("sound", True)]
        print(
            f"finished runs: {len(ends)}; bit-equal to the undisturbed run with every sample once: "
            f"{sum(line['equal'] and line['once'] for line in ends)}; checkpoints verified: "
            f"{sum(line['checkpoints'] for line in kills)}; corrupt or failed: {len(bad)}"
        )
        if bad or not all(line["equal"] and line["once"] for line in ends):
            raise SystemExit(1)


def soak(args: argparse.Namespace, journal: Journal) -> None:
    """Kill processes until there were enough kills; the last run continues to its end."""
    import history
    import tiny

    seed = args.seed if args.seed is not None else time.time_ns() % 2**32
    rng, started_at, kills, number = random.Random(seed), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="dist_ft-soak-") as name:
        base = tiny.base(Path(name))
        document = config(base, "unbroken", args.mode)
        run_undisturbed(base, document)
        expected = history.losses(base / "runs/unbroken")
        while kills < args.kills and time.monotonic() - started_at < 60 * args.minutes:
            number += 1
            document = config(base, f"soak-{number}", args.mode)
            labels = {"mode": args.mode, "seed": seed, "number": number}
            done = (run_with_ranks if args.mode == "ranks" else run_with_ray)(
                base, document, rng, args.kills - kills, labels, journal
            )
            kills += done
            run = base / "runs" / document["run"]["name"]
            once = True
            try:
                history.require_exactly_once(run, document)
            except AssertionError:
                once = False
            journal.add(
                what="end", kills=done, equal=history.losses(run) == expected, once=once, **labels
            )
            print(f"run {number}: {done} kills, {kills} of {args.kills}", flush=True)


def config(base: Path, name: str, mode: str) -> dict[str, Any]:
    """Return the document of a run."""
    import tiny

    return tiny.config(
        base,
        name,
        workers=2,
        schedule={"epochs": None, "steps": STEPS[mode]},
        cluster={"max_failures": -1},
        log={"level": "warning"},
    )


def run_undisturbed(base: Path, document: dict[str, Any]) -> None:
    """Run the reference for all others: two ranks, no kill."""
    import ranks

    ranks.require_ok(ranks.run_ranks(2, [document], base / "unbroken"), base / "unbroken")


def draw_failpoint(rng: random.Random, *, is_first_start: bool) -> str:
    """Return where to kill a process of the next start; "" for a random moment."""
    if is_first_start and rng.random() < 0.5:
        return f"storage.{rng.choice(('before', 'after'))}_{rng.choice(FIRST_START)}"

    kind = rng.choices(["save", "bookkeeping", "publish", ""], [3, 3, 1, 4])[0]
    if kind == "save":
        return f"{rng.choice(FAILPOINTS)}:{rng.randint(1, 6)}@{rng.randint(0, 1)}"
    if kind == "bookkeeping":
        moment, place = rng.choice(("before", "after")), rng.choice(BOOKKEEPING)
        return f"storage.{moment}_{place}:{rng.randint(1, 3)}"
    if kind == "publish":
        # between the hidden file and its rename
        return f"storage.before_publish:{rng.randint(1, 40)}"
    return ""


def describe_failpoint(failpoint: str) -> str:
    """Return a failpoint for the journal, preceded by its kind."""
    if not failpoint:
        return ""
    kind = "save" if failpoint.startswith("checkpoint.") else "bookkeeping"
    return f"{kind}:{failpoint}"


def verify_checkpoints(run: Path, journal: Journal, **values: Any) -> None:
    """Verify all checkpoints, and add the kill to the journal."""
    from dist_ft.checkpoint import discovery
    from dist_ft.config.load import STORED
    from dist_ft.runs import catalog
    from dist_ft.storage.filesystem import Store

    if not Store(str(run)).exists(STORED):
        return journal.add(what="kill", checkpoints=0, sound=True, step=0, **values)
    found = list(catalog.verify(str(run)))
    # Under Ray the run continues, and may have removed old checkpoints meanwhile.
    existing = discovery.list_committed(Store(str(run)))
    problems = [f"{name}: {problem}" for name, problem in found if problem and name in existing]
    latest = int(found[0][0].split("-")[1]) if found else 0
    return journal.add(
        what="kill",
        checkpoints=len(found),
        sound=not problems,
        step=latest,
        **values,
        **({"problems": problems} if problems else {}),
    )


def run_with_ranks(
    base: Path,
    document: dict[str, Any],
    rng: random.Random,
    max_kills: int,
    labels: dict[str, Any],
    journal: Journal,
) -> int:
    """Run to the end with kills of two ranks; return the number of kills."""
    import ranks

    run, folder = base / "runs" / document["run"]["name"], base / document["run"]["name"]
    for kills in range(10**6):
        failpoint = draw_failpoint(rng, is_first_start=not run.exists())
        processes = ranks.start_ranks(
            2, [document], folder, {"DIST_FT_FAILPOINT": failpoint} if failpoint else {}
        )
        victims = rng.choice([[0], [1], [0, 1]])
        until = time.monotonic() + (
            rng.uniform(1.0, 7.0) if kills < max_kills and not failpoint else 120
        )
        while all(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(0.01)
        codes = [process.poll() for process in processes]
        if codes == [None, None] and not failpoint and kills < max_kills:
            for victim in victims:
                processes[victim].kill()
        codes = ranks.wait_for_death(processes)
        if -9 not in codes:
            if codes != [0, 0]:
                journal.add(
                    what="failed",
                    codes=codes,
                    log=(folder / "rank-0.log").read_text()[-2000:],
                    **labels,
                )
                raise SystemExit(f"ranks ended with {codes}")
            return kills
        verify_checkpoints(
            run, journal, victim=describe_failpoint(failpoint) or f"rank:{victims}", **labels
        )
    raise AssertionError("unreachable")


def run_with_ray(
    base: Path,
    document: dict[str, Any],
    rng: random.Random,
    max_kills: int,
    labels: dict[str, Any],
    journal: Journal,
) -> int:
    """Run to the end under Ray with kills of its processes; return the number of kills."""
    import psutil
    import yaml

    run, kills = base / "runs" / document["run"]["name"], 0
    path = base / "ray.yaml"
    path.write_text(yaml.safe_dump(document))
    log = base / "ray.log"
    for start in range(10**6):
        failpoint = draw_failpoint(rng, is_first_start=not run.exists())
        # A failpoint kills once, although each new process of the run inherits it.
        marker = base / f"{document['run']['name']}-{start}.failed"
        variables = {"DIST_FT_FAILPOINT": failpoint, "DIST_FT_FAILPOINT_ONCE": str(marker)}
        with open(log, "ab") as output:
            driver = subprocess.Popen(
                [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
                cwd=base,
                stdout=output,
                stderr=output,
                env={**os.environ, MARK: base.name, **(variables if failpoint else {})},
            )
        is_counted = False
        while driver.poll() is None:
            if marker.exists() and not is_counted:
                kills, is_counted = kills + 1, True
                verify_checkpoints(run, journal, victim=describe_failpoint(failpoint), **labels)
            if rng.random() < 0.85:  # else the kill may come during recovery
                wait_for_checkpoint(run, driver)
            until = time.monotonic() + rng.uniform(0.5, 10.0)
            while driver.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            victims = find_victims(driver, base.name) if kills < max_kills else {}
            if not victims or not (run / "attempts").exists():
                continue
            kind = rng.choices(
                list(victims),
                [{"process": 20, "keeper": 3, "worker": 4, "driver": 4}[kind] for kind in victims],
            )[0]
            try:
                rng.choice(victims[kind]).kill()
            except psutil.NoSuchProcess:
                continue
            kills += 1
            time.sleep(0.5)
            verify_checkpoints(run, journal, victim=kind, **labels)
        if marker.exists() and not is_counted:
            kills += 1
            verify_checkpoints(run, journal, victim=describe_failpoint(failpoint), **labels)
        if driver.returncode == 0:
            return kills
        if driver.returncode != -9:
            journal.add(
                what="failed", codes=[driver.returncode], log=log.read_text()[-2000:], **labels
            )
            raise SystemExit(f"the driver ended with {driver.returncode}")
    raise AssertionError("unreachable")


def wait_for_checkpoint(run: Path, driver: subprocess.Popen[bytes]) -> None:
    """Wait for another checkpoint of the run: a run that never trains tests nothing."""
    from dist_ft.checkpoint import discovery
    from dist_ft.storage.filesystem import Store

    store = Store(str(run))
    before, until = discovery.list_committed(store)[:1], time.monotonic() + CHECKPOINT_WAIT_S
    while (
        driver.poll() is None
        and time.monotonic() < until
        and discovery.list_committed(store)[:1] == before
    ):
        time.sleep(0.1)


def find_victims(driver: subprocess.Popen[bytes], mark: str) -> dict[str, list[Any]]:
    """Return the processes of a run by kind: training processes with spares, keepers, Ray workers,
    driver.

    Returns {} unless there is one of each kind.
    """
    import psutil

    found: dict[str, list[Any]] = {"process": [], "keeper": [], "worker": []}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if (
                words[1:2] == ["-m"]
                and words[2].startswith("dist_ft.runtime.")
                and process.environ().get(MARK) == mark
            ):
                module = words[2].rpartition(".")[2]
                found[RUNTIME_MODULES[module]].append(process)
        except psutil.Error:
            continue
    with contextlib.suppress(psutil.Error):  # it may end meanwhile
        found["worker"] = [
            process
            for process in psutil.Process(driver.pid).children(recursive=True)
            if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline())
        ]
        found["driver"] = [psutil.Process(driver.pid)]
    return found if len(found) == 4 and all(found.values()) else {}


if __name__ == "__main__":
    main()
