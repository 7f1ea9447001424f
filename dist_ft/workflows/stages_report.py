"""The forgetting matrix of stages for people and programs: text, JSON, Markdown, and a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dist_ft.config.stages import Stages
from dist_ft.metrics.best import LOWER_IS_BETTER
from dist_ft.metrics.forgetting import measure_forgetting
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import format_table

TOLD = {"average": "average", "backward_transfer": "backward transfer", "forgetting": "forgetting"}


def gather(stages: Stages, found: Sequence[Sequence[dict[str, Any] | None]]) -> dict[str, Any]:
    """Return what is known after the stages done: scores (row: after which stage, column: on whose data), and sums.

    Args:
        stages: all stages.
        found: metrics (stages done, stages); None where the model's head has not the labels.
    """
    matrix = [
        [None if metrics is None else metrics.get(stages.metric) for metrics in row]
        for row in found
    ]
    after = [measure_forgetting(matrix[: number + 1], stages.metric) for number in range(len(matrix))]
    return {
        "name": stages.name,
        "url": stages.url,
        "metric": stages.metric,
        "stages": [stage.name for stage in stages.stages],
        "runs": [stage.config.run_url for stage in stages.stages],
        "matrix": matrix,
        "after": [asdict(one) if one else None for one in after],
        "metrics": [
            [None if metrics is None else _numbers(metrics) for metrics in row] for row in found
        ],
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def keep(store: Store, report: dict[str, Any]) -> None:
    """Write the report into the folder of the stages: matrix.json, matrix.md, matrix.png."""
    store.write("matrix.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    store.write("matrix.md", as_markdown(report).encode())
    store.write("matrix.png", as_picture(report))


def as_text(report: dict[str, Any]) -> str:
    """Return the matrix as a table for a terminal."""
    return format_table(_title(report), _rows(report), ["after", *report["stages"], *TOLD.values()])


def as_markdown(report: dict[str, Any]) -> str:
    """Return the matrix as a Markdown table, and what its columns mean."""
    heads = ["after", *report["stages"], *TOLD.values()]
    lines = [
        f"# {_title(report)}",
        "",
        _line(heads),
        _line(["---"] * len(heads)),
        *(_line(row) for row in _rows(report)),
        "",
        f"Each row: the model after that stage, scored on the held-out data of each stage ({report['metric']}, "
        f"{'lower' if report['metric'] in LOWER_IS_BETTER else 'higher'} is better; -: its head lacks labels of that data).",
        "Average: over the stages learned. Backward transfer (Lopez-Paz, Ranzato, arXiv:1706.08840): earlier stages "
        "now less just after they were learned. Forgetting (Chaudhry et al., arXiv:1801.10112): their best before less "
        "now.",
        "",
    ]
    return "\n".join(lines)


def as_picture(report: dict[str, Any]) -> bytes:
    """Return the matrix as a PNG: one line a stage, its score after each stage from the one that learned it on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    names, matrix = report["stages"], report["matrix"]
    for number, name in enumerate(names[: len(matrix)]):
        values = [row[number] for row in matrix[number:]]
        axes.plot(
            range(number, len(matrix)), [_number(value) for value in values], marker="o", label=name
        )
    means = [_number((one or {}).get("average")) for one in report["after"]]
    axes.plot(range(len(matrix)), means, color="black", linestyle="--", label="average")
    axes.set(title=_title(report), xlabel="after stage", ylabel=report["metric"])
    axes.set_xticks(range(len(matrix)), names[: len(matrix)])
    axes.legend()
    held = io.BytesIO()
    FigureCanvasAgg(figure).print_png(held)
    return held.getvalue()


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _title(report: dict[str, Any]) -> str:
    return f"{report['name']}: {report['metric'].replace('_', ' ')} by stage"


def _rows(report: dict[str, Any]) -> list[list[str]]:
    return [
        [name, *(_told(value) for value in row), *(_told((sums or {}).get(key)) for key in TOLD)]
        for name, row, sums in zip(
            report["stages"], report["matrix"], report["after"], strict=False
        )
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
