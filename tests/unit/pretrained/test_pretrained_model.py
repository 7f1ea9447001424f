"""The door to models of others: nothing runs, nothing outside is read, each failure is one line."""

from __future__ import annotations

import builtins
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file

from dist_ft.config.schema import ModelSection, TaskSection
from dist_ft.core.errors import ModelError
from dist_ft.model.loading.load import load_task_model, load_tokenizer
from dist_ft.pretrained import export_info, pretrained_model, weight_files
from dist_ft.pretrained.pretrained_model import Source


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model, with weights in two files and an index."""
    target = tmp_path / "model"
    target.mkdir()
    for item in original.iterdir():
        (target / item.name).write_bytes(item.read_bytes())
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, target / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def load(folder: Path) -> Any:
    section = ModelSection(path=str(folder), dtype="float32")
    load_tokenizer(section)
    return load_task_model(TaskSection(), section).model


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900
    assert text.startswith("model.path=")
    return text


def test_whole_model_loads(folder):
    assert load(folder).num_parameters() > 0


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "num_hidden_layers", 10**9),
        ("config.json", "n_layer", 10**9),
        ("config.json", "vocab_size", 10**15),
        ("config.json", "n_embd", 2**40),
        ("config.json", "n_positions", 2**36),
        ("config.json", "num_labels", 10**12),
        ("config.json", "eos_token_id", "</s>"),
        ("config.json", "eos_token_id", [0, "x"]),
        ("config.json", "eos_token_id", -7),
        ("config.json", "eos_token_id", 1.5),
        ("config.json", "pad_token_id", True),
        ("config.json", "auto_map", 5),
        ("config.json", "auto_map", {"AutoConfig": 5}),
        ("config.json", "architectures", 5),
        ("config.json", "architectures", [5]),
        ("config.json", "id2label", [1]),
        ("config.json", "attn_implementation", "evil/kernel"),
        ("config.json", "text_config", {"attn_implementation": "evil/kernel"}),
        ("config.json", "transformers_weights", "../outside.safetensors"),
        ("config.json", "model_type", ["gpt2"]),
        ("generation_config.json", "eos_token_id", "</s>"),
        ("generation_config.json", "pad_token_id", {"a": 1}),
        ("tokenizer_config.json", "chat_template", 5),
        ("tokenizer_config.json", "chat_template", [{"name": "a"}]),
        ("tokenizer_config.json", "tokenizer_class", 5),
        ("tokenizer_config.json", "auto_map", "x"),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": []}),
        ("tokenizer_config.json", "fast_tokenizer_files", ["../../tokenizer.1.0.0.json"]),
        ("tokenizer_config.json", "fast_tokenizer_files", "x"),
    ],
)
def test_absurd_values_are_one_clear_line(folder, name, key, value):
    edit(folder, name, **{key: value})
    text = refused(folder)
    is_named = key in text or "leads out of the folder" in text
    assert is_named or key in ("n_positions", "model_type", "text_config")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "index"]
)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{torn", "Expecting"),
        (b"\xff\xfe\x00{", "utf-8"),
        (b"[1]", "holds a JSON list"),
        (b'"x"', "holds a JSON str"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "deep"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
    ids=["torn", "encoding", "list", "text", "very-deep", "deep", "digits"],
)
def test_damaged_json_is_one_clear_line(folder, name, content, problem):
    file = "model.safetensors.index.json" if name == "index" else name
    (folder / file).write_bytes(content)
    text = refused(folder)
    assert file in text
    assert problem in text or "recursion" in text


def test_huge_settings_are_refused(folder):
    with open(folder / "config.json", "r+b") as file:
        file.truncate(2**34)  # sparse
    assert "config.json has more than 16 MiB" in refused(folder)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "ABSOLUTE", "link.safetensors", 5, ""])
def test_shards_outside_of_the_folder_are_not_read(folder, tmp_path, shard):
    """Finding 3: an index may name only files of its folder, and a link may not leave it."""
    outside = tmp_path / "outside.safetensors"
    first = folder / "model-00001-of-00002.safetensors"
    outside.write_bytes(first.read_bytes())
    if shard == "ABSOLUTE":
        shard = str(outside)
    if shard == "link.safetensors":
        (folder / shard).symlink_to(outside)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for tensor, name in index["weight_map"].items():
        if name == first.name:
            index["weight_map"][tensor] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text = refused(folder)
    assert "leads out of the folder" in text or "names the file" in text


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat"],
)
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    if name == "chat":
        (tmp_path / "secret").write_text("x")
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    else:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert "leads out of the folder" in refused(folder)


def test_the_layout_of_the_hub_cache_is_read(folder, tmp_path):
    """A snapshot of the hub's cache holds links to the blobs of its repository, nothing else."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, item in enumerate(sorted(folder.iterdir())):
        item.rename(blobs / str(number))
        (snapshot / item.name).symlink_to(f"../../blobs/{number}")
    assert load(snapshot).num_parameters() > 0
    (snapshot / "vocab.txt").symlink_to("/etc/hostname")
    assert "leads out of the folder" in refused(snapshot)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "x.safetensors", "dist_ft.json"])
def test_pipes_do_not_hang(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert "is a named pipe, not a regular file" in refused(folder)


@pytest.mark.parametrize("announced", [0, 2**62, 99_999_999, 10**6])
def test_absurd_headers_of_weights_are_refused(folder, announced):
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(struct.pack("<Q", announced) + b"{}")
    assert "no safetensors file" in refused(folder)


def test_larger_config_than_weights_is_refused(folder):
    edit(folder, "config.json", vocab_size=40_000_000)
    assert "config.json describes a model of about" in refused(folder)


@pytest.mark.parametrize("answer", ["y", None])
def test_code_of_a_folder_never_runs_and_nothing_is_read_from_standard_input(
    folder, tmp_path, monkeypatch, answer
):
    """Finding 2: transformers would prompt where no permission is passed."""
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    edit(folder, "config.json", auto_map=classes, model_type="evil")
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "evil.py").read_text())

    def read(prompt: str = "") -> str:
        assert answer is not None, "standard input was read"
        return answer

    monkeypatch.setattr(builtins, "input", read)
    assert "needs to run code of its own" in refused(folder)
    with pytest.raises(ModelError, match="not allowed here"):
        pretrained_model.read_config(Source(str(folder), "run/model"))
    assert not marker.exists()


def test_custom_generation_of_a_known_model_does_not_run(folder, tmp_path):
    marker = tmp_path / "executed"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit(folder, "generation_config.json", custom_generate=str(folder))
    load(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ({"path": "BASE", "trust_remote_code": True}, "base.trust_remote_code is set"),
        ({"path": "BASE", "dtype": "bfloat16"}, "base.dtype is set"),
        ({"path": ["BASE"]}, "is no model"),
        ({"path": ""}, "is no model"),
        ({"revision": None}, "is no model"),
        ({"path": "BASE", "revision": 5}, "is no revision"),
        ({"path": "http://169.254.169.254/model"}, "names a server"),
        ({"path": "github://org:repo@main/x"}, "names a server"),
        ({"path": "simplecache::s3://b/x"}, "names a server"),
        ([], "base=[]"),
        ("BASE", "base=BASE"),
    ],
)
def test_adapters_give_only_path_and_revision_of_their_base(folder, tmp_path, base, problem):
    """Finding 1: the folder of an adapter turns no option on."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = json.dumps({"tuning": {"method": "lora"}, "base": base})
    (adapter / "dist_ft.json").write_text(content.replace("BASE", str(folder)))
    text = refused_adapter(adapter)
    assert problem in text.replace(str(folder), "BASE")


def refused_adapter(adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_task_model(TaskSection(), ModelSection(path=str(adapter), dtype="float32"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_adapters_that_are_their_own_base_are_refused(tmp_path, length):
    folders = [tmp_path / str(number) for number in range(length)]
    for number, adapter in enumerate(folders):
        adapter.mkdir()
        base = {"path": str(folders[(number + 1) % length])}
        (adapter / "dist_ft.json").write_text(
            json.dumps({"tuning": {"method": "lora"}, "base": base})
        )
    assert "is its own base model" in refused_adapter(folders[0])


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({"tuning": 5}, "tuning=5"),
        ({"tuning": {"method": "no-such"}, "base": {"path": "x"}}, "tuning.method"),
        ({"tuning": {"method": "lora", "lora": {"rank": 10**9}}, "base": {}}, "absurd"),
        ({"attention": "evil/kernel"}, "attention"),
        ({"attention": 5}, "attention"),
        ({"sequence_length": "long"}, "sequence_length"),
        ({"sequence_length": 10**30}, "sequence_length"),
        ({"prompt_template": 5}, "prompt_template"),
        ({"task": []}, "task"),
        ({"prompting": "x"}, "prompting"),
    ],
)
def test_damaged_export_info_is_one_clear_line(tmp_path, info, problem):
    (tmp_path / "dist_ft.json").write_text(json.dumps(info))
    with pytest.raises(ModelError) as caught:
        export_info.read_adapter_info(tmp_path, "model.path=x")
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_of_peft_are_not_followed(folder, tmp_path):
    """transformers would load the weights of the model that adapter_config.json names."""
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere")})
    )
    assert "holds an adapter of peft" in refused(folder)


def test_panic_of_a_tokenizer_is_one_clear_line(folder):
    """A pattern of tokenizer.json that takes too many steps panics in native code."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a|a ?b?)*c|[unclosed"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    assert "cannot load the tokenizer" in refused(folder)


@pytest.mark.parametrize("length", [{"a": 1}, [64], "64", True, 0, -1])
def test_a_longest_input_that_is_no_number_is_refused(folder, length):
    """transformers keeps any value, and `predict` compared it with numbers."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    assert "model_max_length=" in refused(folder)


def test_errors_of_native_code_pass_no_handler():
    class PanicException(BaseException):
        """Named as those of Rust's extension modules."""

    with (
        pytest.raises(ModelError, match="cannot load the tokenizer"),
        pretrained_model.loading_errors("model.path=x", "tokenizer"),
    ):
        raise PanicException("called `Option::unwrap()` on a `None` value\nmore")
    with (
        pytest.raises(KeyboardInterrupt),
        pretrained_model.loading_errors("model.path=x", "tokenizer"),
    ):
        raise KeyboardInterrupt


def test_files_of_tensors_are_those_of_the_folder(folder):
    files = weight_files.files_by_tensor(folder, "model")
    assert {path.parent for path in files.values()} == {folder}
    assert len(weight_files.tensor_shapes(folder, "model")) == len(files)
