"""A selftest's report as Markdown: what one would paste into an issue. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_ft.selftest.selftest import Report


def to_markdown(report: Report) -> str:
    """Return the report as Markdown: verdicts, figures, devices, versions, and the last lines of runs that failed."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# dist-ft selftest: {'all held' if report.held else 'something FAILED'}"
    yield ""
    yield (
        f"{report.made_at}, {report.workers} worker{'s' if report.workers != 1 else ''} ({report.device}), "
        f"{report.seconds:.0f} s"
    )
    yield ""
    yield from _table(
        ("check", "run", "verdict", "what was seen"),
        [
            (one.check, one.name, one.verdict, "; ".join(filter(None, (one.seen, *one.problems))))
            for one in report.findings
        ],
    )
    yield from ("", "## Figures", "")
    yield from _table(
        ("run", "figure", "value"),
        [
            (one.name, name, f"{value:.6g}")
            for one in report.findings
            for name, value in one.figures.items()
        ],
    )
    yield from ("", "## Nodes", "")
    for number, machine in enumerate(report.machines):
        yield f"- node {number}: {_machine(machine)}"
    if report.machines:
        yield from ("", "## Versions", "")
        first = report.machines[0]["versions"]
        yield from _table(("package", "version"), sorted(first.items()))
        others = [number for number, one in enumerate(report.machines) if one["versions"] != first]
        if others:
            yield f"\n**Nodes {', '.join(map(str, others))} have other versions than node 0.**"
    yield from ("", "## Settings", "")
    for section, values in report.settings.items():
        yield f"- {section}: {', '.join(f'{name}={value}' for name, value in values.items())}"
    for name, tail in report.tails.items():
        yield from (
            "",
            f"## Last lines of {name}",
            "",
            "```",
            *(line.replace("```", "'''") for line in tail),
            "```",
        )


def _machine(machine: Mapping[str, Any]) -> str:
    gpus = machine.get("gpus") or ()
    kinds = sorted({f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in gpus})
    shown = f"{len(gpus)} x {'; '.join(kinds)}" if gpus else "no GPU used"
    more = ", ".join(
        f"{name} {machine[name]}" for name in ("cuda", "hip", "nccl", "cudnn") if machine.get(name)
    )
    return (
        f"{shown}{f' ({more})' if more else ''}; {machine['cpus_usable']} of {machine['cpus']} cores, "
        f"{machine['memory_gib']} GiB; {machine['os']}, Python {machine['python']}"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
