"""Helpers for data tests: small sections, rows, shared tokenizers, and ranks as threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_ft.config.schema import BatchSection, DataSection

SHARED = Path(os.environ.get("DIST_FT_SHARED", Path(__file__).resolve().parents[4] / "shared"))


def shared_tokenizer(name: str):
    """Load a tokenizer of the shared folder, or skip."""
    from transformers import AutoTokenizer

    folder = SHARED / "models" / name
    if not folder.exists():
        pytest.skip(f"{folder} is absent; set DIST_FT_SHARED")
    return AutoTokenizer.from_pretrained(folder)


def data_section(**values) -> DataSection:
    return DataSection(**{"train": "unused", **values})


def batch_section(**values) -> BatchSection:
    return BatchSection(**{"global_batch": 4, "micro_batch": 2, "sequence_length": 64, **values})


def chat(*turns: str, system: str | None = None) -> dict:
    """Return a chat row whose turns alternate between user and assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]
    return {"messages": messages}


class FakeCollectives:
    """Rank threads in one process that exchange values like a gloo group."""

    def __init__(self, size: int) -> None:
        from threading import Barrier

        self.size = size
        self.barrier = Barrier(size, timeout=30)
        self.values = [None] * size

    def rank(self, number: int):
        from dist_ft.core.world import Collectives

        outer = self

        class Rank(Collectives):
            def all_gather(self, value):
                outer.values[number] = value
                outer.barrier.wait()
                found = list(outer.values)
                outer.barrier.wait()
                return found

        return Rank()


def run_ranks(size: int, action):
    """Run `action(world, collectives)` on `size` threads; return results or exceptions by rank."""
    from concurrent.futures import ThreadPoolExecutor

    from dist_ft.core.world import World

    group = FakeCollectives(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(action, World(r, size, r, size), group.rank(r)) for r in range(size)]
    return [future.exception() or future.result() for future in futures]
