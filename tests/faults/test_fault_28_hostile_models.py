"""Fault 28: hostile models, adapters and run folders, against every command that reads one."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from dist_ft.checkpoint.export import export_run
from dist_ft.cli import main
from dist_ft.config.load import load_config
from dist_ft.runtime import local

MAX_SECONDS = 60
COMMANDS = (
    "check",
    "plan",
    "train",
    "preview",
    "generate",
    "predict",
    "pseudo",
    "evaluate",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("hostile"), 16)


@pytest.fixture(scope="module")
def run(base: Path) -> str:
    """A finished run."""
    config = load_config(tiny.config(base, "run", schedule={"epochs": None, "steps": 2}))
    local.run(config)
    return config.run_url


class Hostile:
    """A copy of a model, and what must not happen.

    Attributes:
        folder: the model.
        marker: file that exists once code of the folder has run.
        outside: folder that a model must not be read from.
    """

    def __init__(self, folder: Path, marker: Path, outside: Path) -> None:
        self.folder = folder
        self.marker = marker
        self.outside = outside

    def edit(self, name: str, **changes: Any) -> None:
        path = self.folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes}))


@pytest.fixture
def hostile(base: Path, tmp_path: Path) -> Hostile:
    folder = tmp_path / "hostile"
    shutil.copytree(base / "model", folder)
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n"
    for name in ("code.py", "evil.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    outside = tmp_path / "outside"
    shutil.copytree(base / "model", outside)
    return Hostile(folder, marker, outside)


def own_code(model: Hostile) -> None:
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    model.edit("config.json", model_type="evil", auto_map=dict.fromkeys(classes, "code.Evil"))
    model.edit("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Evil"]})


def adapter(model: Hostile, base: Any) -> None:
    """Make the folder an adapter of `base`, a second folder with code."""
    second = model.folder.with_name("second")
    shutil.copytree(model.folder, second)
    own_code(Hostile(second, model.marker, model.outside))
    info = {"tuning": {"method": "lora"}, "base": base(second)}
    (model.folder / "dist_ft.json").write_text(json.dumps(info))


def index(model: Hostile, shard: str) -> None:
    (model.folder / "model.safetensors").unlink()
    names = {"transformer.wte.weight": shard}
    (model.folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )


ATTACKS: dict[str, Callable[[Hostile], None]] = {
    "own-code": own_code,
    "adapter-switch": lambda model: adapter(
        model, lambda second: {"path": str(second), "trust_remote_code": True}
    ),
    "adapter-of-code": lambda model: adapter(model, lambda second: {"path": str(second)}),
    "adapter-of-itself": lambda model: adapter(model, lambda second: {"path": str(model.folder)}),
    "adapter-of-a-server": lambda model: adapter(model, lambda second: {"path": "http://x/y"}),
    "adapter-types": lambda model: adapter(model, lambda second: [str(second)]),
    "peft": lambda model: model.edit(
        "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(model.outside)
    ),
    "index": lambda model: index(model, "../outside/model.safetensors"),
    "link": lambda model: (
        (model.folder / "model.safetensors").unlink(),
        (model.folder / "model.safetensors").symlink_to(model.outside / "model.safetensors"),
    )[0],
    "deep": lambda model: (
        (model.folder / "config.json").write_text('{"a":' * 9999 + "}" * 9999) and None
    ),
    "layers": lambda model: model.edit("config.json", n_layer=10**9),
    "vocabulary": lambda model: model.edit("config.json", vocab_size=10**14),
    "end-token": lambda model: model.edit("config.json", eos_token_id="</s>"),
    "pipe": lambda model: (
        (model.folder / "config.json").unlink(),
        os.mkfifo(model.folder / "config.json"),
    )[0],
}
NEED_WEIGHTS = {"index", "link", "peft", *(name for name in ATTACKS if name.startswith("adapter"))}
"""Attacks that commands without weights do not meet: they read config and tokenizer."""
NOT_MET = {("preview", "own-code")}
"""preview reads the tokenizer only, which transformers loads with a class of its own."""


def command_line(command: str, model: Path, base: Path, tmp_path: Path) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "say the fox", "text": "the fox"}\n')
    document = tiny.config(
        base, "hostile", schedule={"epochs": None, "steps": 1, "warmup_steps": 0}
    )
    document["model"]["path"] = str(model)
    document["run"]["storage"] = str(tmp_path / "runs")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    out = str(tmp_path / "out.jsonl")
    return {
        "check": ["check", str(config)],
        "plan": ["plan", str(config)],
        "train": ["train", str(config)],
        "preview": ["preview", str(config)],
        "generate": ["generate", str(model), "--prompt", "the fox"],
        "predict": ["predict", str(model), str(rows), "--out", out],
        "pseudo": ["data", "pseudo", str(model), str(rows), "--out", out],
        "evaluate": [
            *("evaluate", str(config), f"evaluation.data={base}/data/*.jsonl"),
            *("--model", str(model)),
        ],
    }[command]


def run_command(arguments: list[str], monkeypatch: Any, capsys: Any) -> tuple[int, str]:
    """Return exit code and standard error of a command; "y" stands on its standard input."""
    monkeypatch.setattr("sys.argv", ["dist-ft", *arguments])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert time.monotonic() - started < MAX_SECONDS
    captured = capsys.readouterr()
    assert sys.stdin.read() == "y\n" * 20, "standard input was read"
    assert "Traceback" not in captured.out + captured.err
    assert "unexpected" not in captured.out + captured.err
    code = ended.value.code
    return (code if isinstance(code, int) else 1), captured.out + captured.err


@pytest.mark.parametrize("attack", ATTACKS)
def test_fault_28_hostile_models_are_refused_in_one_line(
    base: Path, hostile: Hostile, tmp_path: Path, attack: str, monkeypatch: Any, capsys: Any
) -> None:
    ATTACKS[attack](hostile)
    for command in COMMANDS:
        arguments = command_line(command, hostile.folder, base, tmp_path)
        code, text = run_command(arguments, monkeypatch, capsys)
        is_met = command not in ("plan", "preview") or attack not in NEED_WEIGHTS
        if is_met and (command, attack) not in NOT_MET:
            assert code != 0, f"{command}: {text}"
            names = (f"{tmp_path}/hostile", f"{tmp_path}/second")
            assert any(name in text for name in names), f"{command}: {text}"
        assert not hostile.marker.exists(), f"{command} ran code of the model"


@pytest.mark.parametrize("attack", ["own-code", "end-token", "deep", "layers"])
def test_fault_28_hostile_run_folders_are_refused_in_one_line(
    run: str, tmp_path: Path, attack: str, monkeypatch: Any, capsys: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    marker = tmp_path / "executed"
    model = Hostile(folder / "model", marker, tmp_path)
    (model.folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    ATTACKS[attack](model)
    arguments = ["export", str(folder), "--out", str(tmp_path / "exported")]
    code, _ = run_command(arguments, monkeypatch, capsys)
    assert code != 0
    assert not marker.exists()
    assert not (tmp_path / "exported").exists()


def test_exported_models_and_runs_still_load(run: str, base: Path, tmp_path: Path) -> None:
    """The checks refuse nothing that dist_ft writes itself."""
    from dist_ft.inference.model_folder import PredictionOptions
    from dist_ft.inference.predict import Predictor

    folder = export_run(run, str(tmp_path / "exported"))
    options = PredictionOptions(max_new_tokens=4)
    (prediction,) = Predictor(folder, options).predict([{"prompt": "say the fox"}])
    assert isinstance(prediction["response"], str)


@pytest.mark.parametrize("command", ["preview", "train", "generate", "predict"])
def test_fault_28_templates_without_end_stop(
    base: Path, hostile: Hostile, tmp_path: Path, command: str, monkeypatch: Any, capsys: Any
) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    (hostile.folder / "chat_template.jinja").write_text(loops)
    arguments = command_line(command, hostile.folder, base, tmp_path)
    code, text = run_command(arguments, monkeypatch, capsys)
    assert code != 0
    assert "it needs more than 1,048,576 steps, or 128 MiB of text" in text
