"""An export loads in plain transformers with equal logits, or there is an error and no folder."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
import unit.small as small
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.checkpoint.export import ExportOptions, export_run
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.config.load import STORED
from dist_ft.config.sections.tuning import TuningSection
from dist_ft.core.errors import CheckpointError
from dist_ft.core.world import Collectives, World
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.model.adapters import tuning
from dist_ft.model.trainable_model import tied_weight_aliases
from dist_ft.storage.filesystem import Store


def write_tokenizer(folder: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(small.VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def make_run(folder: str, engine: TorchEngine, steps: tuple[int, ...] = (1,)) -> Store:
    """Create the folder of a run with checkpoints at `steps`, one training step before each."""
    store = Store(folder)
    manager = CheckpointManager(store, small.checkpoints(keep_last=9), World(), Collectives(), 1)
    for step in steps:
        small.train(engine, range(step, step + 1))
        small.save(manager, engine, step)
    engine.module.model.config.save_pretrained(f"{folder}/model")
    write_tokenizer(f"{folder}/model")
    store.write(STORED, b"{}")
    return store


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a Llama with two checkpoints: its folder and its engine."""
    folder, engine = str(tmp_path_factory.mktemp("run") / "r"), small.make_engine()
    make_run(folder, engine, (1, 2))
    return folder, engine


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("gemma2", True)]
)
def test_the_exported_model_gives_the_trained_logits(family, tied, tmp_path):
    engine = small.make_engine(model=small.make_model(family, tie_word_embeddings=tied))
    assert bool(tied_weight_aliases(engine.module)) == tied
    make_run(str(tmp_path / "r"), engine)
    out = export_run(str(tmp_path / "r"), str(tmp_path / "deep" / "out"))
    assert out == str(tmp_path / "deep" / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(engine.module.model))
    assert (
        AutoTokenizer.from_pretrained(out).apply_chat_template(
            [{"role": "user", "content": "w1"}], tokenize=False
        )
        == "w1"
    )
    assert sorted(os.listdir(tmp_path / "deep")) == ["out"]
    assert not [name for name in os.listdir(out) if name.endswith((".bin", ".pt"))]


def test_export_of_a_step_and_of_a_dtype(run, tmp_path):
    folder, engine = run
    older, newer = (
        AutoModelForCausalLM.from_pretrained(
            export_run(folder, str(tmp_path / str(step)), ExportOptions(step=step))
        )
        for step in (1, 2)
    )
    assert not torch.equal(logits(older), logits(newer))
    assert torch.equal(logits(newer), logits(engine.module.model))
    half = AutoModelForCausalLM.from_pretrained(
        export_run(folder, str(tmp_path / "half"), ExportOptions(dtype="bfloat16"))
    )
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, newer.lm_head.weight.to(torch.bfloat16))


def rejection(run, out, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        export_run(str(run), str(out), ExportOptions(**options))
    return str(caught.value)


def test_a_nonempty_folder_is_rejected(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert os.listdir(export_run(run[0], str(tmp_path / "empty")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("dear")
    assert rejection(run[0], tmp_path / "full") == (
        f"--out={tmp_path}/full: the folder is not empty. Allowed: a new or an empty folder. "
        "Choose another one."
    )
    assert rejection(run[0], tmp_path / "full" / "mine") == (
        f"--out={tmp_path}/full/mine: it is a file. Allowed: a new or an empty folder. "
        "Choose another one."
    )
    assert (tmp_path / "full" / "mine").read_text() == "dear"


def test_a_missing_step_is_rejected(run, tmp_path):
    assert rejection(run[0], tmp_path / "x", step=7) == (
        f"--step=7: no checkpoint of {run[0]} has this step. Available: 1, 2. Choose one of them."
    )


def test_a_folder_without_a_run_is_rejected(tmp_path):
    assert rejection(str(tmp_path / "r"), tmp_path / "x") == (
        f"{tmp_path}/r: no committed checkpoint. Give the folder of a run (<storage>/<name>)."
    )


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run to damage."""
    return shutil.copytree(run[0], tmp_path / "copy")


def test_a_damaged_checkpoint_is_skipped_or_reported(copy, tmp_path):
    for step in (2, 1):
        with open(
            copy / f"checkpoints/step-00000000{step}-a0001/rank-00000-0000.safetensors", "r+b"
        ) as file:
            file.truncate(1000)
        if step == 2:
            assert "has 1000 bytes, but" in rejection(copy, tmp_path / "two", step=2)
            assert os.listdir(export_run(str(copy), str(tmp_path / "one")))
    assert rejection(copy, tmp_path / "none").startswith(
        f"{copy}/checkpoints: none of the 2 committed checkpoints can be loaded (the latest: "
    )
    assert sorted(os.listdir(tmp_path)) == ["copy", "one"]  # nothing incomplete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 3},
            r"model.layers.2.\S+ is absent in the checkpoint and \[.*\] in the model",
        ),
        (
            {"num_hidden_layers": 1},
            r"model.layers.1.\S+ is \[.*\] in the checkpoint and absent in the model",
        ),
        ({"intermediate_size": 40}, r"is \[32, 48\] in the checkpoint and \[32, 40\] in the model"),
    ],
)
def test_a_config_of_another_model_is_rejected(copy, tmp_path, changes, message):
    small.make_model(**changes).config.save_pretrained(copy / "model")
    text = rejection(copy, tmp_path / "x")
    assert re.search(
        rf"^{copy}/checkpoints/step-000000002-a0001: .*{message}\. Both must be the same\. Check model\.path\.$",
        text,
    )
    assert not (tmp_path / "x").exists()


def test_a_run_without_the_model_config_is_rejected(copy, tmp_path):
    os.remove(copy / "model" / "config.json")
    assert rejection(copy, tmp_path / "x") == (
        f"{copy}/model/config.json: the file is missing. Every run stores its config, and its "
        "model's config and tokenizer. Run `dist-ft train` with the run's config again, which "
        "writes them anew, or restore the file from a copy."
    )


def test_fault_26_a_run_without_its_config_is_not_exported(copy, tmp_path):
    """Its task and method would be guessed."""
    os.remove(copy / STORED)
    for options in (ExportOptions(), ExportOptions(adapter=True)):
        with pytest.raises(CheckpointError, match=r"run\.yaml: the file is missing"):
            export_run(str(copy), str(tmp_path / "x"), options)
    assert not (tmp_path / "x").exists()


def test_weights_that_change_on_reading_are_not_exported(copy, tmp_path, monkeypatch):
    """If transformers writes other weights than it holds, loading the folder again detects it."""
    from transformers import LlamaForCausalLM

    def spoil(self, folder, real=LlamaForCausalLM.save_pretrained, **options):
        self.model.norm.weight.data += 1e-3
        real(self, folder, **options)
        self.model.norm.weight.data -= 1e-3

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", spoil)
    assert re.search(
        r"the exported model does not give the same logits when loaded again \(largest difference [\d.e-]+, missing \[\]\)\. Nothing "
        r"was exported\. Report this model as a bug\.$",
        rejection(copy, tmp_path / "x"),
    )
    assert not (tmp_path / "x").exists()


def test_errors_contain_no_credentials(tmp_path):
    assert rejection("memory://me:secret@nowhere", tmp_path / "x").startswith(
        "memory://<redacted>@nowhere: no committed"
    )


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("expected", [None, "float32", "bfloat16"])
def test_an_adapter_is_merged_in_float32_for_every_dtype(trained, expected, tmp_path):
    """The model has rotary embeddings, whose frequencies must not be rounded with the weights."""
    section = TuningSection(method="lora", trainable="model.norm.*")
    model = small.make_model().to(getattr(torch, trained))
    model.config.dtype = getattr(torch, trained)
    tuning.apply_tuning(model, section, seed=1)
    engine = small.make_engine(model=model)
    store = make_run(str(tmp_path / "r"), engine, (1, 2, 3))
    store.write(
        STORED,
        json.dumps({"model": {"path": "x"}, "tuning": section.model_dump(mode="json")}).encode(),
    )
    out = AutoModelForCausalLM.from_pretrained(
        export_run(str(tmp_path / "r"), str(tmp_path / "out"), ExportOptions(dtype=expected))
    )
    assert out.dtype == getattr(torch, expected or trained)
    if (trained, expected) != ("bfloat16", "float32"):
        assert torch.allclose(
            logits(out).float(),
            logits(model).float(),
            atol=1e-4 if out.dtype == torch.float32 else 0.3,
        )
    assert set(dict(out.named_parameters())) == set(dict(small.make_model().named_parameters()))
    export_run(str(tmp_path / "r"), str(tmp_path / "adapter"), ExportOptions(adapter=True))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm"] and config["base_model_name_or_path"] == "x"
