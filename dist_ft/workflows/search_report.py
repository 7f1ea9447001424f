"""The report of a search: text, JSON, Markdown, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from dist_ft.config.schema import RunConfig
from dist_ft.config.search import SearchSection
from dist_ft.core.json_documents import encode_json
from dist_ft.core.printable import markdown_text
from dist_ft.metrics import best
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dist_ft.workflows.trial import Trial

LOG_SCALE_FROM = 20
"""A field whose values span more than this factor is drawn on a logarithmic axis."""


class SearchReport(TypedDict):
    """The results of a search, as JSON values.

    Attributes:
        name: name of the search.
        url: folder of the search.
        metric: metric that trials are compared by.
        search: grid, random or optuna.
        fields: paths of the searched fields.
        best: number of the best trial; None without a result.
        trials: the trials, best first and failed ones last: {trial, run, values, <metric>, step,
            seconds, state, error, reports}.
    """

    name: str
    url: str
    metric: str
    search: str
    fields: list[str]
    best: int | None
    trials: list[dict[str, Any]]


def gather(
    section: SearchSection, base: RunConfig, url: str, trials: Sequence[Trial]
) -> SearchReport:
    """Return the report of a search.

    Args:
        section: the search.
        base: config of a trial, for the fields that all trials share.
        url: folder of the search.
        trials: all trials, in any order.
    """
    metric = base.checkpoint.best_by

    def rank(trial: Trial) -> tuple[bool, float, int]:
        # trials without a value last; of equal ones, the first that was started
        return trial.value is None, best.sort_key(metric, trial.value or 0.0), trial.number

    rows: list[dict[str, Any]] = []
    for trial in sorted(trials, key=rank):
        rows.append(
            {
                "trial": trial.number,
                "run": f"{base.run.storage.rstrip('/')}/{section.name}-t{trial.number}",
                "values": trial.values,
                metric: trial.value,
                "step": trial.step,
                "seconds": trial.seconds,
                "state": trial.state,
                "error": trial.error,
                "reports": [list(report) for report in trial.reports],
            }
        )

    best_trial = next((row["trial"] for row in rows if row[metric] is not None), None)
    return {
        "name": section.name,
        "url": url,
        "metric": metric,
        "search": section.search,
        "fields": list(section.space),
        "best": best_trial,
        "trials": rows,
    }


def write(store: Store, report: SearchReport) -> None:
    """Write search.json, search.md and search.png into the folder of the search."""
    store.write("search.json", encode_json(report, indent=1))
    store.write("search.md", as_markdown(report).encode("utf-8", "replace"))
    store.write("search.png", as_picture(report))


def as_text(report: SearchReport) -> str:
    """Return the trials as a table for a terminal, best first."""
    return format_table(_title(report), _rows(report), _heads(report))


def as_markdown(report: SearchReport) -> str:
    """Return the trials as a Markdown table, best first, and the errors of failed ones."""
    heads = _heads(report)
    lines = [f"# {markdown_text(_title(report))}", ""]

    lines += [f"| {' | '.join(map(markdown_text, heads))} |", f"|{' --- |' * len(heads)}"]
    for row in _rows(report):
        lines.append(f"| {' | '.join(map(markdown_text, row))} |")

    lines.append("")
    # errors are too long for a cell
    for trial in report["trials"]:
        if trial["error"]:
            lines.append(f"- trial {trial['trial']}: {markdown_text(trial['error'])}")

    return "\n".join([*lines, ""])


def as_picture(report: SearchReport) -> bytes:
    """Return a PNG: the best value so far of each trial by step, and final values by field."""
    # not pyplot: its state is global, and it may look for a display
    import matplotlib

    # A dollar sign in a value would start a formula, and a broken one is an error.
    with matplotlib.rc_context({"text.parse_math": False}):
        return _draw(report)


def _draw(report: SearchReport) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fields = report["fields"]

    # one panel for the curves, one for each searched field
    figure = Figure(figsize=(4 * (1 + len(fields)), 3.5), layout="constrained")
    curve_axes, *field_axes = figure.subplots(1, 1 + len(fields), squeeze=False)[0]
    _plot_curves(curve_axes, report)
    for field, axes in zip(fields, field_axes, strict=True):
        _plot_field(axes, report, field)

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _plot_curves(axes: Axes, report: SearchReport) -> None:
    for trial in report["trials"]:
        steps = [step for step, _ in trial["reports"]]
        values = [value for _, value in trial["reports"]]

        width = 2.5 if trial["trial"] == report["best"] else 0.8
        axes.plot(steps, values, marker=".", linewidth=width, label=f"trial {trial['trial']}")

    axes.set(title=report["name"], xlabel="step", ylabel=report["metric"])
    axes.legend(fontsize="small")


def _plot_field(axes: Axes, report: SearchReport, field: str) -> None:
    metric = report["metric"]
    scored = [trial for trial in report["trials"] if trial[metric] is not None]
    values = [trial["values"][field] for trial in scored]

    # bool is a kind of int, but false and true are not places on an axis of numbers
    are_numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    positions = values
    if not are_numbers:
        positions = [format_value(value) for value in values]
    axes.plot(positions, [trial[metric] for trial in scored], "o")

    # a logarithm needs positive numbers
    is_positive = are_numbers and min(values, default=0) > 0
    if is_positive and max(values) / min(values) > LOG_SCALE_FROM:
        axes.set_xscale("log")
    axes.set(xlabel=field)


def format_value(value: Any) -> str:
    """Return a field's value as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _title(report: SearchReport) -> str:
    return f"{report['name']}: trials by {report['metric']}"


def _heads(report: SearchReport) -> list[str]:
    fields = [field.rpartition(".")[2] for field in report["fields"]]
    return ["trial", *fields, report["metric"], "steps", "seconds", "state"]


def _rows(report: SearchReport) -> list[list[str]]:
    rows = []
    for trial in report["trials"]:
        value = trial[report["metric"]]
        shown_value = "-" if value is None else f"{value:.4f}"
        searched = [format_value(trial["values"][field]) for field in report["fields"]]
        rows.append(
            [
                str(trial["trial"]),
                *searched,
                shown_value,
                str(trial["step"]),
                f"{trial['seconds']:.1f}",
                trial["state"],
            ]
        )
    return rows
