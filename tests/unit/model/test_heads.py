"""Heads: which are new, their initial values and labels, and which models can do a task."""

from __future__ import annotations

import json

import pytest
import tiny_tasks
import torch

from dist_ft.config.schema import ModelSection, TaskSection, TuningSection
from dist_ft.core.errors import ModelError
from dist_ft.model import heads
from dist_ft.model.adapters import tuning
from dist_ft.model.loading.load import load_task_model, read_config
from dist_ft.tasks.regression import Regression


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tasks.base(tmp_path_factory.mktemp("models"))


def section(path) -> ModelSection:
    return ModelSection(path=str(path), dtype="float32")


def task(name="sequence_classification", *labels, **values) -> TaskSection:
    return TaskSection.model_validate({"name": name, "labels": labels, **values})


def test_head_that_is_not_in_the_files_is_new(folder):
    model, new = load_task_model(
        task("sequence_classification", "a", "b", "c"), section(folder / "bert")
    )
    assert new == {
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    assert (
        model.config.id2label == {0: "a", 1: "b", 2: "c"}
        and model.config.problem_type == "single_label_classification"
    )
    _, new = load_task_model(task("masked_lm"), section(folder / "bert"))
    assert not new
    _, new = load_task_model(task("question_answering"), section(folder / "bert"))
    assert new == {"qa_outputs.weight", "qa_outputs.bias"}


def test_embedding_models_have_no_pooler(folder):
    model, new = load_task_model(task("embedding"), section(folder / "bert"))
    assert not new and not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_missing_base_model_weight_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_tasks.make_encoder(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in held if "layer.0" in name)
    held.pop(gone)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 weights are missing in the files, such as bert\.encoder\.layer\.0"
    ):
        load_task_model(task("sequence_classification", "a", "b"), section(tmp_path))


def test_head_for_other_labels_is_refused_or_replaced(folder, tmp_path):
    model, _ = load_task_model(task("sequence_classification", "a", "b"), section(folder / "bert"))
    model.save_pretrained(tmp_path)
    same, new = load_task_model(task("sequence_classification", "a", "b"), section(tmp_path))
    assert not new and torch.equal(same.classifier.weight, model.classifier.weight)
    for labels in (("b", "a"), ("a", "b", "c")):
        with pytest.raises(ModelError, match="has a head for a, b, but the labels are"):
            load_task_model(task("sequence_classification", *labels), section(tmp_path))
        _, new = load_task_model(
            task("sequence_classification", *labels, new_head=True), section(tmp_path)
        )
        assert new == {"classifier.weight", "classifier.bias"}


def test_head_is_refused_if_no_labels_are_known(folder, tmp_path):
    model, _ = load_task_model(task("sequence_classification", "a", "b"), section(folder / "bert"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has a head for a, b, but the labels are"):
        read_config(section(tmp_path), None, task("sequence_classification"))


def test_one_label_is_a_class_and_not_a_number(folder):
    """A head that grows may start from one label; `dist-ft predict` tells tasks apart by this."""
    config = read_config(section(folder / "bert"), None, task("sequence_classification", "a"))
    assert config.problem_type == "single_label_classification"
    config = read_config(section(folder / "bert"), None, task("regression"))
    assert config.problem_type == "regression" and config.id2label == {0: "score"}


@pytest.mark.parametrize(
    ("name", "model", "text"),
    [
        (
            "causal_lm",
            "bert",
            "a bert model cannot continue text. Only causal language models are allowed. Choose "
            "another model.",
        ),
        (
            "seq2seq",
            "bert",
            "a bert model cannot generate a text from a text. Only encoder-decoders are allowed",
        ),
        (
            "masked_lm",
            "bart",
            "a bart model cannot predict masked tokens. Only encoders such as BERT are allowed",
        ),
        ("token_classification", "bart", "a bart model cannot tag words. "),
    ],
)
def test_model_that_cannot_do_the_task_is_refused(folder, name, model, text):
    with pytest.raises(ModelError) as caught:
        read_config(
            section(folder / model),
            None,
            task(name, *(("a", "b") if name == "token_classification" else ())),
        )
    assert str(caught.value).startswith(f"model.path={folder / model}: {text}")


def test_new_weights_follow_from_seed_and_name():
    whole = heads.initial_values("classifier.weight", (3, 8), 0.02, 1)
    assert torch.equal(whole, heads.initial_values("classifier.weight", (3, 8), 0.02, 1))
    assert not torch.equal(whole, heads.initial_values("classifier.weight", (3, 8), 0.02, 2))
    assert not torch.equal(whole, heads.initial_values("score.weight", (3, 8), 0.02, 1))
    assert 0.005 < whole.std() < 0.05
    assert (
        heads.initial_values("x.bias", (4,), 0.02, 1).tolist() == [0] * 4
        and heads.initial_values("n.weight", (4,), 1, 1).tolist() == [1] * 4
    )


@pytest.mark.parametrize("method", ["lora", "ia3", "partial"])
def test_head_is_trainable_with_every_method(folder, method):
    model, _ = load_task_model(task("sequence_classification", "a", "b"), section(folder / "bert"))
    values = {"last_layers": 1} if method == "partial" else {}
    tuning.apply_tuning(
        model, TuningSection(method=method, **values), 0, task("sequence_classification", "a", "b")
    )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trainable
    assert not [name for name in trainable if "embeddings" in name]
    assert not [
        name
        for name, _ in model.named_parameters()
        if name.startswith("classifier.") and "lora" in name
    ]


def test_causal_models_get_a_classification_head(tmp_path):
    import tiny

    tiny.make_model(tmp_path)
    model, new = load_task_model(task("sequence_classification", "a", "b"), section(tmp_path))
    assert new == {"score.weight"} and not heads.is_head("transformer.wte.weight", model)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "GPT2LMHeadModel"
    ]


def test_question_answering_replaces_a_head_for_other_labels(folder, tmp_path):
    model, _ = load_task_model(
        task("sequence_classification", "a", "b", "c"), section(folder / "bert")
    )
    model.save_pretrained(tmp_path)
    model, new = load_task_model(task("question_answering"), section(tmp_path))
    assert model.qa_outputs.out_features == 2 and new == {"qa_outputs.weight", "qa_outputs.bias"}


def test_new_masked_lm_head_is_trainable_with_adapters(folder, tmp_path):
    bare, _ = load_task_model(task("embedding"), section(folder / "bert"))
    bare.save_pretrained(tmp_path)
    model, new = load_task_model(task("masked_lm"), section(tmp_path))
    assert "cls.predictions.transform.dense.weight" in new
    tuning.apply_tuning(model, TuningSection(method="lora"), 0, task("masked_lm"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert new <= trainable


@pytest.mark.parametrize(
    ("kind", "places", "longest"),
    [
        ("roberta", 514, 512),
        ("xlm-roberta", 514, 512),
        ("mpnet", 514, 512),
        ("bert", 512, 512),
        ("llama", 128, 128),
    ],
)
def test_longest_input_excludes_padding_positions(kind, places, longest):
    """A model takes as many tokens as it has usable positions, and not one more."""
    from transformers import AutoConfig, AutoModel

    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 30,
    }
    config = AutoConfig.for_model(kind, **small, max_position_embeddings=places)
    assert heads.longest_input(config) == longest
    model = AutoModel.from_config(config)
    model(
        input_ids=torch.full((1, longest), 5),
        attention_mask=torch.ones(1, longest, dtype=torch.long),
    )
    if kind != "llama":  # places that are computed have no end
        with pytest.raises((IndexError, RuntimeError)):
            model(
                input_ids=torch.full((1, longest + 1), 5),
                attention_mask=torch.ones(1, longest + 1, dtype=torch.long),
            )


def test_a_class_that_transformers_does_not_have_is_named(monkeypatch):
    monkeypatch.setattr(Regression, "auto_class", "AutoModelForRanking")
    with pytest.raises(ModelError, match="transformers has no class AutoModelForRanking"):
        heads.auto_class(TaskSection(name="regression"))
