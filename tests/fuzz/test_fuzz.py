"""The quick tier of the fuzzer: fixed seeds, and every input that once crashed something."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fuzz import mutate
from fuzz.inputs import Input, Special
from fuzz.judge import Outcome, problems
from fuzz.minimize import minimize

HERE = Path(__file__).resolve().parent
KINDS = ("sound", "configs", "commands", "runs", "stored", "models", "rows", "templates", "k8s")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the quick tier in a process that may fork, and return its results by kind."""
    path = tmp_path_factory.mktemp("fuzz") / "results.json"
    done = subprocess.run(
        [sys.executable, str(HERE), "--quick", "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert path.exists(), done.stdout + done.stderr
    kinds: dict[str, Any] = json.loads(path.read_text())["kinds"]
    return kinds


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs_end_with_a_result_or_one_clear_line(
    kind: str, results: dict[str, Any]
) -> None:
    assert results[kind]["failures"] == []
    assert results[kind]["cases"] >= 10


def outcome(**changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "code": 2,
        "stdout": "",
        "stderr": "dist-ft: a: wrong. Write b.\n",
        "seconds": 0.1,
        "cpu_s": 0.1,
        "growth_bytes": 0,
        "timed_out": False,
    }
    return Outcome(**{**values, **changes})


TRACEBACK = (
    'Traceback (most recent call last):\n  File "/x/dist_ft/a.py", line 3, in f\nKeyError: 1\n'
)


@pytest.mark.parametrize(
    ("changes", "category"),
    [
        ({"stderr": TRACEBACK}, "traceback"),
        ({"stderr": "dist-ft: unexpected KeyError: 1. This is a bug in dist_ft. x"}, "bug line"),
        ({"stderr": "dist-ft: unexpected KeyError: 1 (this is a gap in dist_ft)"}, "bug line"),
        ({"stderr": ""}, "no line"),
        ({"stderr": "dist-ft: one\ndist-ft: two\n"}, "several errors"),
        ({"stderr": "dist-ft: a\x1b[2Jb\n"}, "control character"),
        ({"stderr": "dist-ft: " + "a" * 30_000}, "long error"),
        ({"stderr": "thread 'x' panicked at src/lib.rs:1\ndist-ft: one\n"}, "native"),
        ({"timed_out": True}, "time"),
        ({"code": -11}, "signal"),
        ({"code": 77}, "exit code"),
        ({"growth_bytes": 2**31}, "memory"),
        ({"outside": ("/etc/x",)}, "outside"),
        ({"problems": ("train accepts it",)}, "disagreement"),
    ],
)
def test_judge_finds_what_is_wrong(changes: dict[str, Any], category: str) -> None:
    assert [one.category for one in problems(outcome(**changes), "check x", False)] == [category]


def test_judge_accepts_results_and_clear_lines() -> None:
    assert not problems(outcome(), "check x", False)
    assert not problems(outcome(code=0, stdout="ok\n", stderr=""), "check x", False)
    assert not problems(
        outcome(code=1, stdout="step 2: damaged\n", stderr=""), "runs verify", False
    )
    assert not problems(outcome(outside=("/x",)), "check x", True)


def test_mutations_follow_from_the_seed() -> None:
    tree = {"a": [1, {"b": "c"}], "d": None}

    def draws() -> list[Any]:
        rng = random.Random(7)
        trees = [mutate.mutate_tree(rng, tree, ("a", "x")) for _ in range(50)]
        texts = [mutate.mutate_tokens(rng, "a: b c") for _ in range(50)]
        return [repr(trees), texts, [mutate.mutate_bytes(rng, b"abcdef") for _ in range(50)]]

    assert draws() == draws()
    assert tree == {"a": [1, {"b": "c"}], "d": None}
    assert len(set(draws()[2])) > 30


def test_minimizing_keeps_what_fails() -> None:
    item = Input(("check", "a.yaml", "x=1"), files={"a.yaml": b"a\nb\nc\nd\n", "other": b"x"})
    small = minimize(item, lambda one: b"c" in bytes(one.files.get("a.yaml", b"")))
    assert small == Input(("check",), files={"a.yaml": b"c"})


def test_inputs_are_stored_as_they_are(tmp_path: Path) -> None:
    files = {"a": b"text", "b": b"\xff\x00", "c": Special.FIFO, "d/e": Special.FOLDER}
    item = Input(("check", "\udcff"), "", ("model",), files)
    assert Input.from_json(json.loads(json.dumps(item.to_json()))) == item
    item.write_files(tmp_path)
    assert (tmp_path / "b").read_bytes() == b"\xff\x00" and (tmp_path / "c").is_fifo()
    assert (tmp_path / "d/e").is_dir()
