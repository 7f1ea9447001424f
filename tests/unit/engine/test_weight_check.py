"""Weights in memory equal those in the files, or the run stops before step 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from unit.small import make_engine, make_model

from dist_ft.core.errors import ModelError
from dist_ft.engine.base import StateSlice
from dist_ft.engine.weight_check import verify_weights
from dist_ft.pretrained.weight_files import files_by_tensor


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path)
    return str(tmp_path)


def split_into_slices(size: int, engine=None) -> list[StateSlice]:
    """Return the parameters as ZeRO shards them: flat slices of at most `size` elements."""

    def cut_slice(part: StateSlice, start: int) -> StateSlice:
        numel = min(size, part.numel - start)
        return replace(
            part, offset=start, numel=numel, read=lambda: part.read()[start : start + numel]
        )

    whole = [part for part in (engine or make_engine()).state_slices() if part.key == "param"]
    return [cut_slice(part, start) for part in whole for start in range(0, part.numel, size)]


def test_all_weights_are_compared(folder):
    names = dict(make_model().named_parameters())
    assert verify_weights(make_engine().state_slices(), folder, torch.float32) == len(names)


@pytest.mark.parametrize("size", [3, 33, 700])
def test_slices_of_any_size_and_offset_are_compared(folder, size):
    assert verify_weights(split_into_slices(size), folder, torch.float32) == len(
        split_into_slices(size)
    )


@pytest.mark.parametrize("size", [33, 10**6])
@pytest.mark.parametrize("name", [name for name, _ in make_model().named_parameters()])
def test_one_weight_that_was_initialized_again_is_detected(folder, name, size):
    engine = make_engine()
    with torch.no_grad():
        weight = dict(engine.module.model.named_parameters())[name]
        torch.nn.init.normal_(weight, std=0.02) if weight.ndim > 1 else weight[1:].fill_(
            1.0
        )  # the first element may be equal
    with pytest.raises(ModelError) as caught:
        verify_weights(split_into_slices(size, engine), folder, torch.float32)
    assert str(caught.value) == (
        f"{name}: the weights in memory (elements from 0) differ from those in "
        f"{folder}/model.safetensors. They were initialized again or misplaced while loading. The "
        "run stops before step 1. Report this model as a bug."
    )


@pytest.mark.parametrize("shift", [1, 32, 33])
def test_a_shifted_offset_is_detected(folder, shift):
    slices = split_into_slices(200)
    index = next(
        i
        for i, part in enumerate(slices)
        if part.name.endswith("up_proj.weight") and part.offset == 200
    )
    slices[index] = replace(slices[index], offset=200 + shift)
    with pytest.raises(
        ModelError,
        match=rf"up_proj\.weight: the weights in memory \(elements from {200 + shift}\) differ",
    ):
        verify_weights(slices, folder, torch.float32)


def test_bfloat16_models_with_some_float32_weights(folder):
    model = make_model().to(torch.bfloat16)
    engine = make_engine(model=model)
    assert verify_weights(engine.state_slices(), folder, torch.bfloat16)
    model.model.norm.weight.data = (
        make_model().model.norm.weight.data
    )  # transformers leaves some weights in float32
    assert verify_weights(make_engine(model=model).state_slices(), folder, torch.bfloat16)
    with pytest.raises(ModelError):
        verify_weights(make_engine().state_slices(), str(folder_of_ones(folder)), torch.bfloat16)


def folder_of_ones(folder: str):
    tensors = load_file(f"{folder}/model.safetensors")
    save_file(
        {name: torch.ones_like(value) for name, value in tensors.items()},
        f"{folder}/model.safetensors",
    )
    return folder


def test_sharded_files_and_names_that_are_not_in_the_files(folder, tmp_path):
    make_model().save_pretrained(tmp_path / "many", max_shard_size="20KB")
    files = files_by_tensor(tmp_path / "many", "model")
    assert len(set(files.values())) > 2 and set(files) == set(files_by_tensor(folder, "model"))
    assert verify_weights(
        make_engine().state_slices(), str(tmp_path / "many"), torch.float32
    ) == len(files)
    renamed = [replace(part, name="other." + part.name) for part in make_engine().state_slices()]
    assert verify_weights(renamed, folder, torch.float32) == 0


def test_files_without_the_head_or_with_it(folder):
    """Files of a base model fit a model with a head, and vice versa."""
    names = dict(make_model().named_parameters())
    body = {
        name.removeprefix("model."): parameter.detach().clone() for name, parameter in names.items()
    }
    save_file(body, f"{folder}/model.safetensors")
    assert verify_weights(make_engine().state_slices(), folder, torch.float32) < len(names)
    assert verify_weights(
        make_engine().state_slices(), folder, torch.float32, prefix="model."
    ) == len(names)
    save_file({f"model.{name}": one for name, one in body.items()}, f"{folder}/model.safetensors")
    bare = [
        replace(part, name=part.name.removeprefix("model."))
        for part in make_engine().state_slices()
    ]
    assert verify_weights(bare, folder, torch.float32, prefix="model.") == len(names)
    save_file({name: one + 1 for name, one in body.items()}, f"{folder}/model.safetensors")
    with pytest.raises(ModelError, match="the weights in memory"):
        verify_weights(make_engine().state_slices(), folder, torch.float32, prefix="model.")


def test_scalars_are_compared(folder):
    save_file({"scale": torch.tensor(2.0)}, f"{folder}/model.safetensors")
    for value, equal in ((2.0, True), (3.0, False)):
        part = StateSlice(
            "scale",
            "param",
            0,
            1,
            True,
            lambda value=value: torch.tensor([value]),
            lambda values: None,
        )
        if equal:
            assert verify_weights([part], folder, torch.float32) == 1
        else:
            with pytest.raises(ModelError, match="scale: the weights in memory"):
                verify_weights([part], folder, torch.float32)
