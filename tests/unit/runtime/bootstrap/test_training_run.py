"""From config to a trained run in this process: what is refused, stored, resumed."""

from __future__ import annotations

import io
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import history
import pytest
import tiny
from safetensors.torch import load_file, save_file

from dist_ft.checkpoint import discovery
from dist_ft.config.load import load_config
from dist_ft.core.errors import CheckpointError, ConfigError, DataError, ModelError
from dist_ft.core.world import World
from dist_ft.runtime import local
from dist_ft.runtime.bootstrap import training_run
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import Console
from dist_ft.training.run_context import RunContext


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("build"), 40)


@pytest.fixture
def document(base):
    """A run of four steps with a name of its own."""
    return tiny.config(
        base,
        f"run-{uuid4().hex[:8]}",
        schedule={"epochs": None, "steps": 4},
        evaluation={"data": str(base / "data" / "shard-0.jsonl"), "max_samples": 5},
    )


def go(document, **changes) -> tuple:
    """Run `document` here; return (result, what the console showed)."""
    stream = io.StringIO()
    document = {
        section: {**fields, **changes.get(section, {})} for section, fields in document.items()
    }
    return local.run(load_config(document), RunContext(console=Console(stream))), stream.getvalue()


def store_of(document) -> Store:
    return Store(f"{document['run']['storage']}/{document['run']['name']}")


def test_run_stores_what_resume_and_export_need(document):
    result, shown = go(document)
    store = store_of(document)
    assert store.list() == [
        "attempts",
        "checkpoints",
        "data",
        "ledger",
        "metrics.jsonl",
        "model",
        "run.yaml",
        "time",
    ]
    assert {"config.json", "tokenizer.json", "chat_template.jinja", ".complete"} <= set(
        store.walk("model")
    ) | {name.removeprefix("model/") for name in store.walk("model")}
    assert json.loads(store.read("attempts/000001.json"))["world_size"] == 1
    manifest = discovery.load_manifest(store, discovery.list_committed(store)[0])
    assert (
        manifest.aliases == {"lm_head.weight": "transformer.wte.weight"}
        and manifest.engine == "TorchEngine"
    )
    assert list(manifest.tensors["transformer.wpe.weight"].shape) == [64, 32]
    assert manifest.evaluation == {
        "before": result.evaluation_before,
        "after": result.evaluation_after,
        "loss": result.evaluation_after,
        "perplexity": pytest.approx(math.exp(result.evaluation_after)),
    }, "for the best"
    assert (
        f"run {document['run']['name']}" in shown
        and "plain PyTorch, float32, attention sdpa" in shown
    )
    assert (
        f"run {document['run']['name']}: done" in shown
        and result.evaluation_after < result.evaluation_before
    )


def test_complete_run_is_not_trained_again(document):
    first, _ = go(document)
    again, shown = go(document)
    assert shown == (
        f"run {document['run']['name']} is complete: step 4 of 4 is committed; raise schedule.steps to continue, "
        "or export it\n"
    )
    assert again == replace(first, loss=None)
    longer, shown = go(document, schedule={"steps": 6})
    assert longer.step == 6 and "step 4 of 6 (attempt 2)" in shown, (
        "a complete run starts no attempt"
    )
    assert longer.evaluation_before == first.evaluation_before
    assert len(history.losses(store_of(document).url)) == 6


def test_same_run_name_with_another_identity_is_refused(document):
    go(document)
    with pytest.raises(ConfigError, match=r"run\.seed"):
        go(document, run={"seed": 12})
    assert store_of(document).list("attempts") == ["000001.json"]


def test_start_that_fails_early_starts_no_attempt(document):
    """After a mistaken second start, the first one must still be able to commit."""
    go(document, schedule={"steps": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training_run,
            "build_loaders",
            lambda *_: (_ for _ in ()).throw(DataError("no such file here")),
        )
        with pytest.raises(DataError, match="no such file here"):
            go(document)
    assert store_of(document).list("attempts") == ["000001.json"]


def test_damaged_checkpoint_is_trained_again_to_the_same_losses(document):
    go(document, checkpoint={"every_steps": 2})
    store = store_of(document)
    losses, last = history.losses(store.url), store.full_url("checkpoints/step-000000004-a0001")
    with open(f"{last}/rank-00000-0000.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\0\1\2")
    result, _ = go(document, checkpoint={"every_steps": 2})
    assert history.losses(store.url) == losses
    assert result.checkpoint.endswith("step-000000004-a0002")
    assert discovery.list_committed(store) == ["step-000000004-a0002", "step-000000002-a0001"]


def test_more_workers_than_lanes_is_refused(document):
    config = load_config(document)
    with pytest.raises(
        ConfigError,
        match=r"cluster\.workers=6: more workers than the 5 lanes \(global_batch / micro_batch\)\. Use "
        r"at most 5 workers or raise batch\.global_batch",
    ):
        training_run.run(config, World(0, 6), RunContext())


def test_one_process_config_is_refused_in_a_larger_world(document):
    with pytest.raises(
        ConfigError,
        match=r"cluster\.workers=0: means one process, and this is one of 2 \(WORLD_SIZE\)\. Set "
        r"cluster\.workers=2, or start one process",
    ):
        training_run.run(load_config(document), World(0, 2), RunContext())
    assert not store_of(document).exists()


def test_model_of_another_shape_is_refused_on_resume(document, tmp_path):
    """The folder at model.path was replaced by a model of another shape."""
    tiny.make_model(tmp_path / "model")
    model = {"path": str(tmp_path / "model")}
    go(document, model=model, schedule={"steps": 2})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "n_inner": 100}))
    with pytest.raises(
        CheckpointError,
        match=r"transformer\.h\.0\.mlp\.c_fc\.bias is \[128\] in the checkpoint and \[100\] in "
        r"the model\. Both must be the same\. Check model\.path\.",
    ):
        go(document, model=model)


def test_missing_weights_stop_the_run_before_step_1(document, tmp_path):
    tiny.make_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError,
        match=r"1 weights are missing in the files, such as transformer\.h\.1\.mlp\.c_fc\.weight",
    ):
        go(document, model={"path": str(tmp_path / "model")})
    assert not store_of(document).exists("metrics.jsonl")


def test_secrets_stay_out_of_the_runs_storage(document, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret0123")
    go(document)
    store = store_of(document)
    assert len(store.walk()) > 8
    assert not [name for name in store.walk() if b"hf_verysecret0123" in store.read(name)]


def test_stored_index_is_reused(document, base):
    go(document)
    before = {name: store_of(document).read(name) for name in store_of(document).walk("data")}
    assert {re.sub(r"\..*", "", name) for name in before} == {"data/data", "data/evaluation"}
    go(document, schedule={"steps": 5})
    assert before == {
        name: store_of(document).read(name) for name in store_of(document).walk("data")
    }
