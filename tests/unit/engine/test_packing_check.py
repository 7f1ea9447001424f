"""A model whose packed samples attend to each other is rejected before step 1."""

from __future__ import annotations

import pytest
import torch
from unit.small import FAMILIES, VOCABULARY, kernels, make_engine, make_model

from dist_ft.core.errors import ModelError
from dist_ft.engine.packing_check import require_packing


def engine_of(model, half: bool):
    return make_engine(model=model.to(torch.bfloat16) if half else model)


TOLERANCE = {False: 1e-4, True: 5e-2}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "kernel"), [(family, kernel) for family in FAMILIES for kernel in kernels(family)]
)
def test_correct_models_pass(family, kernel, half):
    require_packing(engine_of(make_model(family, kernel), half), VOCABULARY, TOLERANCE[half])


def leak(model, **changes):
    """Make a real model mix packed samples: its forward is called with other arguments."""
    forward = model.forward
    model.forward = lambda **inputs: forward(
        **{k: v for k, v in {**inputs, **changes}.items() if v is not None}
    )
    return model


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_model_that_ignores_position_ids_is_rejected(family, half):
    model = leak(make_model(family, "eager"), position_ids=None)
    with pytest.raises(
        ModelError,
        match=r"^data\.pack=true: with this model and model\.attention, packed samples attend "
        r"to each other \(loss \d+\.\d{4} packed, \d+\.\d{4} alone; \d+\.\d{4} and \d+\.\d{4} "
        r"next to other samples\)\. Set data\.pack=false, or use another model\.attention\.$",
    ):
        require_packing(engine_of(model, half), VOCABULARY, TOLERANCE[half])


def test_relative_positions_keep_samples_apart_without_position_ids():
    """With rotary embeddings only distances within a sample matter."""
    require_packing(
        engine_of(leak(make_model("llama", "sdpa"), position_ids=None), False), VOCABULARY, 1e-4
    )
    with pytest.raises(ModelError, match="packed samples attend to each other"):
        require_packing(
            engine_of(leak(make_model("gpt2", "sdpa"), position_ids=None), False), VOCABULARY, 1e-4
        )


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_default_cache_is_rejected(half):
    """With a cache transformers does not look for packed samples, though positions restart."""
    with pytest.raises(ModelError, match="packed samples attend to each other"):
        require_packing(
            engine_of(leak(make_model("llama", "eager"), use_cache=True), half),
            VOCABULARY,
            TOLERANCE[half],
        )


def test_a_leak_too_small_for_the_sum_is_detected():
    """With small weights sums differ by less than bfloat16 allows; other neighbors show it."""
    model = leak(make_model("gpt2", "eager"), position_ids=None)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.mul_(0.6)
    with pytest.raises(ModelError) as caught:
        require_packing(engine_of(model, True), VOCABULARY, 5e-2)
    assert "packed samples attend to each other" in str(caught.value)


def test_a_loss_that_is_not_a_number_is_rejected():
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="loss nan packed, nan alone"):
        require_packing(make_engine(model=model), VOCABULARY, 1e-4)
