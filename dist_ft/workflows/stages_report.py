"""The forgetting matrix of stages: text, JSON, Markdown, and a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from dist_ft.config.stages import Stages
from dist_ft.core.json_documents import encode_json
from dist_ft.core.printable import markdown_text
from dist_ft.metrics.best import LOWER_IS_BETTER
from dist_ft.metrics.forgetting import measure_forgetting
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import format_table

SUMMARIES = {
    "average": "average",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
}
"""Key of a summary -> title of its column."""


class StagesReport(TypedDict):
    """Scores after the completed stages, as JSON values.

    Attributes:
        name: name of the sequence of stages.
        url: its folder.
        metric: metric of the matrix.
        stages: names of all stages.
        runs: URLs of their runs.
        matrix: scores; row: after which stage, column: on whose data. None where the model's head
            lacks labels of that data.
        after: average, backward transfer and forgetting after each stage.
        metrics: all metrics of each cell.
    """

    name: str
    url: str
    metric: str
    stages: list[str]
    runs: list[str]
    matrix: list[list[float | None]]
    after: list[dict[str, float | None] | None]
    metrics: list[list[dict[str, float] | None]]


def gather(stages: Stages, metrics: Sequence[Sequence[Mapping[str, Any] | None]]) -> StagesReport:
    """Return the report after the completed stages.

    Args:
        stages: all stages.
        metrics: (completed stages, stages) metrics of each model on each stage's held-out data;
            None where the model's head lacks labels of that data.
    """
    matrix: list[list[float | None]] = []
    numbers: list[list[dict[str, float] | None]] = []
    for row in metrics:
        scores: list[float | None] = []
        row_numbers: list[dict[str, float] | None] = []
        for cell in row:
            if cell is None:
                scores.append(None)
                row_numbers.append(None)
            else:
                scores.append(cell.get(stages.metric))
                row_numbers.append(_numbers(cell))
        matrix.append(scores)
        numbers.append(row_numbers)

    # the first rows only: what was known after each stage
    after: list[dict[str, float | None] | None] = []
    for count in range(1, len(matrix) + 1):
        forgetting = measure_forgetting(matrix[:count], stages.metric)
        after.append(asdict(forgetting) if forgetting else None)

    return {
        "name": stages.name,
        "url": stages.url,
        "metric": stages.metric,
        "stages": [stage.name for stage in stages.stages],
        "runs": [stage.config.run_url for stage in stages.stages],
        "matrix": matrix,
        "after": after,
        "metrics": numbers,
    }


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    # tasks also report tables, such as a confusion matrix
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def write(store: Store, report: StagesReport) -> None:
    """Write matrix.json, matrix.md and matrix.png into the folder of the stages."""
    store.write("matrix.json", encode_json(report, indent=1))
    store.write("matrix.md", as_markdown(report).encode())
    store.write("matrix.png", as_picture(report))


def as_text(report: StagesReport) -> str:
    """Return the matrix as a table for a terminal."""
    return format_table(_title(report), _rows(report), _heads(report))


def as_markdown(report: StagesReport) -> str:
    """Return the matrix as a Markdown table with the meaning of its columns."""
    heads = _heads(report)
    direction = "lower" if report["metric"] in LOWER_IS_BETTER else "higher"
    lines = [f"# {markdown_text(_title(report))}", ""]

    lines += [f"| {' | '.join(map(markdown_text, heads))} |", f"|{' --- |' * len(heads)}"]
    for row in _rows(report):
        lines.append(f"| {' | '.join(map(markdown_text, row))} |")
    lines += [
        "",
        "Each row: the model after that stage, scored on the held-out data of each stage "
        f"({report['metric']}, {direction} is better; -: its head lacks labels of that data).",
        "Average: over the completed stages. Backward transfer (Lopez-Paz, Ranzato, "
        "arXiv:1706.08840): scores of earlier stages now, minus those right after each stage. "
        "Forgetting (Chaudhry et al., arXiv:1801.10112): their best earlier scores, minus those "
        "now.",
        "",
    ]
    return "\n".join(lines)


def as_picture(report: StagesReport) -> bytes:
    """Return a PNG with a line for each stage: its score after itself and after later stages."""
    # not pyplot: its state is global, and it may look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = report["matrix"]
    num_done = len(matrix)
    names = report["stages"][:num_done]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()

    # from its own stage on: before, the model was not trained on it
    for number, name in enumerate(names):
        values = [_plotted(row[number]) for row in matrix[number:]]
        axes.plot(range(number, num_done), values, marker="o", label=name)

    averages = [_plotted((summary or {}).get("average")) for summary in report["after"]]
    axes.plot(range(num_done), averages, color="black", linestyle="--", label="average")
    axes.set(title=_title(report), xlabel="after stage", ylabel=report["metric"])
    axes.set_xticks(range(num_done), names)
    axes.legend()

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _plotted(value: float | None) -> float:
    # matplotlib leaves a gap at NaN, and refuses None
    if value is None:
        return float("nan")
    return value


def _title(report: StagesReport) -> str:
    return f"{report['name']}: {report['metric'].replace('_', ' ')} by stage"


def _heads(report: StagesReport) -> list[str]:
    return ["after", *report["stages"], *SUMMARIES.values()]


def _rows(report: StagesReport) -> list[list[str]]:
    rows = []
    # not strict: the matrix has a row for each completed stage only
    for name, scores, summary in zip(
        report["stages"], report["matrix"], report["after"], strict=False
    ):
        summaries = [(summary or {}).get(key) for key in SUMMARIES]
        rows.append([name, *map(_cell, scores), *map(_cell, summaries)])
    return rows


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
