"""Drift of lanes at the end of nominal epochs of a stream, on real lengths of rows.

    python tests/benchmarks/b14_drift.py

Lanes finish an epoch at different steps, because their blocks hold different numbers of tokens. When
as many sequences were drawn as an epoch holds, some rows were not seen yet and as many were seen
twice. Prints their share. Rows are drawn from the lengths of three real data sets and cut into blocks
and slices by the code that runs use; sources have the size of the smallest stream, and ten times it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
LENGTH = 512
BLOCK_BYTES = 16 * 2**20
GOAL = 0.03
DATA_SETS = ("gsm8k", "wikitext2", "sgd_chat")


def main() -> None:
    """Simulate, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--lanes", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-gb", type=float, default=25.0, help="skip larger sources")
    parser.add_argument("--out", help="JSON file to write instead of results/b14_drift.json")
    args = parser.parse_args()

    found: dict[str, Any] = {}
    rows = []
    for name in DATA_SETS:
        lengths = read_lengths(name)
        for lanes in args.lanes:
            for factor in args.factors:
                from dist_ft.data.sampling.stream_order import min_stream_bytes

                num_bytes = factor * min_stream_bytes(lanes, LENGTH)
                if num_bytes > args.max_gb * 1e9:
                    continue
                drift = simulate(lengths, num_bytes, lanes, args.epochs)
                found[f"{name}, {lanes} lanes, {num_bytes / 1e9:.2f} GB"] = drift
                shown = ", ".join(f"{value:.2%}" for value in drift)
                verdict = "reached" if max(drift) <= GOAL else "NOT reached"
                rows.append([name, str(lanes), f"{num_bytes / 1e9:.2f} GB", shown, verdict])
                print(*rows[-1], flush=True)

    columns = ("data set", "lanes", "source", "drift after epochs 1, 2, ...", f"at most {GOAL:.0%}")
    harness.print_table("drift of lanes: share of rows", columns, rows)
    harness.save_results(
        "b14_drift", vars(args), harness.describe_environment(), {"drift": found}, args.out
    )


def read_lengths(name: str) -> np.ndarray:
    """Return int64 (n, 2) [bytes, tokens] of the rows of a real data set."""
    import tiny
    from transformers import AutoTokenizer

    shared = Path(os.environ.get("DIST_FT_SHARED") or ROOT.parent / "shared")
    folder = shared / "data" / name
    if not folder.exists():
        raise SystemExit(f"needs {folder}; set DIST_FT_SHARED")
    texts = list(read_texts(folder))[:20_000]

    import tempfile

    with tempfile.TemporaryDirectory(prefix="dist_ft-drift-") as temporary:
        tiny.make_model(Path(temporary))
        tokenizer = AutoTokenizer.from_pretrained(temporary)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    # a tokenizer trained on few words gives more tokens than real ones: the spread is what matters
    tokens = np.array([len(one.ids) for one in encoded], dtype=np.int64)
    num_bytes = np.array([len(json.dumps({"text": text})) + 1 for text in texts], dtype=np.int64)
    return np.column_stack([num_bytes, tokens])


def read_texts(folder: Path) -> Iterator[str]:
    """Yield the text of each row of a folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                row = json.loads(line)
                messages = row.get("messages")
                if messages:
                    yield "\n".join(str(message["content"]) for message in messages)
                else:
                    yield "\n".join(str(value) for value in row.values())
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            for row in pyarrow.parquet.read_table(path).to_pylist():
                messages = row.get("messages")
                if messages:
                    yield "\n".join(str(message["content"]) for message in messages)
                else:
                    yield "\n".join(str(value) for value in row.values())
        elif path.suffix in (".txt", ".tokens"):
            yield from (line for line in path.read_text().splitlines() if line.strip())


def simulate(lengths: np.ndarray, num_bytes: int, lanes: int, epochs: int) -> list[float]:
    """Return the share of rows that drifted at the end of each nominal epoch."""
    from dist_ft.data.sampling.stream_order import Cursor, StreamOrder, plan_layout

    layout = plan_layout(num_bytes, lanes, LENGTH, BLOCK_BYTES)
    assert layout is not None
    tokens_of_slice = fill_slices(lengths, num_bytes, layout.num_slices)
    order = StreamOrder(layout, lanes, seed=1, shuffle_blocks=16)
    total = tokens_of_slice.sum()

    # tokens of each lane by epoch; packing fills sequences alike on all lanes
    by_lane = np.zeros((epochs + 1, lanes))
    for lane in range(lanes):
        cursor = Cursor()
        while cursor.epoch <= epochs:
            by_lane[cursor.epoch, lane] += tokens_of_slice[order.window(lane, cursor)].sum()
            cursor = order.next_window(lane, cursor)

    drift = []
    for epoch in range(1, epochs + 1):
        drawn = epoch * total / lanes  # by each lane
        own = by_lane[:epoch].sum(axis=0)
        drift.append(float(np.maximum(0, own - drawn).sum() / total))
    return drift


def fill_slices(lengths: np.ndarray, num_bytes: int, num_slices: int) -> np.ndarray:
    """Return the tokens of each slice of a source of rows drawn from `lengths`."""
    drawn = np.random.default_rng(0)
    per_chunk = 2_000_000
    tokens = np.zeros(num_slices)
    position = 0
    while position < num_bytes:
        rows = lengths[drawn.integers(0, len(lengths), per_chunk)]
        starts = position + np.cumsum(rows[:, 0]) - rows[:, 0]
        is_inside = starts < num_bytes
        # a row belongs to the slice it starts in, with what fits into a sequence of it
        numbers = (starts[is_inside] * num_slices // num_bytes).astype(np.int64)
        fitting = np.minimum(rows[is_inside, 1], LENGTH)
        tokens += np.bincount(numbers, weights=fitting, minlength=num_slices)
        position = int(starts[-1] + rows[-1, 0])
    return tokens


if __name__ == "__main__":
    main()
