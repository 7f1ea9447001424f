"""The plain engine, the reference of the others, equals a handwritten loop."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from unit.small import FAMILIES, batch, make_engine, make_model, make_module, train

from dist_ft.config.schema import OptimizerSection
from dist_ft.data.batch import Batch, empty_batch
from dist_ft.engine.base import pad_to_equal_lanes
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.model.causal_lm import CausalLM, batch_to_inputs

OPTIMIZERS = [
    {"name": "adamw", "weight_decay": 0.1},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "adafactor", "weight_decay": 0.1},
]
LANES = [
    batch((7, 5), seed=1, lane=0),
    batch((9,), seed=2, lane=1),
    batch((4, 3), (8,), seed=3, lane=2),
]


def targets(batches) -> int:
    return sum(b.num_target_tokens for b in batches)


def split(lane: Batch) -> list[Batch]:
    """Return each row of a batch as a batch of its own."""
    return [
        replace(
            lane,
            input_ids=lane.input_ids[i : i + 1],
            target_ids=lane.target_ids[i : i + 1],
            position_ids=lane.position_ids[i : i + 1],
        )
        for i in range(len(lane.input_ids))
    ]


def gradients(batches) -> dict[str, torch.Tensor]:
    """Return the gradient of one step: with SGD at rate 1, the change of the parameters."""
    engine = make_engine(name="sgd", max_grad_norm=0)
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.train_step(batches, [0] * len(batches), targets(batches), 1.0)
    return {n: before[n] - p.detach() for n, p in engine.module.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6), name
    assert any(value.abs().max() > 1e-3 for value in one.values())


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
@pytest.mark.parametrize(
    "fields", OPTIMIZERS, ids=lambda fields: "-".join(map(str, fields.values()))
)
def test_a_step_equals_that_of_a_handwritten_loop(fields, limit):
    engine, model = make_engine(max_grad_norm=limit, **fields), make_model()
    module = CausalLM(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": fields.get("weight_decay", 0.0)},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8),
        "sgd": lambda: torch.optim.SGD(groups, momentum=fields.get("momentum", 0.0)),
        "adafactor": lambda: torch.optim.Adafactor(groups),
    }[fields["name"]]()
    for rate in (1e-2, 5e-3, 2e-3):
        outcome = engine.train_step(LANES, [0, 1, 2], targets(LANES), rate)
        total = torch.zeros(())
        for lane in LANES:
            total = total + module(**batch_to_inputs(lane, "cpu"))
        optimizer.zero_grad()
        (total / targets(LANES)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert outcome.loss_sum == pytest.approx(total.item(), rel=1e-5)
        assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for (name, mine), other in zip(
        engine.module.model.named_parameters(), model.parameters(), strict=True
    ):
        assert torch.allclose(mine, other, rtol=1e-3, atol=2e-5), name


def test_the_gradient_does_not_depend_on_how_the_batch_is_split():
    rows = [row for lane in LANES for row in split(lane)]
    assert len(rows) == 4
    whole = gradients(LANES)
    assert_same(whole, gradients(rows))
    assert_same(whole, gradients(list(reversed(rows))))


def test_empty_batches_do_not_change_the_gradient():
    evened, seeds = pad_to_equal_lanes(LANES, [5, 6, 7], 5)
    assert [b.lane for b in evened] == [0, 1, 2, -1, -1] and seeds == [5, 6, 7, 0, 0]
    assert targets(evened) == targets(LANES) and evened[3].num_tokens == 0
    plain, padded = gradients(LANES), gradients(evened)
    assert all(torch.equal(plain[name], padded[name]) for name in plain)
    assert pad_to_equal_lanes(LANES, [5, 6, 7], 3) == (LANES, [5, 6, 7])


def test_a_step_without_targets_changes_no_weights():
    engine = make_engine(name="sgd")
    before = [p.detach().clone() for p in engine.module.parameters()]
    outcome = engine.train_step([empty_batch()], [0], 1, 1.0)
    assert (outcome.loss_sum, outcome.grad_norm) == (0.0, 0.0)
    assert all(
        torch.equal(p, old) for p, old in zip(engine.module.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_no_weights(value):
    """The loss may be finite where its gradient is not."""
    engine = make_engine(name="adamw")
    before = [p.detach().clone() for p in engine.module.parameters()]
    engine.accumulate(LANES, [0, 1, 2], targets(LANES))
    next(engine.module.parameters()).grad.view(-1)[0] = value
    norm = engine.update(1e-2)
    assert not math.isfinite(norm)
    assert all(
        torch.equal(p, old) for p, old in zip(engine.module.parameters(), before, strict=True)
    )


def test_dropout_follows_the_seed_of_the_lane():
    def losses(seeds):
        engine = TorchEngine(
            make_module("gpt2", dropout=0.3), OptimizerSection(), torch.device("cpu")
        )
        return engine.train_step(LANES, seeds, targets(LANES), 0.0).loss_sum

    assert losses([1, 2, 3]) == losses([1, 2, 3]) != losses([1, 2, 4])
    one = TorchEngine(make_module("gpt2", dropout=0.3), OptimizerSection(), torch.device("cpu"))
    apart = sum(
        one.train_step([lane], [seed], targets(LANES), 1e-30).loss_sum
        for lane, seed in zip(LANES, [1, 2, 3], strict=True)
    )
    assert losses([1, 2, 3]) == pytest.approx(
        apart, rel=1e-6
    )  # independent of what ran before in the process


def test_evaluation_has_no_dropout_and_leaves_no_gradients():
    engine = TorchEngine(make_module("gpt2", dropout=0.5), OptimizerSection(), torch.device("cpu"))
    expected = make_module("gpt2").eval()(**batch_to_inputs(LANES[0], "cpu")).item()
    assert (
        engine.loss_sum(LANES[0]) == engine.loss_sum(LANES[0]) == pytest.approx(expected, rel=1e-6)
    )
    assert engine.module.training and all(p.grad is None for p in engine.module.parameters())


# bfloat16


def bf16_engine(**fields) -> TorchEngine:
    return make_engine(model=make_model().to(torch.bfloat16), **{"learning_rate": 1e-3, **fields})


def test_masters_retain_updates_that_bfloat16_rounds_away():
    engine = bf16_engine(name="sgd", max_grad_norm=0)
    masters = {part.name: part.read() for part in engine.state_slices() if part.key == "param"}
    assert all(value.dtype == torch.float32 for value in masters.values())
    before = {name: value.clone() for name, value in masters.items()}
    engine.train_step(LANES, [0, 1, 2], targets(LANES), 1e-6)
    weights = dict(engine.module.model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(masters[name], before[name])
    assert torch.equal(
        weights[name].reshape(-1), before[name].to(torch.bfloat16)
    )  # the update is too small for bfloat16
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in weights.values())


def test_gradients_of_lanes_are_summed_in_float32():
    """Over 300 lanes of equal gradients g, a bfloat16 sum stops growing; float32 gives 300 g."""
    one, many = bf16_engine(name="sgd", max_grad_norm=0), bf16_engine(name="sgd", max_grad_norm=0)
    lane = batch((6,), seed=4)
    single = one.train_step([lane], [0], 100, 0.0).grad_norm
    assert many.train_step([lane] * 300, [0] * 300, 100, 0.0).grad_norm == pytest.approx(
        300 * single, rel=1e-5
    )


# State


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields", OPTIMIZERS, ids=lambda fields: "-".join(map(str, fields.values()))
)
def test_state_slices_contain_the_whole_state(fields, half):
    """Save, perturb, load: the next losses are the same to the last bit."""

    def make(**changes):
        model = make_model("gpt2", dropout=0.1, **changes)
        return make_engine(model=model.to(torch.bfloat16) if half else model, **fields)

    engine, other = make(), make(initializer_range=0.5)
    train(engine, range(3))
    saved = {(s.name, s.key): s.read().clone() for s in engine.state_slices()}
    step, expected = engine.optimizer_step(), train(engine, range(3, 6))
    assert step == (0 if fields["name"] == "sgd" else 3)
    train(other, range(1))
    for target in (engine, other, make()):
        slices = list(target.state_slices())
        assert {(s.name, s.key) for s in slices} == set(saved)
        for part in slices:
            assert part.offset == 0 and part.numel == len(saved[part.name, part.key]) and part.owned
            part.write(saved[part.name, part.key])
        target.finish_load(step)
        assert target.optimizer_step() == step
        assert train(target, range(3, 6)) == expected


@pytest.mark.parametrize(
    "fields", OPTIMIZERS, ids=lambda fields: "-".join(map(str, fields.values()))
)
def test_state_exists_from_the_start_and_equals_torch(fields):
    """The state the engine creates equals the state torch creates at the first step."""
    engine, model = make_engine(**fields), make_model()
    keys = {
        "adamw": {"exp_avg", "exp_avg_sq"},
        "sgd": {"momentum_buffer"} if fields.get("momentum") else set(),
        "adafactor": {"row_var", "col_var", "variance"},
    }[fields["name"]]
    assert {part.key for part in engine.state_slices()} == keys | {"param"}
    assert all(
        torch.equal(a, b)
        for a, b in zip(engine.module.model.parameters(), model.parameters(), strict=True)
    )
    assert {group["weight_decay"] for group in engine.optimizer.param_groups} == {
        fields.get("weight_decay", 0.0),
        0.0,
    }
    assert engine.optimizer_step() == 0


def test_frozen_parameters_and_buffers_are_state_too():
    model = make_model("gpt2")
    for parameter in model.transformer.h[0].parameters():
        parameter.requires_grad_(False)
    model.register_buffer("counts", torch.tensor([1, 2, 3], dtype=torch.int8))
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    engine = make_engine(model=model)
    by_key: dict[str, set[str]] = {}
    for part in engine.state_slices():
        by_key.setdefault(part.key, set()).add(part.name)
    assert by_key["frozen"] == {
        f"transformer.h.0.{n}" for n, _ in model.transformer.h[0].named_parameters()
    }
    assert by_key["buffer"] == {"counts"}
    assert (
        by_key["param"]
        == by_key["exp_avg"]
        == {n for n, p in model.named_parameters() if p.requires_grad}
    )
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    train(engine, range(1))
    assert torch.equal(before, model.transformer.h[0].mlp.c_fc.weight)
    counts = next(part for part in engine.state_slices() if part.key == "buffer")
    counts.write(torch.tensor([7, 8, 9], dtype=torch.int8))
    assert model.counts.tolist() == [7, 8, 9]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_overfits_one_batch(family):
    """Every family overfits one batch."""
    engine = make_engine(family, max_grad_norm=1.0)
    losses = [engine.train_step(LANES, [0, 1, 2], targets(LANES), 1e-2).loss_sum for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0] and np.isfinite(losses).all()
