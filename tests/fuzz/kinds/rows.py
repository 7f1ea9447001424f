"""Rows of data, mutated, as JSON Lines, CSV and Parquet, through the reading of every task."""

from __future__ import annotations

import csv
import io
import json
import random
from typing import Any

from fuzz import documents, mutate
from fuzz.inputs import File, Input
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

NUM_ROWS = 12
FORMATS = ("jsonl", "jsonl", "jsonl", "csv", "parquet", "json")
NAMES = (
    *("text", "label", "pair", "tokens", "tags", "question", "context", "answers", "answer_start"),
    *("source", "target", "positive", "prompt", "response", "messages", "role", "content"),
    *("input_ids", "targets", "tool_calls"),
)


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return a shard with mutated rows, and the config that says how to read it."""
    import tiny
    import tiny_tasks

    task = rng.choice(list(documents.TASKS))
    rows: list[Any] = []
    for seed in range(NUM_ROWS):
        if task == "causal_lm":
            row = _text_row(rng, tiny.rows(1, seed)[0])
        else:
            row = tiny_tasks.row(task, rng)
        rows.append(row)

    for _ in range(rng.choice((1, 2, 4, 12))):
        at = rng.randrange(len(rows))
        rows[at] = mutate.mutate_tree(rng, rows[at], NAMES, mutate.json_value)

    suffix = rng.choice(FORMATS)
    content = _encoded(rng, rows, suffix)
    if rng.random() < 0.25:
        content = mutate.mutate_bytes(rng, content)

    data = {"overlong": rng.choice(("error", "truncate", "drop")), "format": "auto"}
    if task == "causal_lm" and rng.random() < 0.3:
        data["format"] = rng.choice(("chat", "instruction", "text", "tokens"))
    question = {"task": task, "data": data, "shard": f"rows.{suffix}", "labels": tiny_tasks.LABELS}
    if task == "token_classification":
        question["labels"] = ["O", *(f"B-{label}" for label in tiny_tasks.LABELS)]
    files: dict[str, File] = {
        "question.json": json.dumps(question).encode(),
        f"rows.{suffix}": content,
    }
    return Input(call="encode_rows", materials=(documents.TASKS[task],), files=files)


def _text_row(rng: random.Random, pair: dict[str, str]) -> dict[str, Any]:
    """Return an instruction, a chat or a text of a causal model."""
    kind = rng.randrange(3)
    if kind == 0:
        return dict(pair)
    if kind == 1:
        return {"text": pair["response"]}
    messages = [
        {"role": "user", "content": pair["prompt"]},
        {"role": "assistant", "content": pair["response"]},
    ]
    return {"messages": messages}


def _encoded(rng: random.Random, rows: list[Any], suffix: str) -> bytes:
    if suffix == "csv":
        return _csv(rows)
    if suffix == "parquet" and (content := _parquet(rows)):
        return content
    if suffix == "json":
        return json.dumps(rows).encode()
    ascii_only = rng.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"


def _csv(rows: list[Any]) -> bytes:
    mappings = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(str(name) for row in mappings for name in row))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(names)
    for row in mappings:
        values = [row.get(name, "") for name in names]
        writer.writerow(
            [json.dumps(one) if isinstance(one, list | dict) else one for one in values]
        )
    return buffer.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list[Any]) -> bytes:
    """Return the rows as Parquet; nothing if Arrow finds no types for them."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return b""
    return buffer.getvalue()


KIND = Kind("rows", generate, ("model", "bert", "bart"), quick_cases=30)
