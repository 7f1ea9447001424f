"""Parameter groups by depth below the output, and their learning rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_ft.config.schema import OptimizerSection, TuningSection
from dist_ft.core.errors import ModelError
from dist_ft.engine import optimizers, schedule

NAMES = [
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.output.weight",
    "bert.encoder.layer.1.output.weight",
    "bert.encoder.layer.1.norm.bias",
    "bert.pooler.dense.weight",
    "classifier.weight",
]


def parameters() -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.ones(2, 2) if name.endswith("weight") else torch.ones(2))
        for name in NAMES
    }


def test_depths_count_from_the_output():
    assert list(optimizers.layer_depths(NAMES).values()) == [3, 2, 1, 1, 0, 0]
    assert optimizers.layer_depths(
        ["transformer.wte.weight", "transformer.h.0.w", "transformer.h.11.w", "transformer.ln_f.w"]
    ) == {
        "transformer.wte.weight": 13,
        "transformer.h.0.w": 12,
        "transformer.h.11.w": 1,
        "transformer.ln_f.w": 0,
    }
    both = optimizers.layer_depths(
        [
            "model.encoder.layers.0.w",
            "model.encoder.layers.5.w",
            "model.decoder.layers.1.w",
            "model.shared.weight",
        ]
    )
    assert list(both.values()) == [6, 1, 1, 7]


def test_without_depths_there_are_two_groups():
    groups = optimizers.param_groups(parameters(), 0.1)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.1, 5),
        (0.0, 1),
    ]


def test_exempt_weights_do_not_decay():
    first, *_ = names = list(parameters())
    held = parameters()
    groups = optimizers.param_groups(held, 0.1, exempt=[first])
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.1, 4),
        (0.0, 2),
    ]
    assert groups[1]["params"][0] is held[first] and len(names) == 6
    with pytest.raises(
        ModelError,
        match=r"optimizer.decay_exempt=nothing\.\*: matches no trainable weight\. ",
    ):
        optimizers.param_groups(held, 0.1, exempt=["nothing.*"])


def test_each_depth_has_its_own_learning_rate():
    section = OptimizerSection(name="sgd", learning_rate=1.0)
    held = parameters()
    optimizer = optimizers.build_optimizer(
        optimizers.param_groups(held, 0.0, group_by_depth=True), section
    )
    tuning = TuningSection(layer_decay=0.5, unfreeze_steps=10)
    for step, rates in (
        (0, [0, 0, 0, 0, 1, 1]),
        (10, [0, 0, 0.5, 0.5, 1, 1]),
        (30, [0.125, 0.25, 0.5, 0.5, 1, 1]),
    ):
        optimizers.set_learning_rate(optimizer, 1.0, schedule.depth_scale(tuning, step))
        before = [parameter.detach().clone() for parameter in held.values()]
        for parameter in held.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved = [
            (old - new).flatten()[0].item() for old, new in zip(before, held.values(), strict=True)
        ]
        assert moved == rates, step
    assert schedule.depth_scale(TuningSection(), 5) is None and not schedule.uses_depth_scale(
        TuningSection()
    )
