"""Growing a head: existing rows stay, new ones are added."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_tasks
import torch
from safetensors.torch import load_file

from dist_ft.config.schema import ModelSection
from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import ModelError
from dist_ft.model.loading.grow_head import grow_head, grown_labels, own_labels
from dist_ft.model.loading.load import load_task_model, model_from_config, read_config

OLD, NEW = ("drink", "food"), ("drink", "food", "animal", "place")


def task(labels, name="sequence_classification", **more) -> TaskSection:
    return TaskSection(name=name, labels=labels, **more)


@pytest.fixture(scope="module", params=["sequence_classification", "token_classification"])
def headed(request, tmp_path_factory) -> tuple[Path, str]:
    """A trained head's folder, and its task."""
    folder = tmp_path_factory.mktemp("models")
    base, kind = tiny_tasks.make_encoder(folder / "bert"), task(OLD, request.param)
    torch.manual_seed(1)
    config = read_config(ModelSection(path=str(base)), None, kind)
    model = model_from_config(config, kind, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "headed")
    tiny_tasks.make_tokenizer().save_pretrained(folder / "headed")
    return folder / "headed", request.param


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_rows_stay_and_new_ones_follow_from_seed_and_label(headed, tmp_path):
    folder, name = headed
    grown = grow_head(str(folder), task(NEW, name), 7, tmp_path)
    before, after = weights(folder), weights(grown)
    for key, value in before.items():
        if key.startswith("classifier."):
            assert after[key].shape[0] == 4
            assert torch.equal(after[key][:2], value), key
        else:
            assert torch.equal(after[key], value), key
    rows = after["classifier.weight"]
    assert torch.equal(after["classifier.bias"][2:], torch.zeros(2))
    other = weights(grow_head(str(folder), task(("drink", "food", "place"), name), 7, tmp_path))[
        "classifier.weight"
    ]
    assert torch.equal(other[2], rows[3]), "a row follows from its label, not from its place"
    assert not torch.equal(rows[2], rows[3])
    reseeded = weights(grow_head(str(folder), task(NEW, name), 8, tmp_path))["classifier.weight"]
    assert not torch.equal(reseeded[2], rows[2])


def test_grown_head_loads_without_new_weights(headed, tmp_path):
    folder, name = headed
    grown = grow_head(str(folder), task(NEW, name), 7, tmp_path)
    model, new = load_task_model(task(NEW, name), ModelSection(path=grown, dtype="float32"))
    assert not new
    assert list(model.config.id2label.values()) == list(NEW)
    assert own_labels(grown, task(NEW, name)) == NEW


def test_fitting_head_and_missing_head_stay_unchanged(headed, tmp_path):
    folder, name = headed
    assert grow_head(str(folder), task(OLD, name), 7, tmp_path) == str(folder)
    bare = str(folder.parent / "bert")
    assert grow_head(bare, task(NEW, name), 7, tmp_path) == bare


def test_lost_labels_are_refused_and_new_ones_are_appended():
    assert grown_labels(("b", "a"), ("c", "a"), named=False) == ("b", "a", "c")
    assert grown_labels((), ("c", "a"), named=True) == ("c", "a")
    with pytest.raises(ModelError, match=r"^task.labels: b is missing"):
        grown_labels(("b", "a"), ("c", "a"), named=True)
