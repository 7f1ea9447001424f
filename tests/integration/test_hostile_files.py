"""Files of a run, configs and manifests as an enemy or bad luck would leave them.

Every command ends within seconds, with one clear text, an exit code of the documented ones, and no
control character on the terminal.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dist_ft.cli import main
from dist_ft.config.load import load_config, resolved_yaml

LIMIT_S = 15
ESCAPES = "\x1b]0;owned\x07 \x9b31m \r \u202e <script>alert(1)</script> [/] | `x` \udcff"
LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n \n",
    "torn": b'{"a": [1, {"b": ',
    "binary": bytes(range(256)) * 20,
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "list": b"[1, 2]",
    "text": b'"some text"',
    "number": b"1",
    "null": b"null",
    "object": b"{}",
    "wrong object": json.dumps(dict.fromkeys(("run", "model", "task", "step"), ESCAPES)).encode(),
    "NaN": b'{"step": NaN, "kind": "train", "loss": Infinity, "run": NaN, "attempt": NaN}',
    "digits": b'{"step": ' + b"9" * 5000 + b', "kind": "train"}',
    "large number": b'{"step": ' + b"9" * 400 + b', "kind": "train", "loss": ' + b"9" * 400 + b"}",
    "duplicate": b'{"step": 1, "step": 2}',
    "surrogate key": b'{"\\ud800": {"\\udcff": 1}, "step": 1, "kind": "evaluation"}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "deep, closed": b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "tag": b"!!python/object/apply:os.system [id]",
    "laughs": LAUGHS.encode(),
    "recursive": b"a: &a {b: *a}",
    "two documents": b"a: 1\n---\nb: 2\n",
}


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


def make_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": make_fifo,
    "folder": make_folder,
    "device": make_device,
    "loop": make_loop,
    "sparse": make_sparse,
    "socket": make_socket,
}
HOSTILE = (*CONTENTS, *KINDS)
QUICK = ("empty", "torn", "binary", "list", "deep lists", "laughs", "recursive", "tag", "pipe")
"""What the quick tests put in the place of a file; the slow ones put everything."""
SOME = [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow, id=kind) for kind in HOSTILE
]


def put(path: Path, kind: str) -> None:
    """Put something hostile in the place of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    else:
        KINDS[kind](path)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def dist_ft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Return a function that runs a command, and checks how every command must end."""

    def too_long(number: int, frame: Any) -> None:
        raise TimeoutError(f"still running after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, too_long)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr("sys.argv", ["dist-ft", *arguments])
        signal.alarm(LIMIT_S)
        started = time.monotonic()
        try:
            with pytest.raises(SystemExit) as ended:
                main.main()
        finally:
            signal.alarm(0)

        captured = capsys.readouterr()
        result = Ended(int(ended.value.code or 0), captured.out, captured.err)
        where = f"{arguments}: {result}"
        assert time.monotonic() - started < LIMIT_S, where
        assert result.code in (0, 1, 2), where
        assert "unexpected" not in result.err and "Traceback" not in result.err, where
        assert "still running" not in result.err, where
        # `runs verify` reports on stdout what is damaged, and exits with 1.
        assert bool(result.code) == bool(result.err) or arguments[1] == "verify", where
        # One line, or one for each problem of a config.
        others = result.err.splitlines()[1:]
        assert all(line.startswith("  - ") for line in others), where
        for char in result.out + result.err:
            assert char == "\n" or unicodedata.category(char) not in ("Cc", "Cs"), where
            assert char != "\u202e", where
        return result

    yield run
    signal.signal(signal.SIGALRM, before)


def document(folder: Path) -> dict[str, Any]:
    return {
        "run": {"name": "mine", "storage": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "*.jsonl")},
        "batch": {"global_batch": 2, "micro_batch": 1, "sequence_length": 16},
        "schedule": {"steps": 4},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with all its small files, as a run of four steps leaves them."""
    folder = tmp_path / "runs" / "mine"
    config = load_config(document(tmp_path))
    metrics = [
        {"step": 1, "kind": "train", "loss": 2.5, "learning_rate": 1e-5, "tokens_per_s": 10.0},
        {"step": 1, "kind": "evaluation", "loss": 2.25},
    ]
    files = {
        "run.yaml": resolved_yaml(config),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in metrics),
        "attempts/000001.json": json.dumps({"started_at": "2026-01-01", "world_size": 1}),
        "time/000001.json": json.dumps(
            {
                "attempt": 1,
                "begun_at": "2026-01-01T00:00:00+00:00",
                "resumed_at": 0,
                "seconds": {"train": 3.0},
                "marks": [[1, {"train": 1.0}]],
            }
        ),
        "evaluations/step-000000001.json": json.dumps(
            {
                "loss": 2.25,
                "by_label": {ESCAPES: {"f1": 0.5}, "b": {"f1": 1.0}},
                "confusion": [[1, 2], [0, 3]],
                "examples": [
                    {
                        "sample": 1,
                        "text": ESCAPES,
                        "expected": ESCAPES,
                        "predicted": "b",
                        "score": 0.75,
                    }
                ],
            }
        ),
        "data/data.train.json": "{}\n{}\n",
        "data/labels.json": json.dumps(["a", "b"]),
        "checkpoints/step-000000004-a0001/manifest.json": "{}",
        "checkpoints/step-000000002-a0001/manifest.json": "{}",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


FILES = (
    "run.yaml",
    "metrics.jsonl",
    "attempts/000001.json",
    "time/000001.json",
    "evaluations/step-000000001.json",
    "data/data.train.json",
    "data/labels.json",
    "checkpoints/step-000000004-a0001/manifest.json",
)


def commands(run: Path) -> list[list[str]]:
    out = str(run.parent.parent / "out")
    return [
        ["runs", "list", str(run.parent)],
        ["runs", "show", str(run)],
        ["runs", "watch", str(run), "--once"],
        ["runs", "report", str(run), "--out", out],
        ["runs", "verify", str(run)],
        ["runs", "diff", str(run), "--step", "2", "--step", "4"],
        ["runs", "prune", str(run)],
        ["data", "verify", str(run)],
        ["export", str(run), "--out", out],
    ]


def test_the_run_is_read_where_it_is_sound(run: Path, dist_ft: Command, tmp_path: Path) -> None:
    assert dist_ft("runs", "show", str(run)).code == 0
    assert dist_ft("runs", "report", str(run), "--out", str(tmp_path / "out")).code == 0
    assert dist_ft("runs", "list", str(run.parent)).code == 0


def test_a_report_of_hostile_texts_holds_no_markup(
    run: Path, dist_ft: Command, tmp_path: Path
) -> None:
    dist_ft("runs", "report", str(run), "--out", str(tmp_path / "out"))
    for suffix in ("html", "md"):
        text = (tmp_path / "out" / f"report.{suffix}").read_text()
        assert "<script>" not in text and "alert(1)" in text
        assert not any(unicodedata.category(char) == "Cc" for char in text.replace("\n", ""))
        assert "\u202e" not in text

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["examples"][0]["text"] == ESCAPES


# A damaged small file that every reader of runs needs, and one that only some do.
@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("name", ["run.yaml", "attempts/000001.json"])
def test_hostile_files_of_a_run(name: str, kind: str, run: Path, dist_ft: Command) -> None:
    put(run / name, kind)
    for arguments in commands(run)[:4]:
        dist_ft(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", FILES)
def test_every_command_on_every_hostile_file(
    name: str, kind: str, run: Path, dist_ft: Command
) -> None:
    put(run / name, kind)
    for arguments in commands(run):
        dist_ft(*arguments)


def test_names_of_files_in_a_run_are_anything(run: Path, dist_ft: Command) -> None:
    names = ("\x1b]0;owned\x07", "\r\n", "\u202e", os.fsdecode(b"\xff"), "9" * 200)
    for folder in ("attempts", "time", "evaluations", "checkpoints", "data", "ledger", "."):
        (run / folder).mkdir(exist_ok=True)
        for name in names:
            (run / folder / f"{name}.json").write_text("{}")
            (run / folder / name).mkdir(exist_ok=True)
        (run.parent / names[0]).mkdir(exist_ok=True)
        (run.parent / names[0] / "run.yaml").write_text("a: 1")
    for arguments in commands(run):
        dist_ft(*arguments)


def config_commands(path: Path) -> list[list[str]]:
    return [
        ["check", str(path)],
        ["plan", str(path)],
        ["train", str(path)],
        ["stages", str(path)],
        ["tune", str(path.parent / "good.yaml"), str(path)],
        ["k8s", "check", str(path)],
        ["runs", "show", str(path)],
    ]


@pytest.mark.parametrize("kind", [*SOME, "large"])
def test_hostile_configs(kind: str, dist_ft: Command, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(document(tmp_path)))
    path = tmp_path / "bad.yaml"
    if kind == "large":
        path.write_text("a: 1\n" * 3_000_000)
    else:
        put(path, kind)

    # A manifest may be larger than a config, so it takes longer.
    for arguments in config_commands(path)[: -2 if kind == "large" else None]:
        assert dist_ft(*arguments).code == 2


BROKEN_FIELDS: dict[str, str] = {
    "mixing without until_step": "data: {mixing: [{weights: [1]}]}",
    "mixing without weights": "data: {mixing: [{until_step: 3}]}",
    "mixing of texts": "data: {mixing: [a, b]}",
    "mixing of another key": "data: {mixing: [{until: 3}]}",
    "mixing of wrong weights": "data: {mixing: [{until_step: 1, weights: [a]}]}",
    "mixing of weights that are none": "data: {mixing: [{until_step: 1, weights: 5}]}",
    "mixing that is a mapping": "data: {mixing: {until_step: 1}}",
    "mixing of infinity": "data: {mixing: [{until_step: 1, weights: [.inf]}]}",
    "train without path": "data: {train: [{weight: 1}]}",
    "train of numbers": "data: {train: [1, null]}",
    "train of nothing": "data: {train: []}",
    "train with infinity": "data: {train: [{path: a.jsonl, weight: .inf}]}",
    "labels that are none": "task: {labels: [1, {a: 2}]}",
    "templates that are none": "prompting: {templates: [1]}",
    "workers of texts": "cluster: {workers: [a, b]}",
    "resources of texts": "cluster: {resources_per_worker: {a: b}}",
    "options of texts": "storage: {options: {s3: 5}}",
    "class weights": "task: {class_weights: [.inf, -1]}",
    "a huge number": f"schedule: {{steps: {10**60}}}",
    "a surrogate": 'run: {name: "a\\ud800"}',
    "a surrogate as a key": '"\\ud800": {a: 1}',
    "a surrogate deep in a value": 'zero: {deepspeed: {a: ["\\udcff"]}}',
    "a NUL": 'run: {storage: "a\\0b"}',
    "a section that is a list": "evaluation: [1]",
    "a section that is a number": "model: 5",
    "a date": "run: {name: 2024-01-01}",
    "a key that is null": "null: {a: 1}",
}


@pytest.mark.parametrize("text", BROKEN_FIELDS.values(), ids=BROKEN_FIELDS)
def test_a_broken_field_is_a_line_and_hides_no_other(
    text: str, dist_ft: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = document(tmp_path)
    for section, fields in (yaml.safe_load(text) or {}).items():
        base = values.get(section)
        merged = (
            {**base, **fields} if isinstance(base, dict) and isinstance(fields, dict) else fields
        )
        values[section] = merged
    values["batch"]["sequence_length"] = -5
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=False))

    from dist_ft.config.load import inspect_config

    problems = inspect_config(str(path)).problems
    assert any(problem.startswith("batch.sequence_length=-5") for problem in problems)
    assert len(problems) >= 2 and not any("pydantic" in problem for problem in problems)
    assert all("\n" not in problem for problem in problems)


def test_a_phase_without_its_step_names_the_field(tmp_path: Path) -> None:
    from dist_ft.config.load import inspect_config

    values = document(tmp_path)
    values["data"]["mixing"] = [{"weights": [1]}, {"until_step": -1, "weights": ["a"]}, "b"]
    problems = inspect_config(values).problems
    assert problems[0].startswith("data.mixing.0.until_step: missing.")
    assert problems[1].startswith("data.mixing.1.until_step=-1: out of range.")
    assert 'data.mixing.1.weights=["a"]: not a list of numbers.' in problems[2]
    assert problems[3].startswith("data.mixing.2=b: not a section.")


def test_shards_whose_name_is_not_utf8(dist_ft: Command, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / os.fsdecode(b"\x1b[31m\xff\n.jsonl")).write_text('{"text": "a"}\n')
    ended = dist_ft("data", "inspect", str(folder))
    assert ended.code == 2
    assert "is not UTF-8" in ended.err and "\\x1b[31m\\udcff\\n.jsonl" in ended.err


@pytest.mark.parametrize("kind", KINDS)
def test_shards_that_are_no_files(kind: str, dist_ft: Command, tmp_path: Path) -> None:
    if kind in ("folder", "sparse"):
        pytest.skip("a folder is searched; a sparse file is a file")
    path = tmp_path / "a.jsonl"
    KINDS[kind](path)
    assert dist_ft("data", "inspect", str(path)).code in (1, 2)


ROWS = {
    "surrogate key": '{"\\ud800": "a"}',
    "surrogate": '{"text": "\\ud83d"}',
    "escape": json.dumps({"text": ESCAPES, ESCAPES: 1}),
    "deep": '{"text": ' + "[" * 90 + "]" * 90 + "}",
    "deeper": '{"text": ' + "[" * 9000 + "]" * 9000 + "}",
    "duplicate": '{"text": "a", "text": "b"}',
    "digits": '{"text": ' + "9" * 5000 + "}",
    "NaN": '{"text": NaN}',
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_hostile_rows(row: str, dist_ft: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + row + '\n{"text": "b"}\n')
    assert dist_ft("data", "inspect", str(path)).code == 0
    out = tmp_path / "out"
    dist_ft(
        "data", "split", str(path), "--out", str(out), "--share", "train=0.5", "--share", "t=0.5"
    )
