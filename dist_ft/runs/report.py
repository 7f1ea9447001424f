"""The report of a run: what was run, how it learned, what it scores, where it errs; JSON, Markdown and one HTML page.

Reads what lies in the run's storage, whoever wrote it, and needs no model and no GPU (`attributions` does, if asked).
The page loads nothing from anywhere; what comes from data is escaped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from dist_ft.checkpoint import discovery
from dist_ft.config import renames
from dist_ft.config.load import STORED
from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.metrics import best
from dist_ft.runs import catalog, time_accounting
from dist_ft.runs.run_facts import facts
from dist_ft.storage.filesystem import Store
from dist_ft.training.evaluation import FOLDER
from dist_ft.training.metrics_log import read_metrics

PLOTTED = 600
"""Points of a curve at most; of more, means of neighbours are drawn."""
MOST_CONFUSED = 30
"""Labels of a confusion matrix that is shown; of more, the pairs most often taken for each other are told."""
LONGEST_CELL = 300
TITLES = {"by_label": "By label", "by_tag": "By tag"}


def gather(url: str) -> dict[str, Any]:
    """Return all that the report says, as JSON values. Raises DataError if there is no run, or no step yet."""
    import yaml

    store = Store(url)
    if not store.exists(STORED):
        raise DataError(
            f"{store.shown()}: is no run (it has no {STORED}); the folder <run.storage>/<run.name> is "
            "needed; dist-ft runs list STORAGE names them"
        )
    lines = read_metrics(store)
    if not lines:
        raise DataError(
            f"{store.shown()}: has no metrics yet; a run that made a step is needed; let it make one"
        )
    text = redact(store.read(STORED).decode())
    config = renames.RUN.migrate(yaml.safe_load(text))
    evaluations = [_numbers(line) for line in lines if line["kind"] == "evaluation"]
    train = [_numbers(line) for line in lines if line["kind"] == "train"]
    metric = (config.get("checkpoint") or {}).get("best_by", "loss")
    known = [(int(line["step"]), line[metric]) for line in evaluations if metric in line]
    chosen = dict(zip(("step", "value"), best.find_best(metric, known), strict=True)) if known else None
    newest, details = _details(store)
    return {
        "name": config["run"]["name"],
        "storage": store.shown(),
        "config": text,
        "task": (config.get("task") or {}).get("name", "causal_lm"),
        "model": redact(str(config["model"]["path"])),
        "steps": train[-1]["step"] if train else 0,
        "train": train,
        "evaluations": evaluations,
        "best": {**chosen, "metric": metric} if chosen else None,
        "tables": _tables(details),
        "examples": details.get("examples", []),
        "examples_step": newest,
        "attributions": None,
        "facts": facts(store),
        "attempts": catalog.attempts(store),
        "time": list(time_accounting.lines(store)),
        "checkpoints": discovery.list_committed(store),
    }


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if isinstance(value, int | float)}


def _details(store: Store) -> tuple[int | None, dict[str, Any]]:
    """Return step and values of the newest evaluation that has more than numbers; (None, {}) without any."""
    names = store.list(FOLDER)
    if not names:
        return None, {}
    newest = max(names)
    return int(newest.removeprefix("step-").removesuffix(".json")), json.loads(
        store.read(f"{FOLDER}/{newest}")
    )


def _tables(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of an evaluation: by label, and what was taken for what."""
    tables: dict[str, Any] = {name: found[name] for name in TITLES if found.get(name)}
    if "confusion" in found:
        tables["labels"], tables["confusion"] = list(found["by_label"]), found["confusion"]
    return tables


def confused(
    labels: Sequence[str], matrix: Sequence[Sequence[int]], most: int = 12
) -> list[tuple[str, str, int]]:
    """Return (label, what it was taken for, how often), most often first."""
    pairs = [
        (labels[i], labels[j], count)
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:most]


def before_after(
    evaluations: Sequence[Mapping[str, float]],
) -> list[tuple[str, float | None, float | None]]:
    """Return (metric, at the first evaluation, at the last) of all metrics."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    names = [
        name for name in dict.fromkeys([*last, *first]) if name not in ("step", "num_target_tokens")
    ]
    return [(name, first.get(name), last.get(name)) for name in names]


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown, without curves."""
    about = f"{report['task'].replace('_', ' ')}, {report['model']}, {report['steps']} steps, `{report['storage']}`"
    parts = [f"# {report['name']}", "", about, ""]
    rows = before_after(report["evaluations"])
    if rows:
        parts += ["## Held-out data", "", "| metric | first | last |", "| --- | ---: | ---: |"]
        parts += [
            f"| {name.replace('_', ' ')} | {_shown(first)} | {_shown(last)} |"
            for name, first, last in rows
        ]
        parts.append("")
    if report["best"]:
        parts += [
            f"Best by {report['best']['metric']}: {_shown(report['best']['value'])} at step "
            f"{report['best']['step']}.",
            "",
        ]
    for name, title in TITLES.items():
        if name in report["tables"]:
            heads, table = _rows(report["tables"][name])
            parts += [
                f"## {title}",
                "",
                f"| | {' | '.join(heads)} |",
                f"| --- |{' ---: |' * len(heads)}",
                *(f"| {_cell(label)} | {' | '.join(values)} |" for label, values in table),
                "",
            ]
    if "confusion" in report["tables"]:
        pairs = confused(report["tables"]["labels"], report["tables"]["confusion"])
        parts += [
            "## Taken for another",
            "",
            *(f"- {_cell(one)} for {_cell(other)}: {count}" for one, other, count in pairs),
            "",
        ]
    if report["examples"]:
        parts += [
            f"## Most confident errors at step {report['examples_step']}",
            "",
            "| sample | text | wanted | told | score |",
            "| ---: | --- | --- | --- | ---: |",
        ]
        parts += [
            f"| {one['sample']} | {_cell(one['text'])} | {_cell(one['wanted'])} | {_cell(one['told'])} | "
            f"{_shown(one['score'])} |"
            for one in report["examples"]
        ]
        parts.append("")
    parts += [
        "## What was run",
        "",
        *(f"- {name}: {_cell(value)}" for name, value in report["facts"].items()),
        "",
    ]
    parts += [
        "## Attempts and time",
        "",
        *(f"- {line}" for line in [*report["attempts"], *report["time"]]),
        "",
        "## Config",
        "",
        "```yaml",
        report["config"].rstrip(),
        "```",
        "",
    ]
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table, on one line and not too long."""
    line = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= LONGEST_CELL else line[:LONGEST_CELL] + " ..."


def to_html(report: Mapping[str, Any]) -> str:
    """Return the report as one HTML page."""
    import jinja2

    source = resources.files("dist_ft.runs").joinpath("report.html.jinja").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    tables = {
        TITLES[name]: _rows(report["tables"][name]) for name in TITLES if name in report["tables"]
    }
    labels = report["tables"].get("labels", [])
    return template.render(
        report=report,
        shaded=[shaded(one.get("tokens", ())) for one in report["examples"]],
        curves=_curves(report),
        tables=tables,
        shown=_shown,
        metrics=before_after(report["evaluations"]),
        labels=labels if len(labels) <= MOST_CONFUSED else [],
        matrix=report["tables"].get("confusion", []),
        pairs=confused(labels, report["tables"]["confusion"]) if labels else [],
    )


def shaded(tokens: Sequence[tuple[str, float]]) -> list[tuple[str, str, str]]:
    """Return (text, colour, weight to show) of tokens: orange spoke for what was told, blue against it."""
    most = max((abs(weight) for _, weight in tokens), default=0.0) or 1.0
    return [
        (
            text,
            f"rgba({'230, 120, 20' if weight > 0 else '30, 110, 200'}, {abs(weight) / most * 0.75:.2f})",
            f"{weight:+.4f}",
        )
        for text, weight in tokens
    ]


def _rows(
    table: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the heads of a table by label, and (label, values) of its rows."""
    heads = list(next(iter(table.values()))) if table else []
    return heads, [
        (label, [_shown(row.get(head)) for head in heads]) for label, row in table.items()
    ]


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}"


def _curves(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (title, SVG) of the training loss, and of each metric over its evaluations."""
    train = [(line["step"], line["loss"]) for line in report["train"] if "loss" in line]
    held = [(line["step"], line["loss"]) for line in report["evaluations"] if "loss" in line]
    curves = [("loss", _svg([("training", _thinned(train)), ("held-out", held)]))] if train else []
    names = [name for name, _, _ in before_after(report["evaluations"]) if name != "loss"]
    for name in names if len(report["evaluations"]) > 1 else ():
        values = [(line["step"], line[name]) for line in report["evaluations"] if name in line]
        curves.append((name.replace("_", " "), _svg([("held-out", values)])))
    return curves


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // PLOTTED)
    groups = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _svg(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Return curves of (step, value) as SVG, without the XML head."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines:
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps, values, label=name, marker="o" if len(points) < 30 else None, markersize=3
            )
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
