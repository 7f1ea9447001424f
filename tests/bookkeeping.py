"""The losses of fault 26: what is removed or damaged, and what has to come of it.

`docs/recovery.md` shows the same table to users.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Damage = Callable[[Path], None]
NOT_EXPORTED = "Run `dist-ft train` with the run's config again"
DAMAGED_CONFIG = "run.yaml|stored config"


class Row(NamedTuple):
    """One loss, and its outcomes: "" if it is recovered from, else a pattern of the refusal.

    Attributes:
        damage: what happens to the run's folder.
        start: outcome of the next start.
        export: outcome of an export before it.
        running: outcome if it happens under a running run; None: not tried.
    """

    damage: Damage
    start: str = ""
    export: str = ""
    running: str | None = ""


def find(run: Path, pattern: str) -> Path:
    """Return the last file or folder of a run that matches."""
    return sorted(run.glob(pattern))[-1]


def remove(pattern: str) -> Damage:
    def damage(run: Path) -> None:
        victim = find(run, pattern)
        if victim.is_dir():
            shutil.rmtree(victim)
        else:
            victim.unlink()

    return damage


def tear(pattern: str) -> Damage:
    def damage(run: Path) -> None:
        victim = find(run, pattern)
        content = victim.read_bytes()
        victim.write_bytes(content[: len(content) // 2])

    return damage


def fill(pattern: str, content: bytes) -> Damage:
    return lambda run: (find(run, pattern).write_bytes(content), None)[1]


def make_folder(pattern: str) -> Damage:
    def damage(run: Path) -> None:
        victim = find(run, pattern)
        remove(pattern)(run)
        victim.mkdir()
        (victim / "file").write_bytes(b"x")

    return damage


def make_file(pattern: str) -> Damage:
    def damage(run: Path) -> None:
        victim = find(run, pattern)
        remove(pattern)(run)
        victim.write_bytes(b"x")

    return damage


RECORD = "attempts/*.json"
INDEX = "data/data.train.json"
LABELS = "data/labels.json"
FROZEN = r"none of the \d committed checkpoints can be loaded \(the latest: .*frozen/"
ROWS = {
    "attempts removed": Row(remove("attempts")),
    "attempts is a file": Row(
        make_file("attempts"), "a file is in the place of the folder", running="Not a directory"
    ),
    "attempt record removed": Row(remove(RECORD)),
    "attempt record torn": Row(tear(RECORD)),
    "attempt record empty": Row(fill(RECORD, b"")),
    "attempt record a list": Row(fill(RECORD, b"[1, 2]")),
    "attempt record a folder": Row(make_folder(RECORD)),
    "ledger removed": Row(remove("ledger")),
    "ledger segment removed": Row(remove("ledger/*")),
    "ledger segment torn": Row(tear("ledger/*")),
    "data removed": Row(remove("data")),
    "index removed": Row(remove(INDEX)),
    "index torn": Row(tear(INDEX), "the stored index is damaged"),
    "index empty": Row(fill(INDEX, b""), "the stored index is damaged"),
    "index a list": Row(fill(INDEX, b"[1]\n[2]\n"), "the stored index is damaged"),
    "index a folder": Row(make_folder(INDEX), "cannot read it", running=None),
    "labels removed": Row(remove(LABELS)),
    "labels torn": Row(tear(LABELS), "labels.json: the file is damaged"),
    "labels empty": Row(fill(LABELS, b""), "labels.json: the file is damaged"),
    "labels an object": Row(fill(LABELS, b"{}"), "labels.json: the file is damaged"),
    "model removed": Row(remove("model"), export=NOT_EXPORTED),
    "model config removed": Row(remove("model/config.json"), export=NOT_EXPORTED),
    "model config torn": Row(tear("model/config.json"), export=NOT_EXPORTED),
    "model config empty": Row(fill("model/config.json", b""), export=NOT_EXPORTED),
    "tokenizer torn": Row(tear("model/tokenizer.json"), export=NOT_EXPORTED),
    "tokenizer a folder": Row(
        make_folder("model/tokenizer.json"), "cannot write it", NOT_EXPORTED, None
    ),
    "frozen removed": Row(remove("frozen"), FROZEN, FROZEN),
    "frozen file torn": Row(tear("frozen/*/*"), FROZEN, FROZEN),
    "config removed": Row(remove("run.yaml"), export="run.yaml: the file is missing"),
    "config torn": Row(tear("run.yaml"), DAMAGED_CONFIG, "."),
    "config empty": Row(fill("run.yaml", b""), DAMAGED_CONFIG, "run.yaml: the file is empty"),
    "config a list": Row(fill("run.yaml", b"- 1\n"), DAMAGED_CONFIG, "."),
    "config a folder": Row(make_folder("run.yaml"), "cannot read it", "cannot read it", None),
    "metrics removed": Row(remove("metrics.jsonl")),
    "metrics torn": Row(tear("metrics.jsonl"), "not a file of metrics", "not a file of metrics"),
    "evaluations removed": Row(remove("evaluations")),
    "evaluation torn": Row(tear("evaluations/*")),
    "evaluation a list": Row(fill("evaluations/*", b"[1]")),
    "time removed": Row(remove("time")),
    "time record torn": Row(tear("time/*")),
    "checkpoints removed": Row(
        remove("checkpoints"),
        "holds no checkpoint, but one of step 14 was committed",
        "no committed checkpoint",
    ),
    "latest checkpoint removed": Row(remove("checkpoints/*")),
    "latest manifest torn": Row(tear("checkpoints/*/manifest.json")),
}
