import pytest

from dist_ft.config.load import load_config
from dist_ft.planning.batch import batch_arithmetic

BASE = {
    "run": {"name": "x"},
    "model": {"path": "m"},
    "data": {"train": "a.jsonl"},
    "batch": {"global_batch": 10, "micro_batch": 2, "sequence_length": 1024},
    "schedule": {"steps": 3},
    "checkpoint": {"every_steps": 2},
}


def rows(*overrides):
    return dict(batch_arithmetic(load_config(BASE, overrides)))


def test_arithmetic_of_one_process():
    assert rows() == {
        "global batch": "10 sequences = 5 lanes × micro-batch 2",
        "lanes": "5 lanes in this process, one after another",
        "step tokens": "10 sequences × 1,024 tokens = 10,240 at most",
        "length": "3 steps × 10,240 tokens = 30,720 at most",
    }


@pytest.mark.parametrize(
    ("workers", "lanes"),
    [
        ("1", "5 = 1 worker × 5 lanes"),
        ("2", "5 = 1 worker × 3 lanes + 1 worker × 2 lanes"),
        ("5", "5 = 5 workers × 1 lane"),
        ("1..4", "5 = 1 worker × 2 lanes + 3 workers × 1 lane; 5 = 1 worker × 5 lanes"),
    ],
)
def test_lanes_are_divided_among_workers(workers, lanes):
    assert rows(f"cluster.workers={workers}")["lanes"] == lanes


def test_length_in_epochs():
    assert rows("schedule.steps=null", "schedule.epochs=2")["length"] == (
        "2 epochs; the number of steps follows from the data's index"
    )
