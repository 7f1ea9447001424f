"""The writer plans its files before it remembers that it did."""

from __future__ import annotations

import pytest
import torch

from dist_ft.checkpoint.writer import Writer
from dist_ft.core.errors import CheckpointError
from dist_ft.engine.base import StateSlice


def make_slice(values: torch.Tensor) -> StateSlice:
    return StateSlice("weight", "param", 0, values.numel(), True, lambda: values, lambda new: None)


def test_a_failed_preparation_is_not_taken_for_a_plan(tmp_path):
    writer = Writer(rank=0)
    state = [make_slice(torch.zeros(3, dtype=torch.complex64))]
    for _ in range(2):  # the second call must not save a checkpoint without this rank's files
        with pytest.raises(CheckpointError, match="complex64"):
            writer.prepare(state)
