"""The report of a run as Markdown and as one self-contained HTML page.

Text from data is escaped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from dist_ft.core import yaml_documents
from dist_ft.core.printable import markdown_block, markdown_code, markdown_text, printable
from dist_ft.runs.report import EvaluationTables, Report

MAX_POINTS = 600
"""Points of a curve. With more, means of neighbors are drawn."""
MAX_MATRIX_LABELS = 30
"""Labels of a confusion matrix that is shown. With more, the most confused pairs are listed."""
MAX_CELL_CHARS = 300
POSITIVE_RGB = "230, 120, 20"
"""Color of tokens that speak for a prediction."""
NEGATIVE_RGB = "30, 110, 200"
"""Color of tokens that speak against it."""


class ConfusedPair(NamedTuple):
    """How often a label was predicted as another."""

    label: str
    predicted: str
    num: int


class MetricChange(NamedTuple):
    """A metric at the first and at the last evaluation."""

    metric: str
    first: float | None
    last: float | None


class ShadedToken(NamedTuple):
    """A token, the CSS color of its attribution, and the attribution as text."""

    text: str
    color: str
    weight: str


class TableText(NamedTuple):
    """A table by label as text: titles of its columns, and (label, values) of its rows."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


class Curve(NamedTuple):
    """A titled curve as SVG."""

    title: str
    svg: str


Point = tuple[float, float]
"""(step, value)"""


def most_confused(
    labels: Sequence[str], matrix: Sequence[Sequence[int]], limit: int = 12
) -> list[ConfusedPair]:
    """Return the most confused pairs of labels, most frequent first.

    Args:
        labels: names of the rows and columns.
        matrix: counts by label (row) and prediction (column).
        limit: maximum number of pairs.
    """
    pairs = []
    for label, row in zip(labels, matrix, strict=True):
        for predicted, count in zip(labels, row, strict=True):
            if label != predicted and count:
                pairs.append(ConfusedPair(label, predicted, count))

    # A stable sort: pairs with equal counts stay in the order of the labels.
    pairs.sort(key=lambda pair: -pair.num)
    return pairs[:limit]


def metric_changes(evaluations: Sequence[Mapping[str, float]]) -> list[MetricChange]:
    """Return each metric at the first and at the last evaluation."""
    if not evaluations:
        return []

    # A resume with another config may add or remove metrics, so either side may lack one.
    first, last = evaluations[0], evaluations[-1]
    changes = []
    for name in dict.fromkeys([*last, *first]):
        if name not in ("step", "num_target_tokens"):
            changes.append(MetricChange(name, first.get(name), last.get(name)))
    return changes


def to_markdown(report: Report) -> str:
    """Return the report as Markdown, without curves."""
    about = [
        markdown_text(report["task"].replace("_", " ")),
        markdown_text(report["model"]),
        f"{report['steps']} steps",
        markdown_code(report["storage"]),
    ]
    lines = [f"# {markdown_text(report['name'])}", "", ", ".join(about), ""]
    lines += _metrics_markdown(report)
    lines += _tables_markdown(report)
    lines += _examples_markdown(report)

    lines += ["## Facts", ""]
    lines += [f"- {name}: {_cell(value)}" for name, value in report["facts"].items()]
    lines += ["", "## Attempts and time", ""]
    lines += [f"- {markdown_text(line)}" for line in [*report["attempts"], *report["time"]]]
    lines += ["", "## Config", "", *markdown_block(_config_text(report), "yaml"), ""]
    return "\n".join(lines)


def _config_text(report: Report) -> str:
    """Return the config as it was stored, or, if it has tags, as YAML that escapes them."""
    text = report["config"]
    if "<" not in text:
        return text
    (config,) = yaml_documents.parse_yaml(text, yaml_documents.STORED).values
    return yaml_documents.dump_without_tags(config)


def _metrics_markdown(report: Report) -> list[str]:
    changes = metric_changes(report["evaluations"])
    lines = []
    if changes:
        lines += ["## Held-out data", "", "| metric | first | last |", "| --- | ---: | ---: |"]
        for metric, first, last in changes:
            name = _cell(metric.replace("_", " "))
            lines.append(f"| {name} | {_number(first)} | {_number(last)} |")
        lines.append("")

    best_evaluation = report["best"]
    if best_evaluation:
        metric = _cell(best_evaluation["metric"])
        value = _number(best_evaluation["value"])
        lines += [f"Best by {metric}: {value} at step {best_evaluation['step']}.", ""]

    return lines


def _tables_markdown(report: Report) -> list[str]:
    tables = report["tables"]
    lines = []

    for title, table in _titled_tables(tables).items():
        lines += [
            f"## {title}",
            "",
            f"| | {' | '.join(map(_cell, table.columns))} |",
            f"| --- |{' ---: |' * len(table.columns)}",
        ]
        for label, values in table.rows:
            lines.append(f"| {_cell(label)} | {' | '.join(values)} |")
        lines.append("")

    # A matrix does not fit into Markdown. Its largest entries off the diagonal do.
    if "confusion" in tables:
        lines += ["## Most confused labels", ""]
        for pair in most_confused(tables["labels"], tables["confusion"]):
            lines.append(f"- {_cell(pair.label)} as {_cell(pair.predicted)}: {pair.num}")
        lines.append("")

    return lines


def _examples_markdown(report: Report) -> list[str]:
    if not report["examples"]:
        return []

    lines = [
        f"## Most confident errors at step {report['examples_step']}",
        "",
        "| sample | text | expected | predicted | score |",
        "| ---: | --- | --- | --- | ---: |",
    ]
    for example in report["examples"]:
        texts = [_cell(example[key]) for key in ("text", "expected", "predicted")]
        cells = [str(example["sample"]), *texts, _number(example["score"])]
        lines.append(f"| {' | '.join(cells)} |")

    return [*lines, ""]


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table: one line of limited length."""
    return markdown_text(text, MAX_CELL_CHARS)


def to_html(report: Report) -> str:
    """Return the report as one HTML page."""
    import jinja2

    # Texts of examples are data: without escaping they could run scripts in the reader's browser.
    source = resources.files("dist_ft.runs").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)

    shaded = [shade_tokens(example.get("tokens", ())) for example in report["examples"]]
    tables = report["tables"]
    labels = tables.get("labels", [])
    pairs = most_confused(labels, tables["confusion"]) if labels else []

    # The template shows the pairs where it gets no labels of a matrix.
    matrix_labels = labels if len(labels) <= MAX_MATRIX_LABELS else []

    page = environment.from_string(source).render(
        report=report,
        shaded=shaded,
        curves=_curves(report),
        tables=_titled_tables(tables),
        number=_number,
        metrics=metric_changes(report["evaluations"]),
        labels=matrix_labels,
        matrix=tables.get("confusion", []),
        pairs=pairs,
    )
    # The page's own characters are printable; those of texts may reverse the order of others.
    return printable(page)


def shade_tokens(tokens: Sequence[tuple[str, float]]) -> list[ShadedToken]:
    """Return tokens with colors for their attributions.

    Orange speaks for the prediction, blue against it; the strongest attribution is the most opaque.

    Args:
        tokens: (text, attribution) of each token.
    """
    # 1 without tokens, and if all attributions are 0, to divide by.
    largest = max((abs(weight) for _, weight in tokens), default=0.0) or 1.0

    shaded = []
    for text, weight in tokens:
        rgb = POSITIVE_RGB if weight > 0 else NEGATIVE_RGB

        # At most 0.75: the text has to stay readable on its shade.
        opacity = abs(weight) / largest * 0.75
        shaded.append(ShadedToken(text, f"rgba({rgb}, {opacity:.2f})", f"{weight:+.4f}"))
    return shaded


def _titled_tables(tables: EvaluationTables) -> dict[str, TableText]:
    """Return the tables by label and by tag, as far as there are any, by title."""
    titled = {}
    if "by_label" in tables:
        titled["By label"] = _table_text(tables["by_label"])

    if "by_tag" in tables:
        titled["By tag"] = _table_text(tables["by_tag"])
    return titled


def _table_text(table: Mapping[str, Mapping[str, float]]) -> TableText:
    """Return a table {label: {column: value}} as text."""
    # All rows have the columns of the first one.
    columns = list(next(iter(table.values()))) if table else []
    rows = []
    for label, values in table.items():
        rows.append((label, [_number(values.get(column)) for column in columns]))
    return TableText(columns, rows)


def _number(value: float | None) -> str:
    if value is None:
        return ""

    # 0 and 1 are usually scores, not counts, so they keep their decimals.
    if float(value).is_integer() and abs(value) > 1:
        return f"{value:,.0f}"
    return f"{value:.4f}"


def _curves(report: Report) -> list[Curve]:
    """Return the curves of the training loss, and of each metric over the evaluations."""
    evaluations = report["evaluations"]
    train_loss = _points(report["train"], "loss")

    curves = []
    if train_loss:
        lines = {"training": _thin_out(train_loss), "held-out": _points(evaluations, "loss")}
        curves.append(Curve("loss", _plot_svg(lines)))

    # A single point is no curve; the table of metrics has it.
    if len(evaluations) > 1:
        for change in metric_changes(evaluations):
            if change.metric != "loss":
                lines = {"held-out": _points(evaluations, change.metric)}
                curves.append(Curve(change.metric.replace("_", " "), _plot_svg(lines)))

    return curves


def _points(lines: Sequence[Mapping[str, float]], metric: str) -> list[Point]:
    return [(line["step"], line[metric]) for line in lines if metric in line]


def _thin_out(points: Sequence[Point]) -> list[Point]:
    """Return at most MAX_POINTS points: means of neighbors, at the step of the last of them."""
    # Every point of a run of a million steps would be an SVG of tens of MB.
    group_size = max(1, -(-len(points) // MAX_POINTS))

    thinned = []
    for start in range(0, len(points), group_size):
        group = points[start : start + group_size]
        mean = sum(value for _, value in group) / len(group)
        thinned.append((group[-1][0], mean))
    return thinned


def _plot_svg(lines: Mapping[str, Sequence[Point]]) -> str:
    """Return labelled lines of points as SVG, without the XML declaration."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Without pyplot, which looks for a display and keeps every figure until it is closed.
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()

    for label, points in lines.items():
        if points:
            steps, values = zip(*points, strict=True)

            # Few points need markers: a line through a single one is invisible.
            marker = "o" if len(points) < 30 else None
            axes.plot(steps, values, label=label, marker=marker, markersize=3)

    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()

    # Without the date of rendering, which says nothing about the run.
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})

    # SVG inside an HTML page must not have an XML declaration.
    text = buffer.getvalue()
    return text[text.index("<svg") :]
