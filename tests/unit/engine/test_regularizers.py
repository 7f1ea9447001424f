"""Pull, Fisher information and average follow the papers, and are part of the saved state."""

from __future__ import annotations

import pytest
import torch
from unit.small import batch, make_module, train

from dist_ft.config.schema import OptimizerSection
from dist_ft.config.sections.tuning import TuningSection
from dist_ft.engine import regularizers
from dist_ft.engine.regularizers import Regularizers
from dist_ft.engine.torch_engine import TorchEngine

L2 = {"anchor": {"method": "l2", "strength": 40.0}}
EWC = {"anchor": {"method": "ewc", "strength": 3000.0, "data": "d"}}
EMA = {"ema_decay": 0.9}
RATE = 1e-2
LANE = batch((7, 5), (9,), seed=1)


def make(section, name="sgd", new=frozenset(), **fields):
    """Return an engine at its initial weights."""
    engine = TorchEngine(
        make_module(),
        OptimizerSection(name=name, **fields),
        torch.device("cpu"),
        regularizers=Regularizers.from_config(TuningSection(**section)),
    )
    regularizers.initialize_state(engine.state_slices, new)
    return engine


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.module.model.named_parameters()}


def state(engine, key):
    return {part.name: part.read().clone() for part in engine.state_slices() if part.key == key}


def step(engine, rate=RATE):
    engine.train_step([LANE], [0], LANE.num_target_tokens, rate)


def test_l2_sp_is_the_proximal_step_of_its_penalty():
    pulled, free = make(L2), make({})
    first = weights(free)
    step(pulled)
    step(free)
    for name, value in weights(pulled).items():
        moved, c = weights(free)[name], RATE * 40.0
        assert torch.allclose(value, (moved + c * first[name]) / (1 + c), rtol=1e-5, atol=1e-7), (
            name
        )
        # minimum of |w - moved|^2 / (2 rate) + strength / 2 * |w - first|^2: the derivative is zero
        slope = (value - moved) / RATE + 40.0 * (value - first[name])
        assert slope.abs().max() < 1e-3
    assert any((weights(free)[name] - first[name]).abs().max() > 1e-4 for name in first)


def test_no_strength_is_too_large():
    engine = make({"anchor": {"method": "l2", "strength": 1e9}})
    first = weights(engine)
    for _ in range(3):
        step(engine)
    assert all(
        torch.allclose(value, first[name], atol=1e-6) for name, value in weights(engine).items()
    )


def test_new_weights_are_not_pulled():
    engine, free = make(L2, new={"lm_head.weight"}), make({})
    step(engine)
    step(free)
    assert torch.equal(weights(engine)["lm_head.weight"], weights(free)["lm_head.weight"])
    assert not torch.equal(weights(engine)["model.norm.weight"], weights(free)["model.norm.weight"])
    assert state(engine, "anchor")["lm_head.weight"].isnan().all()


def test_fisher_information_is_the_mean_squared_gradient_per_target():
    engine, module = make(EWC, max_grad_norm=1e-3), make_module()
    lanes = [batch((7,), seed=1), batch((9,), seed=2)]
    expected = {}
    for lane in lanes:
        module.zero_grad()
        module(**module.prepare_inputs(lane, "cpu")).backward()
        for name, p in module.model.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad.square().flatten() / sum(
                one.num_target_tokens for one in lanes
            )
        engine.accumulate_fisher(lane)
    engine.scale_fisher(1 / sum(lane.num_target_tokens for lane in lanes))
    found = state(engine, "fisher")
    assert found.keys() == expected.keys()
    assert all(
        torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-9) for name in expected
    )
    assert all(p.grad is None for p in engine.module.parameters()), "no gradient is left"


def test_ewc_pulls_each_weight_by_its_fisher_information():
    engine, free = make(EWC), make({})
    first = weights(engine)
    engine.accumulate_fisher(LANE)
    fisher = state(engine, "fisher")
    step(engine)
    step(free)
    for name, value in weights(engine).items():
        moved, c = weights(free)[name], RATE * 3000.0 * fisher[name].view_as(value)
        assert torch.allclose(value, (moved + c * first[name]) / (1 + c), rtol=1e-4, atol=1e-7), (
            name
        )
    away = [
        ((weights(engine)[n] - first[n]).norm() / (weights(free)[n] - first[n]).norm()).item()
        for n in first
    ]
    assert min(away) < 0.5


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor"])
def test_the_average_is_exponential_and_swaps_exactly(name):
    engine = make(EMA, name)
    expected = weights(engine)
    for _ in range(4):
        step(engine)
        expected = {
            key: 0.9 * value + 0.1 * weights(engine)[key] for key, value in expected.items()
        }
    trained, average = weights(engine), state(engine, "ema")
    assert all(
        torch.allclose(average[key], value.flatten(), rtol=1e-5, atol=1e-6)
        for key, value in expected.items()
    )
    engine.swap_average()
    assert all(torch.equal(value.flatten(), average[key]) for key, value in weights(engine).items())
    engine.swap_average()
    assert all(torch.equal(value, trained[key]) for key, value in weights(engine).items())


def test_a_skipped_update_skips_the_regularizers():
    engine = make({**L2, **EMA})
    step(engine)
    before = weights(engine), state(engine, "ema")
    engine.accumulate([LANE], [0], LANE.num_target_tokens)
    engine.update(RATE, grad_norm_limit=-1.0)
    assert all(torch.equal(value, before[0][key]) for key, value in weights(engine).items())
    assert all(torch.equal(value, before[1][key]) for key, value in state(engine, "ema").items())


def test_a_resumed_run_is_pulled_to_its_initial_weights():
    one = make({**EWC, **EMA}, "adamw")
    one.accumulate_fisher(LANE)
    train(one, range(2))
    saved = {(part.name, part.key): part.read().clone() for part in one.state_slices()}
    other = make({**EWC, **EMA}, "adamw")
    for part in other.state_slices():
        part.write(saved[part.name, part.key])
    other.finish_load(2)
    assert train(other, range(2, 5)) == train(one, range(2, 5))
    assert {key for _, key in saved} >= {"anchor", "fisher", "ema"}
