"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any) -> str:
    """Return a metric as text: whole numbers with separators, others with four decimals."""
    if value is None:
        return ""

    # 0 and 1 are usually scores, not counts, so they keep their decimals.
    if float(value).is_integer() and abs(value) > 1:
        return f"{value:,.0f}"
    return f"{value:.4f}"


def scalar_names(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the plain numbers among metrics."""
    # Others are tables by label or by template, which do not fit into a cell.
    return [name for name, value in values.items() if isinstance(value, float | int)]


def label(name: str) -> str:
    """Return the name of a metric or field as a column title."""
    return name.replace("_", " ")


def before_after(title: str, changes: Mapping[str, tuple[float, float]]) -> str:
    """Return a table of {measure: (before, after)}."""
    from dist_ft.training.console import format_table

    rows = []
    for name, (before, after) in changes.items():
        rows.append([label(name), number(before), number(after)])
    return format_table(title, rows, ["", "before", "after"])


def by_template(
    model: str, metrics_by_template: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]
) -> str:
    """Return a table of a model's metrics with each prompt template."""
    from dist_ft.training.console import format_table

    rows = []
    for name in metrics:
        values = [number(scores.get(name)) for scores in metrics_by_template.values()]
        rows.append([label(name), *values])

    # A title is one line, and templates often have several.
    templates = [template.replace("\n", "\\n") for template in metrics_by_template]
    return format_table(f"{model} by template", rows, ["", *templates])
