"""The summed loss is cross-entropy on full logits; packed samples stay separate."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel
from unit.small import (
    FAMILIES,
    VOCABULARY,
    batch,
    kernels,
    make_model,
    make_module,
    only_targets,
    split_into_samples,
)

from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX, empty_batch
from dist_ft.model.causal_lm import CausalLM, batch_to_inputs
from dist_ft.model.trainable_model import parameters_by_name, tied_weight_aliases

PACKED = batch((9, 13, 5), (11, 6), seed=3)


def loss(module: CausalLM, packed) -> torch.Tensor:
    return module(**batch_to_inputs(packed, "cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_cross_entropy_on_full_logits(family):
    module, alone = make_module(family).eval(), batch((14,), (9,), seed=1)
    with torch.no_grad():
        logits = module.model(input_ids=torch.from_numpy(alone.input_ids), use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY),
            torch.from_numpy(alone.target_ids).reshape(-1),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        actual = loss(module, alone)
    assert actual.dtype == torch.float32 and actual.shape == ()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    assert actual.item() > 20  # the loss of random logits


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("family", "attention"), [(family, kernel) for family in FAMILIES for kernel in kernels(family)]
)
def test_packed_losses_equal_separate_losses(family, attention, training):
    module = make_module(family, attention).train(training)
    alone = split_into_samples(PACKED)
    assert [sample.input_ids.shape[1] for sample in alone] == [9, 13, 5, 11, 6]
    for index, sample in enumerate(alone):
        with torch.no_grad():
            together, separate = loss(module, only_targets(PACKED, index)), loss(module, sample)
        assert separate.item() > 0
        assert together.item() == pytest.approx(separate.item(), rel=1e-5), f"sample {index}"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradients_equal_separate_gradients(family):
    together, separate = make_module(family), make_module(family)
    loss(together, PACKED).backward()
    for sample in split_into_samples(PACKED):
        loss(separate, sample).backward()
    for (name, one), other in zip(together.named_parameters(), separate.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5), name


def test_only_target_positions_reach_the_head():
    module, seen = make_module(), []
    module.model.lm_head.register_forward_hook(
        lambda _module, args, _out: seen.append(tuple(args[0].shape))
    )
    loss(module, PACKED)
    assert seen == [(1, PACKED.num_target_tokens, 32)]
    with torch.no_grad():
        module.model(input_ids=torch.zeros((1, 4), dtype=torch.long))  # generation sees all logits
    assert seen[1] == (1, 4, 32)


def test_empty_batch_has_zero_loss_and_gradients():
    module = make_module()
    value = loss(module, empty_batch())
    value.backward()
    assert value.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_failed_forward_leaves_no_positions_behind():
    module = make_module()
    with pytest.raises(IndexError):
        module(
            **{**batch_to_inputs(PACKED, "cpu"), "input_ids": torch.full((2, 27), VOCABULARY + 5)}
        )
    with torch.no_grad():
        assert module.model(input_ids=torch.zeros((1, 4), dtype=torch.long)).logits.shape == (
            1,
            4,
            VOCABULARY,
        )


def test_parameter_names_equal_transformers():
    module = make_module()
    assert set(parameters_by_name(module)) == {name for name, _ in module.model.named_parameters()}
    assert tied_weight_aliases(module) == {}


@pytest.mark.parametrize(
    ("family", "first"),
    [("gpt2", "transformer.wte.weight"), ("llama", "model.embed_tokens.weight")],
)
def test_tied_weights_appear_once(family, first):
    module = CausalLM(make_model(family, tie_word_embeddings=True))
    assert tied_weight_aliases(module) == {"lm_head.weight": first}
    assert first in parameters_by_name(module) and "lm_head.weight" not in parameters_by_name(
        module
    )
    values = list(parameters_by_name(module).values())
    assert len({id(value) for value in values}) == len(values)


def test_model_without_an_output_layer_is_refused():
    bare = AutoModel.from_config(make_model().config)
    with pytest.raises(
        ModelError,
        match=r"model of type llama: it has no output embeddings to compute logits with\. Only "
        r"causal language models are allowed\. Choose another model\.",
    ):
        CausalLM(bare)
