import pytest

from dist_ft.planning.memory import activation_bytes, model_state_bytes, summary

BILLION = 10**9


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_bfloat16_is_the_papers_table_for_7_5_billion_on_64(stage, gigabytes):
    state = model_state_bytes(7_500_000_000, 64, stage, "bfloat16")
    assert sum(state.values()) / BILLION == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(("stage", "billions"), [(0, 2.0), (1, 7.6), (2, 14.4), (3, 128.0)])
def test_the_largest_models_on_64_gpus_of_32_gigabytes_are_the_papers(stage, billions):
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
def test_float32_on_two_workers(stage, expected):
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


LLAMA_8B = {
    "num_layers": 32,
    "hidden": 4096,
    "intermediate": 14336,
    "vocab": 128256,
    "kv_hidden": 1024,
    "micro_batch": 1,
    "sequence_length": 8192,
}


def test_activations_of_an_8b_model():
    per_token = 32 * (6 * 4096 + 2 * 1024 + 4 * 14336) * 2 + 128256 * 10
    assert activation_bytes(**LLAMA_8B, checkpointing=False) == 8192 * per_token


def test_checkpointing_keeps_inputs_and_one_layer():
    per_token = (32 * 4096 + 6 * 4096 + 2 * 1024 + 4 * 14336) * 2 + 128256 * 10
    assert activation_bytes(**LLAMA_8B, checkpointing=True) == 8192 * per_token


def test_activations_grow_with_the_micro_batch_and_the_type():
    one = activation_bytes(**LLAMA_8B, checkpointing=False)
    assert activation_bytes(**{**LLAMA_8B, "micro_batch": 3}, checkpointing=False) == 3 * one
    assert activation_bytes(
        **{**LLAMA_8B, "vocab": 0}, checkpointing=True, dtype="float32"
    ) == 2 * activation_bytes(**{**LLAMA_8B, "vocab": 0}, checkpointing=True)


def test_summary_is_one_line():
    state = model_state_bytes(2**30, 2, 3, "bfloat16")
    assert summary(state) == "8.00 GiB a worker = weights 1.00 + gradients 1.00 + optimizer 6.00"
    assert summary(state, 2**29) == (
        "8.50 GiB a worker = weights 1.00 + gradients 1.00 + optimizer 6.00 + activations about 0.50"
    )
