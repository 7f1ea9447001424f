"""A self-test's report as Markdown, to paste into an issue. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_ft.core.printable import markdown_text, printable
from dist_ft.runtime.machine import NodeDescription
from dist_ft.selftest.selftest import Report


def to_markdown(report: Report) -> str:
    """Return verdicts, figures, devices, versions and the last lines of failed runs."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    verdict = "all checks passed" if report.passed else "some checks FAILED"
    plural = "s" if report.num_workers != 1 else ""
    yield f"# dist-ft selftest: {verdict}"
    yield ""
    yield (
        f"{report.created_at}, {report.num_workers} worker{plural} ({report.device}), "
        f"{report.duration_s:.0f} s"
    )
    yield ""
    yield from _findings(report)
    yield from _nodes(report)

    yield from ("", "## Settings", "")
    for section in ("cluster", "zero"):
        values = report.settings[section]
        listed = ", ".join(f"{name}={value}" for name, value in values.items())
        yield f"- {section}: {listed}"

    for name, tail in report.log_tails.items():
        yield from ("", f"## Last lines of {name}", "", "```")
        # a fence in the output would end the block, and the rest would be read as Markdown
        yield from (printable(line).replace("```", "'''") for line in tail)
        yield "```"


def _findings(report: Report) -> Iterator[str]:
    rows = []
    figures = []
    for finding in report.findings:
        result = "; ".join(filter(None, (finding.result, *finding.problems)))
        rows.append((finding.check, finding.name, finding.verdict, result))
        for name, value in finding.figures.items():
            figures.append((finding.name, name, f"{value:.6g}"))

    yield from _table(("check", "run", "verdict", "result"), rows)

    yield from ("", "## Figures", "")
    yield from _table(("run", "figure", "value"), figures)


def _nodes(report: Report) -> Iterator[str]:
    yield from ("", "## Nodes", "")
    for number, machine in enumerate(report.machines):
        yield f"- node {number}: {_describe_machine(machine)}"
    if not report.machines:
        return

    # One table: nodes of a cluster should not differ, and if they do, that is the finding.
    yield from ("", "## Versions", "")
    first = report.machines[0]["versions"]
    yield from _table(("package", "version"), sorted(first.items()))

    others = []
    for number, machine in enumerate(report.machines):
        if machine["versions"] != first:
            others.append(str(number))
    if others:
        yield f"\n**Nodes {', '.join(others)} have other versions than node 0.**"


def _describe_machine(machine: NodeDescription) -> str:
    gpus = machine.get("gpus") or ()
    devices = "no GPU used"
    if gpus:
        # each model once; a node may have several
        models = sorted({f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in gpus})
        devices = f"{len(gpus)} x {'; '.join(models)}"

    libraries = []
    for name in ("cuda", "hip", "nccl", "cudnn"):
        if machine.get(name):
            libraries.append(f"{name} {machine[name]}")
    if libraries:
        devices += f" ({', '.join(libraries)})"

    return (
        f"{devices}; {machine['cpus_usable']} of {machine['cpus']} cores, "
        f"{machine['memory_gib']} GiB; {machine['os']}, Python {machine['python']}"
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headers)} |"
    yield f"|{' --- |' * len(headers)}"
    for row in rows:
        # a bar, a line break or a tag in an error would break the table
        cells = [markdown_text(cell) for cell in row]
        yield f"| {' | '.join(cells)} |"
