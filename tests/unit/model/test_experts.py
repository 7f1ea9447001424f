"""Experts of their own are found and all get gradients, in one order; layer drop is disabled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_ft.model.experts import (
    disable_layer_drop,
    expert_modules,
    give_all_experts_gradients,
)


class Experts(nn.ModuleDict):
    """A container that runs the experts of its tokens, as in Switch Transformers."""

    def __init__(self) -> None:
        super().__init__({f"expert_{i}": nn.Linear(4, 4) for i in range(3)})

    def forward(self, hidden: torch.Tensor, used: tuple[int, ...]) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for number in used:
            out = out + self[f"expert_{number}"](hidden)
        return out


class Block(nn.Module):
    """An owner of a plain list of experts, as in code that comes with models."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, hidden: torch.Tensor, used: tuple[int, ...]) -> torch.Tensor:
        return sum((self.experts[number](hidden) for number in used), torch.zeros_like(hidden))


class Model(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.mlp = layer()

    def forward(self, hidden: torch.Tensor, used: tuple[int, ...]) -> torch.Tensor:
        return self.mlp(self.embed(hidden), used)


@pytest.mark.parametrize("layer", [Experts, Block])
def test_layers_with_experts_are_found(layer):
    model = Model(layer)
    assert expert_modules(model) == [model.mlp]
    assert expert_modules(Model(nn.Identity)) == []


def test_a_single_expert_is_always_used():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

    assert expert_modules(One()) == []


@pytest.mark.parametrize("layer", [Experts, Block])
@pytest.mark.parametrize("used", [(0,), (2, 0), ()])
def test_all_experts_have_the_gradients_of_the_plain_model_or_zeros(layer, used):
    torch.manual_seed(0)
    model = Model(layer)
    hidden = torch.randn(5, 4)

    (model(hidden, used).square().sum() + model.embed(hidden).sum()).backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    give_all_experts_gradients(model)
    (model(hidden, used).square().sum() + model.embed(hidden).sum()).backward()
    experts = {name: p.grad for name, p in model.mlp.named_parameters()}
    assert len(experts) == 6
    for name, gradient in experts.items():
        expected = plain[f"mlp.{name}"]
        assert gradient is not None
        assert torch.equal(gradient, torch.zeros_like(gradient) if expected is None else expected)


def test_gradients_of_experts_come_in_one_order_whatever_is_used():
    def order(used: tuple[int, ...]) -> list[str]:
        torch.manual_seed(0)
        model = Model(Experts)
        give_all_experts_gradients(model)
        found: list[str] = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
        model(torch.randn(5, 4), used).sum().backward()
        return found

    orders = [order(used) for used in ((0, 1, 2), (2,), (1, 0))]
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == 8  # those of the experts and of the layer before


def test_frozen_experts_and_passes_without_gradient_are_left_alone():
    model = Model(Experts)
    give_all_experts_gradients(model)
    model.mlp.requires_grad_(False)
    model(torch.randn(5, 4), (0,)).sum().backward()
    assert all(p.grad is None for p in model.mlp.parameters())
    with torch.no_grad():
        assert model(torch.randn(5, 4), (1,)).shape == (5, 4)


def test_layer_drop_is_disabled_and_reported(caplog):
    caplog.set_level("INFO")
    model = Model(Experts)
    disable_layer_drop(model)
    assert not caplog.text

    model.layerdrop = 0.1
    model.embed.layer_drop = 0.3
    disable_layer_drop(model)
    assert model.layerdrop == 0 and model.embed.layer_drop == 0
    assert "layer drop (0.3) is disabled" in caplog.text
