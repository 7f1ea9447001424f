"""The summed loss is cross-entropy on full logits, and packed samples do not see each other, family by family."""

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
def test_loss_is_cross_entropy_on_full_logits(family):
    module, alone = make_module(family).eval(), batch((14,), (9,), seed=1)
    with torch.no_grad():
        logits = module.model(input_ids=torch.from_numpy(alone.input_ids), use_cache=False).logits
        want = torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY),
            torch.from_numpy(alone.target_ids).reshape(-1),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        got = loss(module, alone)
    assert got.dtype == torch.float32 and got.shape == ()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert got.item() > 20  # not of a model that knows nothing


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("family", "attention"), [(family, kernel) for family in FAMILIES for kernel in kernels(family)]
)
def test_packed_samples_have_the_losses_they_have_alone(family, attention, training):
    module = make_module(family, attention).train(training)
    alone = split_into_samples(PACKED)
    assert [sample.input_ids.shape[1] for sample in alone] == [9, 13, 5, 11, 6]
    for index, sample in enumerate(alone):
        with torch.no_grad():
            together, apart = loss(module, only_targets(PACKED, index)), loss(module, sample)
        assert apart.item() > 0
        assert together.item() == pytest.approx(apart.item(), rel=1e-5), f"sample {index}"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradients_are_those_of_samples_alone(family):
    together, apart = make_module(family), make_module(family)
    loss(together, PACKED).backward()
    for sample in split_into_samples(PACKED):
        loss(apart, sample).backward()
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5), name


def test_only_positions_with_a_target_reach_the_head():
    module, seen = make_module(), []
    module.model.lm_head.register_forward_hook(
        lambda _module, args, _out: seen.append(tuple(args[0].shape))
    )
    loss(module, PACKED)
    assert seen == [(1, PACKED.num_target_tokens, 32)]
    with torch.no_grad():
        module.model(input_ids=torch.zeros((1, 4), dtype=torch.long))  # generation sees all logits
    assert seen[1] == (1, 4, 32)


def test_nothing_to_learn_is_zero_loss_and_zero_gradients():
    module = make_module()
    value = loss(module, empty_batch())
    value.backward()
    assert value.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_a_failed_forward_leaves_no_positions_behind():
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


def test_names_are_those_of_transformers():
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


def test_a_model_without_a_head_is_refused():
    bare = AutoModel.from_config(make_model().config)
    with pytest.raises(
        ModelError,
        match="model of type llama: it has no output embeddings to compute logits with. Only "
        "causal language models are allowed. Choose another model.",
    ):
        CausalLM(bare)
