"""The command line: frozen commands, exit codes, one text for every failure, a fast --help."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ft.cli import main as cli_main
from dist_ft.core.errors import StorageError

COMMANDS = {
    "init": {"folder", "--tiny"},
    "train": {"config", "overrides", "--skip-check"},
    "check": {"config", "overrides"},
    "plan": {"config", "overrides", "--gpu", "--gpus", "--model-config", "--json"},
    "preview": {"config", "overrides", "--samples"},
    "generate": {"model", "--prompt", "--system", "--max-new-tokens", "--strategy"},
    "export": {
        "run",
        "overrides",
        "--out",
        "--step",
        "--best",
        "--dtype",
        "--adapter",
        "--ema",
        "--int8",
    },
    "evaluate": {"config", "overrides", "--model", "--random-head", "--json"},
    "predict": {
        "model",
        "paths",
        "--out",
        "--workers",
        "--format",
        "--batch",
        "--max-new-tokens",
        "--strategy",
    },
    "decode": {"config", "overrides", "--model", "--strategy", "--json"},
    "drill": {"config", "overrides", "--scenario", "--keep", "--json"},
    "submit": {
        "config",
        "overrides",
        "--address",
        "--print",
        "--no-wait",
        "--project",
        "--package",
        "--exclude",
        "--shared",
        "--env",
        "--grace",
        "--skip-check",
        "--any-version",
    },
    "selftest": {"config", "overrides", "--check", "--keep", "--out"},
    "tune": {"config", "search", "overrides"},
    "stages": {"file", "overrides", "--skip-check"},
    "data inspect": {"paths"},
    "data import": {"kind", "paths", "--out", "--encoding", "--part"},
    "data split": {"paths", "--out", "--share", "--by", "--group", "--per-label", "--seed"},
    "data pseudo": {"model", "paths", "--out", "--confidence", "--max-per-label", "--batch"},
    "data preview": {"config", "overrides", "--samples"},
    "data pack-stats": {"config", "overrides"},
    "data write": {"config", "overrides", "--out", "--format", "--shard-mib", "--tokenize"},
    "data verify": {"run", "overrides", "--data"},
    "jobs list": {"--address"},
    "jobs status": {"name", "--address"},
    "jobs logs": {"name", "--follow", "--address"},
    "jobs stop": {"name", "--address"},
    "runs list": {"storage"},
    "runs show": {"run", "overrides"},
    "runs watch": {"run", "overrides", "--once"},
    "runs report": {"run", "overrides", "--out", "--attributions"},
    "runs verify": {"run", "overrides"},
    "runs diff": {"run", "overrides", "--step"},
    "runs prune": {"run", "overrides", "--keep-last", "--keep-every-steps", "--keep-best", "--yes"},
    "k8s render": {
        "config",
        "overrides",
        "--out",
        "--kustomize",
        "--overlay",
        "--with",
        "--image",
        "--namespace",
        "--workers-per-node",
        "--parameters",
        "--model-config",
        "--node-selector",
        "--set",
    },
    "k8s check": {"paths", "--crd", "--kubernetes"},
}


def run(*arguments, **env):
    """Run `dist-ft` in a process."""
    return subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


@pytest.fixture
def main(monkeypatch, capsys):
    """Return a function that runs `main` here and returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dist-ft", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli_main.main()
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    monkeypatch.delenv("DIST_FT_DEBUG", raising=False)
    return call


def test_the_commands_and_their_options_are_frozen():
    import typer.main

    found = {}
    every = dict(typer.main.get_command(cli_main.app).commands)  # type: ignore[attr-defined]
    for group in ("data", "jobs", "k8s", "runs"):
        every |= {f"{group} {name}": command for name, command in every.pop(group).commands.items()}
    for name, command in every.items():
        found[name] = {
            option if option.startswith("--") else parameter.name
            for parameter in command.params
            for option in parameter.opts[:1]
        }
    assert found == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_examples_and_a_next_step(main, command):
    code, text, _ = main(*command.split(), "--help")
    assert code == 0
    assert "Next: " in text
    assert len(re.findall(rf"^    dist-ft (data )?{command} ", text, re.MULTILINE)) == 2, (
        "two examples"
    )


def test_help_is_fast():
    """The aim is one second; the bound here is lenient because test machines are shared."""

    def once():
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start

    assert statistics.median(once() for _ in range(3)) < 2


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom dist_ft.cli import main as cli\nsys.argv = ['dist-ft', 'train', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'ray', 'deepspeed', 'datasets', 'fsspec', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SIX = """
run: {{name: x, storage: {storage}}}
model: {{path: {folder}/no-model, dtyp: float32}}
data: {{train: {folder}/none/*.jsonl}}
batch: {{global_batch: 7, micro_batch: 2, sequence_length: 64}}
optimizer: {{learning_rate: high}}
schedule: {{steps: 3, epochs: 1}}
"""


def test_check_names_all_six_mistakes_and_exits_2(tmp_path):
    """A misspelt key, a wrong type, two contradictions, no such model, no such data."""
    file = tmp_path / "six.yaml"
    file.write_text(SIX.format(folder=tmp_path, storage=tmp_path / "runs"))
    done = run("check", str(file))
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == f"dist-ft: {file}: 6 problems"
    assert [line.split(":")[0].removeprefix("  - ") for line in lines[1:]] == [
        "model.dtyp",
        "optimizer.learning_rate=high",
        "batch.global_batch=7",
        "schedule.steps=3",
        f"model.path={tmp_path}/no-model",
        f"data.train={tmp_path}/none/*.jsonl",
    ]
    assert all(re.search(r"\. [A-Z]", line) for line in lines[1:]), "each with a remedy"
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_check_of_a_good_run_prints_the_arithmetic(shared, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "once"}\n')
    file = tmp_path / "run.yaml"
    file.write_text(f"""
run: {{name: x, storage: {tmp_path / "runs"}}}
model: {{path: {shared("models/stories260k")}, dtype: float32}}
data: {{train: {tmp_path}/a.jsonl}}
batch: {{global_batch: 6, micro_batch: 2, sequence_length: 128}}
schedule: {{steps: 3}}
""")
    done = run("check", str(file), "schedule.steps=5")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        (
            "global batch  6 sequences = 3 lanes × micro-batch 2\n"
            "lanes         3 lanes in this process, one after another\n"
            "step tokens   6 sequences × 128 tokens = 768 at most\n"
            "length        5 steps × 768 tokens = 3,840 at most\n"
            "ok\n"
        ),
        "",
    )
    assert not (tmp_path / "runs").exists(), "nothing is written"


@pytest.mark.parametrize("command", ["train", "check", "preview"])
def test_a_missing_file_is_one_line(main, command):
    assert main(command, "/no/such.yaml") == (
        2,
        "",
        f"dist-ft: /no/such.yaml: 1 problem\n  - no such file (looked in {os.getcwd()}). Check the path.\n",
    )


def test_export_with_a_wrong_dtype_is_one_line(main):
    assert main("export", "runs/x", "--out", "out", "--dtype", "int8") == (
        2,
        "",
        "dist-ft: export: 1 problem\n  - --dtype=int8: unknown type. Allowed: bfloat16, float32. "
        "Use one of these.\n",
    )


def test_a_missing_argument_and_an_unknown_command(main):
    assert main("train")[0] == 2
    assert main("trian", "x")[0] == 2


def test_a_typed_error_prints_its_text_and_exits_with_its_code(main, monkeypatch):
    def fail(*args, **kwargs):
        raise StorageError("s3://b: cannot write it. Access is denied. Check credentials.")

    monkeypatch.setattr("dist_ft.config.load.load_config", fail)
    assert main("train", "x.yaml") == (
        1,
        "",
        "dist-ft: s3://b: cannot write it. Access is denied. Check credentials.\n",
    )


def test_ctrl_c_is_one_line_and_130(main, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_ft.config.load.load_config", stop)
    assert main("train", "x.yaml") == (
        130,
        "",
        "dist-ft: stopped by the user. Committed checkpoints are kept. The same command resumes.\n",
    )


def test_an_unexpected_error_is_one_line_that_names_a_log(main, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SECRET", "hush-hush-hush")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def break_down(*args, **kwargs):
        raise ZeroDivisionError("two\nlines of hush-hush-hush")

    monkeypatch.setattr("dist_ft.config.load.load_config", break_down)
    code, out, err = main("train", "x.yaml")
    assert (code, out) == (1, "")
    found = re.fullmatch(
        r"dist-ft: unexpected ZeroDivisionError: two lines of <MY_SECRET>\. This is a bug in dist_ft\. "
        r"The traceback is in (\S+)\. Please report it\.\n",
        err,
    )
    assert found
    log = Path(found[1]).read_text()
    assert "Traceback" in log
    assert "hush" not in log


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, of the same name."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
            "out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB.). Lower batch.micro_batch or "
            "batch.sequence_length",
        ),
        (
            MemoryError(),
            "out of memory (MemoryError). Use a machine with more memory, fewer workers on each",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried"
            ),
            "out of memory ([enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried)",
        ),
        (
            RuntimeError(
                "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41"
            ),
            "another worker ended ([gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41). Look for the",
        ),
    ],
)
def test_errors_of_libraries_are_explained(main, monkeypatch, error, expected):
    def fail(*args, **kwargs):
        raise ValueError("wrapped") from error

    monkeypatch.setattr("dist_ft.config.load.load_config", fail)
    code, out, err = main("train", "x.yaml")
    assert (code, out) == (1, "") and err.startswith(f"dist-ft: {expected}") and "report" not in err


def test_debug_shows_the_traceback(main, monkeypatch):
    monkeypatch.setenv("DIST_FT_DEBUG", "0")
    code, _, err = main("--debug", "check", "/no/such.yaml")
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("Check the path.\n")
