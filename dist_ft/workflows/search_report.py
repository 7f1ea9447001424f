"""The trials of a search for people and programs: text, JSON, Markdown, and a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_ft.config.schema import RunConfig
from dist_ft.config.search import SearchSection
from dist_ft.metrics import best
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import format_table

if TYPE_CHECKING:
    from dist_ft.workflows.trial import (
        Trial,
    )


def gather(
    section: SearchSection, base: RunConfig, url: str, trials: Sequence[Trial]
) -> dict[str, Any]:
    """Return what the trials gave, best first (failed ones last); `best` is the number of the best, None without."""
    metric = base.checkpoint.best_by

    def place(trial: Trial) -> tuple[bool, float, int]:
        return trial.value is None, best.sort_key(metric, trial.value or 0.0), trial.number

    ordered = sorted(trials, key=place)
    found = [
        {
            "trial": trial.number,
            "run": f"{base.run.storage.rstrip('/')}/{section.name}-t{trial.number}",
            "values": trial.values,
            metric: trial.value,
            "step": trial.step,
            "seconds": trial.seconds,
            "state": trial.state,
            "error": trial.error,
            "reports": [list(one) for one in trial.reports],
        }
        for trial in ordered
    ]
    top = next((one["trial"] for one in found if one[metric] is not None), None)
    return {
        "name": section.name,
        "url": url,
        "metric": metric,
        "search": section.search,
        "fields": list(section.space),
        "best": top,
        "trials": found,
    }


def keep(store: Store, report: dict[str, Any]) -> None:
    """Write the report into the folder of the search: search.json, search.md, search.png."""
    store.write("search.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    store.write("search.md", as_markdown(report).encode())
    store.write("search.png", as_picture(report))


def as_text(report: dict[str, Any]) -> str:
    """Return the trials as a table for a terminal, best first."""
    return format_table(f"{report['name']}: trials by {report['metric']}", _rows(report), _heads(report))


def as_markdown(report: dict[str, Any]) -> str:
    """Return the trials as a Markdown table, best first, and why some failed."""
    rows = [_heads(report), ["---"] * len(_heads(report)), *_rows(report)]
    failed = [f"- trial {one['trial']}: {one['error']}" for one in report["trials"] if one["error"]]
    return "\n".join(
        [
            f"# {report['name']}: trials by {report['metric']}",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *failed,
            "",
        ]
    )


def as_picture(report: dict[str, Any]) -> bytes:
    """Return a PNG: the best value so far of each trial by step, and the last value by each field."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric, fields = report["metric"], report["fields"]
    figure = Figure(figsize=(4 * (1 + len(fields)), 3.5), layout="constrained")
    curves, *others = figure.subplots(1, 1 + len(fields), squeeze=False)[0]
    for one in report["trials"]:
        curves.plot(
            *zip(*one["reports"], strict=True) if one["reports"] else ((), ()),
            marker=".",
            linewidth=2.5 if one["trial"] == report["best"] else 0.8,
            label=f"trial {one['trial']}",
        )
    curves.set(title=report["name"], xlabel="step", ylabel=metric)
    curves.legend(fontsize="small")
    for name, axes in zip(fields, others, strict=True):
        known = [one for one in report["trials"] if one[metric] is not None]
        values = [one["values"][name] for one in known]
        numbers = all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values
        )
        axes.plot(
            values if numbers else [shown(value) for value in values],
            [one[metric] for one in known],
            "o",
        )
        if numbers and min(values, default=0) > 0 and max(values) / min(values) > 20:
            axes.set_xscale("log")
        axes.set(xlabel=name)
    held = io.BytesIO()
    FigureCanvasAgg(figure).print_png(held)
    return held.getvalue()


def shown(value: Any) -> str:
    """Return a value as a person reads it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _heads(report: dict[str, Any]) -> list[str]:
    fields = [field.rpartition(".")[2] for field in report["fields"]]
    return ["trial", *fields, report["metric"], "steps", "seconds", "state"]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    metric = report["metric"]
    return [
        [
            str(one["trial"]),
            *(shown(one["values"][field]) for field in report["fields"]),
            "-" if one[metric] is None else f"{one[metric]:.4f}",
            str(one["step"]),
            f"{one['seconds']:.1f}",
            one["state"],
        ]
        for one in report["trials"]
    ]
