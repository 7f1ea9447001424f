"""Run one guide with the plain engine, again on two DeepSpeed workers, and compare the results.

Writes tables.json and guide.md into --out. Exits 1 if a figure the guide promises was missed, or if
the tables of the engines differ by more than `lab.TOLERANCE`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import lab  # noqa: E402

GUIDES = {
    "additive": "a new head on an encoder: names of persons, places and organisations in tweets",
    "large_model": "a pre-trained model: sentiment, full against LoRA; intents in stages",
    "kinds": "three kinds of fine-tuning: all weights, two layers, a prompt; 8 to 128 examples",
    "no_training": "no training: zero- and few-shot prompts, prototypes, a random head as control",
    "decoding": "decoding: translation by greedy and beam search, before and after; pronunciation",
    "further": "further recipes on real data, a few steps each: the loss falls",
}


def main() -> int:
    """Run the requested guide; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name}: {what}" for name, what in GUIDES.items()),
    )
    parser.add_argument("guide", choices=GUIDES)
    parser.add_argument(
        "--engine",
        choices=[*lab.ENGINES, "both"],
        default="both",
        help="both: plain, then zero2 (default)",
    )
    parser.add_argument(
        "--data",
        default=os.environ.get("DIST_FT_SHARED", str(lab.ROOT.parent / "shared")),
        help="folder that holds data/ and models/",
    )
    parser.add_argument(
        "--out", help="folder for runs, models and tables; existing content is removed"
    )
    given = parser.parse_args()
    data = Path(given.data).absolute()
    if not (data / "data").is_dir():
        parser.error(
            f"--data={data}: has no folder `data`. The guides read real data sets from it."
        )
    out = Path(given.out or lab.ROOT / "runs" / "guides" / given.guide).absolute()
    shutil.rmtree(out, ignore_errors=True)
    guide = importlib.import_module(given.guide)
    labs, missed, started = [], [], time.monotonic()
    for engine in ("plain", "zero2") if given.engine == "both" else (given.engine,):
        os.environ["OMP_NUM_THREADS"] = (
            "1"  # one core per worker; the plain engine then rounds the same way
        )
        here = lab.Lab(given.guide, engine, data, out / engine)
        here.out.mkdir(parents=True)
        missed += [f"{line} ({engine})" for line in guide.guide(here)]
        labs.append(here)
    lines = [f"{given.guide}: {GUIDES[given.guide]}", f"took {time.monotonic() - started:.0f} s"]
    if len(labs) == 2:
        worst = lab.compare(labs)
        lines.append(f"the two engines' tables differ by at most {worst:.2g}")
        if worst > lab.TOLERANCE:
            missed.append(
                f"the engines' tables differ by {worst:.2g}; at most {lab.TOLERANCE} is allowed"
            )
    (out / "tables.json").write_text(
        json.dumps(
            {
                "guide": given.guide,
                "notes": lines,
                "missed": missed,
                "tables": [asdict(table) for one in labs for table in one.tables],
            },
            indent=1,
            ensure_ascii=False,
        )
    )
    (out / "guide.md").write_text(
        "\n".join(
            [
                f"# {lines[0]}",
                "",
                *lines[1:],
                *missed,
                "",
                *(table.to_markdown() for one in labs for table in one.tables),
            ]
        )
    )
    lab.say(*lines, f"tables: {out / 'guide.md'}", *(f"MISSED: {line}" for line in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
