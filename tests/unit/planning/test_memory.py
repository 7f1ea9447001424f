from dataclasses import replace

import pytest

from dist_ft.planning.memory import (
    DecoderShape,
    activation_bytes,
    describe_memory,
    model_state_bytes,
)

BILLION = 10**9


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_bfloat16_state_of_7_5_billion_on_64_matches_the_paper(stage, gigabytes):
    state = model_state_bytes(7_500_000_000, 64, stage, "bfloat16")
    assert sum(state.values()) / BILLION == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(("stage", "billions"), [(0, 2.0), (1, 7.6), (2, 14.4), (3, 128.0)])
def test_largest_models_on_64_gpus_of_32_gb_match_the_paper(stage, billions):
    """Its table 2."""
    state = model_state_bytes(int(billions * BILLION), 64, stage, "bfloat16")
    assert sum(state.values()) / BILLION == pytest.approx(32, rel=0.01)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, {"weights": 400, "gradients": 400, "optimizer": 800}),  # weights are their own masters
        (1, {"weights": 400, "gradients": 400, "optimizer": 600}),
        (2, {"weights": 400, "gradients": 200, "optimizer": 600}),
        (3, {"weights": 200, "gradients": 200, "optimizer": 600}),
    ],
)
def test_float32_state_on_two_workers(stage, expected):
    assert model_state_bytes(100, 2, stage, "float32") == expected


def test_optimizers_differ_in_their_moments():
    assert model_state_bytes(100, 1, 0, "float32", "sgd")["optimizer"] == 400
    assert model_state_bytes(100, 1, 0, "bfloat16", "adafactor")["optimizer"] == 400


def test_shares_are_rounded_up():
    assert model_state_bytes(101, 2, 3, "bfloat16") == {
        "weights": 102,
        "gradients": 102,
        "optimizer": 612,
    }


LLAMA_8B = DecoderShape(
    num_layers=32, hidden=4096, intermediate=14336, vocab=128256, kv_hidden=1024
)


def test_activations_of_an_8b_model():
    per_token = 32 * (6 * 4096 + 2 * 1024 + 4 * 14336) * 2 + 128256 * 10
    assert activation_bytes(LLAMA_8B, 1, 8192, checkpointing=False) == 8192 * per_token


def test_checkpointing_stores_inputs_and_one_layer():
    per_token = (32 * 4096 + 6 * 4096 + 2 * 1024 + 4 * 14336) * 2 + 128256 * 10
    assert activation_bytes(LLAMA_8B, 1, 8192, checkpointing=True) == 8192 * per_token


def test_activations_grow_with_micro_batch_and_dtype():
    one = activation_bytes(LLAMA_8B, 1, 8192, checkpointing=False)
    assert activation_bytes(LLAMA_8B, 3, 8192, checkpointing=False) == 3 * one
    headless = replace(LLAMA_8B, vocab=0)
    in_float32 = activation_bytes(headless, 1, 8192, checkpointing=True, dtype="float32")
    assert in_float32 == 2 * activation_bytes(headless, 1, 8192, checkpointing=True)


def test_description_is_one_line():
    state = model_state_bytes(2**30, 2, 3, "bfloat16")
    assert (
        describe_memory(state)
        == "8.00 GiB per worker = weights 1.00 + gradients 1.00 + optimizer 6.00"
    )
    assert describe_memory(state, 2**29) == (
        "8.50 GiB per worker = weights 1.00 + gradients 1.00 + optimizer 6.00 + activations about 0.50"
    )
