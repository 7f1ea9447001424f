"""One call of the fuzzer: cases of some kinds, a table of how they ended, and the failures."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import pkgutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.inputs import Case, Input, load_case, save_case
from fuzz.judge import Outcome, Problem, problems
from fuzz.kinds.registry import KINDS, cases
from fuzz.materials import Materials
from fuzz.minimize import minimize
from fuzz.pool import Pool
from fuzz.sandbox import GUARDED

HERE = Path(__file__).resolve().parent
IMPORTED_FIRST = (
    "torch",
    "transformers",
    "peft",
    "pyarrow.parquet",
    "scipy.stats",
    "matplotlib.pyplot",
)
MAX_SHOWN = 40


@dataclass
class Summary:
    """How the cases of one kind ended.

    Attributes:
        codes: exit code -> number of cases.
        slowest: (seconds, name) of the slowest case.
        failures: (case, its problems).
        seconds: in total, of all cases.
    """

    codes: Counter[int] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    failures: list[tuple[Case, list[Problem]]] = field(default_factory=list)
    seconds: float = 0.0


def run(arguments: argparse.Namespace, scratch: Path) -> int:
    """Run what the command line says; return the exit code: 1 if a case failed."""
    # Words that are not UTF-8 are shown too.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    import_everything()
    folder = scratch / "cases"
    folder.mkdir()
    materials = Materials(scratch / "materials")
    pool = Pool(materials, folder, arguments.jobs)

    summaries: dict[str, Summary] = {}
    for group in _groups(arguments, materials):
        for case, outcome in pool.run(group):
            _add(summaries.setdefault(case.kind, Summary()), case, outcome)
            if arguments.show:
                _show(case, outcome)

    print(table(summaries), flush=True)
    failures = [failure for summary in summaries.values() for failure in summary.failures]
    for case, found in failures[:MAX_SHOWN]:
        print(f"\n{case.name}: {shown_command(case.input)}")
        for problem in found[:5]:
            print(f"  {problem.category}: {problem.detail}")
    if len(failures) > MAX_SHOWN:
        print(f"\n... and {len(failures) - MAX_SHOWN} more")

    if arguments.save:
        _save(failures, pool, arguments.save)
    if arguments.json:
        arguments.json.write_text(json.dumps(_as_json(summaries), indent=1))
    return 1 if failures else 0


def import_everything() -> None:
    """Import what any case may need, so that none pays for it; then keep it out of the collector."""
    for name in IMPORTED_FIRST:
        importlib.import_module(name)
    import dist_ft

    for module in pkgutil.walk_packages(dist_ft.__path__, "dist_ft."):
        # Modules named __main__ run a command when they are imported.
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    sys.dont_write_bytecode = True
    gc.collect()
    gc.freeze()


def _groups(arguments: argparse.Namespace, materials: Materials) -> Iterator[Iterator[Case]]:
    """Yield the cases to run, by kind."""
    replayed = list(arguments.replay)
    if arguments.quick:
        replayed += sorted((HERE / "cases").glob("*.json"))
    if replayed:
        yield map(load_case, replayed)
    if arguments.replay:
        return

    for name in arguments.kind or KINDS:
        count = KINDS[name].quick_cases if arguments.quick else arguments.cases
        yield cases(name, arguments.seed, arguments.first, count, materials)


def _add(summary: Summary, case: Case, outcome: Outcome) -> None:
    summary.codes[outcome.code] += 1
    summary.seconds += outcome.seconds
    summary.slowest = max(summary.slowest, (outcome.seconds, case.name))
    found = judged(case, outcome)
    if found:
        summary.failures.append((case, found))


def judged(case: Case, outcome: Outcome) -> list[Problem]:
    """Return what is wrong with how a case ended."""
    command = case.input.call or " ".join(case.input.words[:2])
    kind = KINDS[case.kind]
    found = problems(outcome, command, kind.may_write_outside)
    if "--debug" in case.input.words:
        # It prints the traceback of every error.
        found = [problem for problem in found if problem.category != "traceback"]
    if kind.must_succeed and outcome.code:
        found.append(
            Problem(
                "refused", f"exit code {outcome.code}: {outcome.stderr[-300:]!r} {outcome.guards}"
            )
        )
    return found


def table(summaries: dict[str, Summary]) -> str:
    """Return the results as a table for people."""
    codes = sorted({code for summary in summaries.values() for code in summary.codes})
    titles = ["guarded" if code == GUARDED else f"code {code}" for code in codes]
    rows = [["kind", "cases", *titles, "mean s", "slowest s", "slowest case", "failed"]]
    for name, summary in summaries.items():
        count = summary.codes.total()
        seconds, slowest = summary.slowest
        rows.append(
            [
                name,
                f"{count:,}",
                *(f"{summary.codes[code]:,}" for code in codes),
                f"{summary.seconds / count:.2f}",
                f"{seconds:.2f}",
                slowest,
                str(len(summary.failures)),
            ]
        )

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return "\n".join(lines)


def shown_command(item: Input) -> str:
    """Return the command line or the call of an input, shortened."""
    shown = []
    for word in item.words or (f"{item.call}()",):
        if len(word) > 80:
            word = f"{word[:60]}... ({len(word):,} characters)"
        shown.append(word if word.isprintable() else repr(word))
    return " ".join(shown)


def _show(case: Case, outcome: Outcome) -> None:
    print(
        f"--- {case.name}: {shown_command(case.input)}: code {outcome.code}, {outcome.seconds:.2f} s"
    )
    print(outcome.stdout[-3000:], outcome.stderr[-6000:], sep="\n")
    print(*outcome.problems, *outcome.guards, *(f"outside: {path}" for path in outcome.outside))


def _save(failures: Sequence[tuple[Case, list[Problem]]], pool: Pool, folder: Path) -> None:
    """Save each failure, as small as it gets; one for each place in the code."""
    seen: set[tuple[str, str]] = set()
    for case, found in failures:
        first = found[0]
        key = (first.category, first.detail.rpartition(" at ")[2])
        if key in seen:
            continue
        seen.add(key)

        def fails(item: Input, case: Case = case, expected: str = first.category) -> bool:
            smaller = Case(case.kind, case.name, item)
            return any(one.category == expected for one in judged(smaller, pool.run_one(item)))

        smallest = minimize(case.input, fails)
        path = folder / f"{case.name}.json"
        save_case(path, Case(case.kind, case.name, smallest), f"{first.category}: {first.detail}")
        print(f"saved {path}")


def _as_json(summaries: dict[str, Summary]) -> dict[str, Any]:
    """Return all results as JSON values."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    kinds = {}
    for name, summary in summaries.items():
        failures = []
        for case, found in summary.failures:
            failures.append({"case": case.name, "problems": [str(problem) for problem in found]})
        kinds[name] = {
            "cases": summary.codes.total(),
            "codes": {str(code): count for code, count in sorted(summary.codes.items())},
            "slowest_s": summary.slowest[0],
            "slowest_case": summary.slowest[1],
            "failures": failures,
        }
    return {"time": started, "kinds": kinds}
