"""Inspection: its counts and problems; broken rows do not stop it."""

import json

import pytest
from unit.data.data_helpers import chat

from dist_ft.core.errors import DataError
from dist_ft.data.tools.inspection import format_inspection, inspect_paths


def test_columns_duplicates_and_problems_are_counted(tmp_path):
    rows = [
        chat("hi", "there"),
        chat("hi", "there"),
        {"messages": [{"role": "user", "content": "a"}] * 2},
        {"text": " "},
        {"text": "caf\ufffd"},
        {"text": "nul\x00"},
        {"text": "x" * 100_001},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:3], "{broken", *lines[3:]]))
    (tmp_path / "b.csv").write_text("text,n\nhello,1\n")
    found = inspect_paths([str(tmp_path)])
    assert (found.num_shards, found.num_rows, found.num_duplicates) == (2, 9, 1)
    assert found.columns == {"messages: list": 3, "text: str": 5, "n: str": 1}
    assert dict(found.suspicious) == {
        "is not JSON": 1,
        "messages without an assistant turn": 1,
        "messages with two turns of the same role in a row": 1,
        "empty: no text in any column": 1,
        "has U+FFFD: was decoded with a wrong encoding": 1,
        "has NUL characters": 1,
        "longer than 100,000 characters": 1,
    }
    assert found.examples["is not JSON"] == [f"{tmp_path}/a.jsonl row 4"]
    text = format_inspection(found)
    assert (
        "shards      2 (1 csv, 1 jsonl)" in text
        and "duplicates  1" in text
        and "text: str  in 5 rows" in text
    )
    assert f"1 × has NUL characters, for example {tmp_path}/a.jsonl row 7" in text


def test_sound_data_has_no_problems(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    assert format_inspection(inspect_paths([str(tmp_path)])).endswith(
        "text: str  in all rows\nsuspicious  none"
    )


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"PATH=.*none: matches no file"):
        inspect_paths([str(tmp_path / "none")])
