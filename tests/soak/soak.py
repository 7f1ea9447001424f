"""Kills a run again and again at random moments, and checks that nothing was lost: in parts, with a journal.

    python tests/soak/soak.py --mode ranks --kills 160     # two ranks without Ray: kill -9, and deaths inside a save
    python tests/soak/soak.py --mode ray --kills 40        # training processes, their keepers, Ray workers, the driver
    python tests/soak/soak.py --report                     # what the journal says

Each run is a small model with dropout, packed, in the background saved every four steps. After every kill all committed
checkpoints are read and held against their checksums; at the end of a run its losses must equal those of an unbroken
one to the last bit, and the ledger must hold every sample once. A line of the journal is written after each.
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
PLACES = (
    "checkpoint.before_file",
    "checkpoint.after_file",
    "checkpoint.before_manifest",
    "checkpoint.after_manifest",
)
MARK = "DIST_FT_SOAK"
"""In the environment of all that belongs to the run: keepers and what they keep are no children of the driver."""
COMMIT_S = 120.0
STEPS = {"ranks": 240, "ray": 300}


def main() -> None:
    """Soak, or report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--mode", choices=["ranks", "ray"], default="ranks")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--seed", type=int, default=None, help="none: from the clock; it is in the journal"
    )
    parser.add_argument(
        "--minutes", type=float, default=14, help="begin no further run after so long"
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
    """What was done to which run, and what was found."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **values: Any) -> None:
        """Write a line."""
        line = {"at": datetime.now(timezone.utc).isoformat(timespec="seconds"), **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def report(self) -> None:
        """Print the sums; exit 1 if anything was not as it must be."""
        lines = (
            [json.loads(line) for line in self.path.read_text().splitlines()]
            if self.path.exists()
            else []
        )
        kills = [line for line in lines if line["what"] == "kill"]
        ends = [line for line in lines if line["what"] == "end"]
        for mode in ("ranks", "ray"):
            counts = Counter(line["victim"].split(":")[0] for line in kills if line["mode"] == mode)
            print(f"{mode}: {sum(counts.values())} kills: {dict(counts)}")
        bad = [line for line in lines if line["what"] == "failed" or not line.get("sound", True)]
        print(
            f"runs that came to their end: {len(ends)}; equal to the unbroken one to the last bit, every sample once: "
            f"{sum(line['equal'] and line['once'] for line in ends)}; checkpoints read: "
            f"{sum(line['checkpoints'] for line in kills)}; corrupt or failed: {len(bad)}"
        )
        if bad or not all(line["equal"] and line["once"] for line in ends):
            raise SystemExit(1)


def soak(args: argparse.Namespace, journal: Journal) -> None:
    """Kill until there were enough kills; the last run goes on to its end."""
    import history
    import tiny

    seed = args.seed if args.seed is not None else time.time_ns() % 2**32
    rng, begun, kills, number = random.Random(seed), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="dist_ft-soak-") as name:
        base = tiny.base(Path(name))
        document = config(base, "unbroken", args.mode)
        unbroken_run(base, document)
        wanted = history.losses(base / "runs/unbroken")
        while kills < args.kills and time.monotonic() - begun < 60 * args.minutes:
            number += 1
            document = config(base, f"soak-{number}", args.mode)
            about = {"mode": args.mode, "seed": seed, "number": number}
            done = (ranks_run if args.mode == "ranks" else ray_run)(
                base, document, rng, args.kills - kills, about, journal
            )
            kills += done
            run = base / "runs" / document["run"]["name"]
            once = True
            try:
                history.require_exactly_once(run, document)
            except AssertionError:
                once = False
            journal.add(
                what="end", kills=done, equal=history.losses(run) == wanted, once=once, **about
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


def unbroken_run(base: Path, document: dict[str, Any]) -> None:
    """Run what all others are held against: two ranks, no kill."""
    import ranks

    ranks.require_ok(ranks.run_ranks(2, [document], base / "unbroken"), base / "unbroken")


def check(run: Path, journal: Journal, **values: Any) -> None:
    """Read all committed checkpoints and note the kill."""
    from dist_ft.checkpoint import discovery
    from dist_ft.config.load import STORED
    from dist_ft.runs import catalog
    from dist_ft.storage.filesystem import Store

    if not Store(str(run)).exists(STORED):
        return journal.add(what="kill", checkpoints=0, sound=True, step=0, **values)
    found = list(catalog.verify(str(run)))
    there = discovery.list_committed(
        Store(str(run))
    )  # under Ray the run goes on, and removes old ones meanwhile
    problems = [f"{name}: {problem}" for name, problem in found if problem and name in there]
    newest = int(found[0][0].split("-")[1]) if found else 0
    return journal.add(
        what="kill",
        checkpoints=len(found),
        sound=not problems,
        step=newest,
        **values,
        **({"problems": problems} if problems else {}),
    )


def ranks_run(
    base: Path,
    document: dict[str, Any],
    rng: random.Random,
    most: int,
    about: dict[str, Any],
    journal: Journal,
) -> int:
    """Run to the end over kills of two ranks; return how many there were."""
    import ranks

    run, folder = base / "runs" / document["run"]["name"], base / document["run"]["name"]
    for kills in range(10**6):
        place = (
            f"{rng.choice(PLACES)}:{rng.randint(1, 6)}@{rng.randint(0, 1)}"
            if rng.random() < 0.4
            else ""
        )
        processes = ranks.start_ranks(
            2, [document], folder, {"DIST_FT_FAILPOINT": place} if place else {}
        )
        victims = rng.choice([[0], [1], [0, 1]])
        until = time.monotonic() + (rng.uniform(1.0, 7.0) if kills < most and not place else 120)
        while all(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(0.01)
        codes = [process.poll() for process in processes]
        if codes == [None, None] and not place and kills < most:
            for victim in victims:
                processes[victim].kill()
        codes = ranks.wait_for_death(processes)
        if -9 not in codes:
            if codes != [0, 0]:
                journal.add(
                    what="failed",
                    codes=codes,
                    log=(folder / "rank-0.log").read_text()[-2000:],
                    **about,
                )
                raise SystemExit(f"ranks ended with {codes}")
            return kills
        check(run, journal, victim=f"save:{place}" if place else f"rank:{victims}", **about)
    raise AssertionError("unreachable")


def ray_run(
    base: Path,
    document: dict[str, Any],
    rng: random.Random,
    most: int,
    about: dict[str, Any],
    journal: Journal,
) -> int:
    """Run to the end under Ray over kills of what it is made of; return how many there were."""
    import psutil
    import yaml

    run, kills = base / "runs" / document["run"]["name"], 0
    path = base / "ray.yaml"
    path.write_text(yaml.safe_dump(document))
    log = base / "ray.log"
    while True:
        with open(log, "ab") as output:
            driver = subprocess.Popen(
                [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
                cwd=base,
                stdout=output,
                stderr=output,
                env={**os.environ, MARK: base.name},
            )
        while driver.poll() is None:
            if rng.random() < 0.85:  # else perhaps before it has recovered from the last kill
                wait_for_a_commit(run, driver)
            until = time.monotonic() + rng.uniform(0.5, 10.0)
            while driver.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            victims = living(driver, base.name) if kills < most else {}
            if not victims or not (run / "attempts").exists():
                continue
            kind = rng.choices(
                list(victims),
                [{"process": 20, "keeper": 2, "worker": 3, "driver": 1}[kind] for kind in victims],
            )[0]
            try:
                rng.choice(victims[kind]).kill()
            except psutil.NoSuchProcess:
                continue
            kills += 1
            time.sleep(0.5)
            check(run, journal, victim=kind, **about)
        if driver.returncode == 0:
            return kills
        if driver.returncode != -9:
            journal.add(
                what="failed", codes=[driver.returncode], log=log.read_text()[-2000:], **about
            )
            raise SystemExit(f"the driver ended with {driver.returncode}")


def wait_for_a_commit(run: Path, driver: subprocess.Popen[bytes]) -> None:
    """Wait until the run has committed a checkpoint more: a run that never trains is no test."""
    from dist_ft.checkpoint import discovery
    from dist_ft.storage.filesystem import Store

    store = Store(str(run))
    before, until = discovery.list_committed(store)[:1], time.monotonic() + COMMIT_S
    while (
        driver.poll() is None
        and time.monotonic() < until
        and discovery.list_committed(store)[:1] == before
    ):
        time.sleep(0.1)


def living(driver: subprocess.Popen[bytes], mark: str) -> dict[str, list[Any]]:
    """Return the processes of a run that trains: training processes (spares too), keepers, Ray workers, the driver."""
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
                found[words[2].rpartition(".")[2]].append(process)
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
