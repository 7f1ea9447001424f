"""Only whole, safe, causal models are loaded, and no code that comes with one runs."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from uuid import uuid4

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertModel, ByT5Tokenizer
from unit.small import make_model

from dist_ft.config.schema import ModelSection
from dist_ft.core.errors import ModelError, StorageError
from dist_ft.model.loading.download import fetch_model
from dist_ft.model.loading.load import (
    build_uninitialized_model,
    check_loading_report,
    load_causal_lm,
    load_tokenizer,
    read_config,
)
from dist_ft.storage.filesystem import Store


def section(path, **fields) -> ModelSection:
    return ModelSection(**{"path": str(path), "dtype": "float32", **fields})


def refused(action, path, **fields) -> str:
    with pytest.raises(ModelError) as caught:
        action(section(path, **fields))
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def weights(folder):
    """Return a function that changes the tensors in the model's only weight file."""

    def change(edit):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def test_weights_equal_the_files(folder):
    model = load_causal_lm(section(folder))
    expected = load_file(folder / "model.safetensors")
    assert {name for name, _ in model.named_parameters()} == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"


def test_dtype_attention_and_activation_checkpointing_are_applied(folder):
    model = load_causal_lm(
        section(folder, dtype="bfloat16", attention="eager", activation_checkpointing=True)
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager" and model.is_gradient_checkpointing


def test_uninitialized_model_has_the_structure_only(folder):
    empty, full = (
        build_uninitialized_model(section(folder, attention="eager")),
        load_causal_lm(section(folder)),
    )
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in full.named_parameters()
    }
    assert not all(
        torch.equal(a, b) for a, b in zip(empty.parameters(), full.parameters(), strict=True)
    )
    empty.load_state_dict(full.state_dict())
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():  # buffers that are computed, not saved (rotary frequencies), are set too
        assert torch.allclose(empty.eval()(tokens).logits, full.eval()(tokens).logits, atol=1e-5)


# Refused models


def test_fault_23_pickles_are_not_read(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"lm_head.weight": Bomb()}, folder / "pytorch_model.bin")
    os.remove(folder / "model.safetensors")
    text = refused(load_causal_lm, folder)
    assert re.match(
        rf"model\.path={folder}: cannot load the weights \(OSError: .*model\.safetensors.*\)\. "
        r"Check that the folder holds what save_pretrained writes.$",
        text,
    )
    assert not (tmp_path / "pwned").exists()


def test_missing_weight_is_refused(folder, weights):
    weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert refused(load_causal_lm, folder) == (
        f"model.path={folder}: 1 weights are missing in the files, such as "
        "model.layers.1.mlp.up_proj.weight. They would start from random values. Check that "
        "config.json belongs to the *.safetensors."
    )


def test_weight_of_another_shape_is_refused(folder, weights):
    weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert refused(load_causal_lm, folder) == (
        f"model.path={folder}: 1 weights are of another shape in the files, such as "
        "model.norm.weight ([31], the model has [32]). They would start from random values. Check "
        "that config.json belongs to the *.safetensors."
    )


def test_unused_tensor_is_reported(folder, weights, caplog, capfd):
    weights(lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    with caplog.at_level("WARNING", "dist_ft"):
        load_causal_lm(section(folder))
    assert caplog.messages == [
        f"model.path={folder}: 1 tensors of the files have no place in the model, such as "
        "model.extra.weight"
    ]
    assert "REPORT" not in capfd.readouterr().err  # of transformers


def test_truncated_file_is_refused(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    assert f"model.path={folder}: cannot load the weights (" in refused(load_causal_lm, folder)


@pytest.mark.parametrize(
    ("kind", "problem"), [("missing_keys", "missing in the files"), ("error_msgs", "not readable")]
)
def test_problems_in_the_loading_report_raise(kind, problem):
    with pytest.raises(
        ModelError,
        match=rf"model\.path=p: 2 weights are {problem}, such as a\.w\. They would start from",
    ):
        check_loading_report("p", {kind: {"b.w", "a.w"}})
    check_loading_report("p", {"unexpected_keys": {"rotary.inv_freq"}})


@pytest.mark.parametrize("action", [read_config, load_causal_lm, load_tokenizer])
def test_code_that_comes_with_a_model_does_not_run(folder, tmp_path, action):
    """Config and tokenizer that name code of their own are refused; it is never imported."""
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "evil", "auto_map": classes})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    text = refused(action, folder)
    assert (
        "It needs to run code of its own: read that code, then set model.trust_remote_code=true"
        in text
    )
    assert not marker.exists()


def test_known_model_with_code_of_its_own_runs_none_of_it(folder, tmp_path):
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}})
    )
    assert type(load_causal_lm(section(folder))).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


@pytest.mark.parametrize(
    "path", ["/no/such/model", "./no-such", "a/b/c", "model", "file:///no/such", "~/no-such-model"]
)
def test_absent_folder_is_refused(path):
    assert refused(load_causal_lm, path) == (
        f"model.path={path}: the folder does not exist. Give a model folder, an fsspec URL of one, "
        "or a hub name such as org/name."
    )


def test_unknown_hub_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert re.match(
        r"model\.path=nobody/nothing-at-all: the folder does not exist here, and the hub does not "
        r"provide it \(\w+\)\. Check the spelling, set HF_TOKEN for a gated model, or give a "
        r"local folder.$",
        refused(load_causal_lm, "nobody/nothing-at-all"),
    )


def test_folder_without_a_model_is_refused(tmp_path):
    assert f"model.path={tmp_path}: cannot load the config (" in refused(read_config, tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    assert f"model.path={tmp_path}: cannot load the config (" in refused(read_config, tmp_path)


def test_encoder_is_refused_for_causal_lm(tmp_path):
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    BertModel(BertConfig(**small)).save_pretrained(tmp_path)
    assert refused(read_config, tmp_path) == (
        f"model.path={tmp_path}: a bert model cannot continue text. Only causal language "
        "models are allowed. Choose another model."
    )
    BertConfig(**small, is_decoder=True).save_pretrained(tmp_path)
    assert read_config(section(tmp_path)).is_decoder


def test_encoder_decoder_is_refused_for_causal_lm(shared):
    path = shared("models/bart-g2p-us")
    assert refused(read_config, path).startswith(
        f"model.path={path}: a bart model cannot continue text. "
    )


def test_image_model_is_refused(tmp_path):
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    assert "a vit model cannot continue text" in refused(read_config, tmp_path)


def test_unsupported_attention_is_refused(tmp_path):
    make_model("gemma2").save_pretrained(tmp_path)
    text = refused(load_causal_lm, tmp_path)
    assert "Gemma2ForCausalLM does not support" in text and text.endswith(
        ". Set model.attention=eager."
    )


# Buckets


@pytest.fixture
def bucket(folder):
    """The URL of a model in (the memory) object storage."""
    store = Store(f"memory://{uuid4().hex}/model")
    for path in folder.iterdir():
        store.write(path.name, path.read_bytes())
    store.write("optimizer.pt", b"a pickle")
    return store


def test_model_in_a_bucket_is_downloaded_once(bucket, tmp_path):
    folder = fetch_model(bucket.url, cache_dir=str(tmp_path / "cache"))
    assert folder.startswith(str(tmp_path / "cache" / "models"))
    assert sorted(os.listdir(folder)) == [
        ".complete",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    bucket.remove("")
    assert fetch_model(bucket.url, cache_dir=str(tmp_path / "cache")) == folder
    assert load_causal_lm(section(bucket.url), str(tmp_path / "cache")).config.model_type == "llama"


def test_one_of_many_workers_downloads(bucket, tmp_path, monkeypatch):
    fetched, results = [], []
    monkeypatch.setattr(
        Store,
        "download",
        lambda self, folder, is_selected, real=Store.download: (
            fetched.append(self.url),
            real(self, folder, is_selected),
        )[1],
    )
    workers = [
        threading.Thread(
            target=lambda: results.append(fetch_model(bucket.url, cache_dir=str(tmp_path)))
        )
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert fetched == [bucket.url] and len(results) == 4 and len(set(results)) == 1


def test_interrupted_download_is_repeated(bucket, tmp_path):
    folder = Path(fetch_model(bucket.url, cache_dir=str(tmp_path)))
    (folder / ".complete").unlink()
    (folder / "model.safetensors").write_bytes(b"torn")
    fetch_model(bucket.url, cache_dir=str(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == bucket.read("model.safetensors")


def test_bucket_without_a_model_is_refused(tmp_path):
    url = f"memory://user:pass@{uuid4().hex}"
    with pytest.raises(ModelError) as caught:
        fetch_model(url, cache_dir=str(tmp_path))
    assert str(caught.value) == (
        f"model.path=memory://<redacted>@{url.split('@')[1]}: it has no config.json. Give the "
        "folder that save_pretrained wrote (config.json, *.safetensors, tokenizer files)."
    )


def test_absent_bucket_is_refused(tmp_path):
    with pytest.raises(StorageError, match="nosuch://x: cannot list it"):
        fetch_model("nosuch://x", cache_dir=str(tmp_path))


# Tokenizers


def test_tokenizer_without_a_fast_version_is_refused(folder):
    ByT5Tokenizer().save_pretrained(folder)
    assert refused(load_tokenizer, folder) == (
        f"model.path={folder}: its tokenizer has no fast version (tokenizer.json), which loss "
        "masks need. Convert it with transformers first."
    )


def test_missing_tokenizer_is_refused(folder):
    assert f"model.path={folder}: cannot load the tokenizer (" in refused(load_tokenizer, folder)


def test_configured_tokenizer_and_template_are_used(shared, folder, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    path = shared("models/stories260k")
    tokenizer = load_tokenizer(section(folder, tokenizer=str(path), chat_template=str(template)))
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    )
    assert refused(load_tokenizer, path, chat_template=str(tmp_path / "absent")) == (
        f"model.chat_template={tmp_path}/absent: cannot read it (No such file or directory). Give "
        "a file with a Jinja template."
    )


def test_real_model_loads(shared):
    model = load_causal_lm(section(shared("models/stories260k")))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 403, 407, 261, 378]])).logits
    assert torch.isfinite(logits).all() and logits.std() > 1


def test_uninitialized_model_has_the_same_end_tokens(folder):
    """A resumed run generates the same: end tokens may be in generation_config.json only."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 7]}))
    empty, full = build_uninitialized_model(section(folder)), load_causal_lm(section(folder))
    assert empty.generation_config.eos_token_id == full.generation_config.eos_token_id == [2, 7]
    file.unlink()
    assert (
        build_uninitialized_model(section(folder)).generation_config.eos_token_id
        == load_causal_lm(section(folder)).generation_config.eos_token_id
        == 2
    )
