"""Adversarial perturbations equal a hand-written loop, and add to the gradient."""

from __future__ import annotations

import pytest
import torch
from unit.small import batch, make_module

from dist_ft.config.schema import OptimizerSection
from dist_ft.config.sections.tuning import AdversarialSection
from dist_ft.data.batch import empty_batch
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.model.adversarial import Adversary, clip_to_epsilon, step_along_gradient
from dist_ft.model.causal_lm import batch_to_inputs

FGM = {"method": "fgm", "epsilon": 0.7}
PGD = {"method": "pgd", "epsilon": 0.5, "steps": 3, "step_size": 0.3, "weight": 0.5}


def gradients(fields, lanes, seeds, dropout=0.0, **changes):
    """Return the gradient of each weight after `lanes`, as an engine gathers it."""
    module = make_module(dropout=dropout, **changes)
    adversary = Adversary(AdversarialSection(**fields), module) if fields else None
    engine = TorchEngine(
        module, OptimizerSection(name="sgd"), torch.device("cpu"), adversary=adversary
    )
    loss = engine.accumulate(lanes, seeds, max(1, sum(lane.num_target_tokens for lane in lanes)))
    return loss, {name: p.grad for name, p in module.named_parameters()}


def by_hand(fields, lane, seed, dropout=0.0):
    """The same for one lane of one row, moving the embeddings by a loop over its samples."""
    module = make_module(dropout=dropout).train()
    inputs, embedding = batch_to_inputs(lane, "cpu"), module.model.get_input_embeddings()
    steps, size = (
        (1, fields["epsilon"])
        if fields["method"] == "fgm"
        else (fields["steps"], fields["step_size"])
    )
    sizes, num = inputs["lengths"][0], lane.num_target_tokens

    def loss_at(move):
        handle = embedding.register_forward_hook(lambda _layer, _args, output: output + move)
        torch.manual_seed(seed)
        loss = module(**inputs) / num
        handle.remove()
        return loss

    move = torch.zeros(1, sum(sizes), 32, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss_at(move), [move])
        parts = []
        for own, slope in zip(move.split(sizes, 1), gradient.split(sizes, 1), strict=True):
            part = own + size * slope / slope.norm() if slope.norm() else own
            parts.append(
                part * min(1.0, fields["epsilon"] / part.norm().item()) if part.norm() else part
            )
        move = torch.cat(parts, 1).detach().requires_grad_()
    (
        loss_at(torch.zeros_like(move)) + fields.get("weight", 1.0) * loss_at(move.detach())
    ).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same(one, other):
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("fields", [FGM, PGD], ids=["fgm", "pgd"])
def test_gradient_equals_a_hand_written_loop(fields, dropout):
    lane = batch((9, 4, 6), seed=1)
    _, found = gradients(fields, [lane], [5], dropout)
    assert_same(found, by_hand(fields, lane, 5, dropout))
    _, plain = gradients({}, [lane], [5], dropout)
    assert any((found[name] - 2 * plain[name]).abs().max() > 1e-3 for name in found), (
        "the embeddings moved"
    )


@pytest.mark.parametrize("fields", [FGM, PGD], ids=["fgm", "pgd"])
def test_gradient_does_not_depend_on_packing_and_lanes(fields):
    together, separate = [batch((9, 4), (6,), seed=1)], [batch((9, 4), (6,), seed=1)]
    one = separate[0]
    from dataclasses import replace

    separate = [
        replace(
            one,
            input_ids=one.input_ids[i : i + 1],
            target_ids=one.target_ids[i : i + 1],
            position_ids=one.position_ids[i : i + 1],
        )
        for i in range(2)
    ]
    (loss, found), (other, split) = (
        gradients(fields, together, [0]),
        gradients(fields, separate, [0, 0]),
    )
    assert loss == pytest.approx(other, rel=1e-6)
    assert_same(found, split)


def test_returned_loss_is_that_of_the_unperturbed_batch():
    lanes = [batch((9, 4), seed=1)]
    assert gradients(PGD, lanes, [0])[0] == gradients({}, lanes, [0])[0]


@pytest.mark.parametrize("fields", [FGM, PGD], ids=["fgm", "pgd"])
def test_lane_without_targets_does_not_change_the_gradient(fields):
    _, alone = gradients(fields, [batch((9, 4), seed=1)], [0])
    _, with_empty = gradients(fields, [batch((9, 4), seed=1), empty_batch()], [0, 0])
    assert_same(alone, with_empty)


def test_frozen_embeddings_are_perturbed_too():
    def of(fields):
        module = make_module()
        module.model.get_input_embeddings().weight.requires_grad_(False)
        engine = TorchEngine(
            module,
            OptimizerSection(name="sgd"),
            torch.device("cpu"),
            adversary=(Adversary(AdversarialSection(**fields), module) if fields else None),
        )
        engine.accumulate([batch((9, 4), seed=1)], [0], 10)
        return module.model.lm_head.weight.grad

    assert (of(FGM) - 2 * of({})).abs().max() > 1e-3


def test_evaluation_is_not_perturbed():
    module = make_module()
    engine = TorchEngine(
        module,
        OptimizerSection(),
        torch.device("cpu"),
        adversary=Adversary(AdversarialSection(**PGD), module),
    )
    rows = batch((7, 5))
    assert engine.loss_sum(rows) == TorchEngine(
        make_module(), OptimizerSection(), torch.device("cpu")
    ).loss_sum(rows)


def test_steps_have_their_norm_and_stay_in_the_ball():
    torch.manual_seed(0)
    gradient, sizes = torch.randn(2, 6, 3), torch.tensor([4, 2, 6])
    gradient[0, 4:] = 0
    step = step_along_gradient(gradient, sizes, 0.3)
    lengths = [part.norm().item() for part in step.reshape(12, 3).split([4, 2, 6])]
    assert lengths == pytest.approx([0.3, 0.0, 0.3], rel=1e-6)
    held = clip_to_epsilon(torch.cat([step[:1] * 5, step[1:]]), sizes, 0.5)
    assert [part.norm().item() for part in held.reshape(12, 3).split([4, 2, 6])] == pytest.approx(
        [0.5, 0.0, 0.3], rel=1e-6
    )
