"""Loss sums equal torch's losses and their written definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.model.losses import loss_sums

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 3, IGNORE_INDEX, 1, 2, 2, IGNORE_INDEX])
LABELED = TARGETS != IGNORE_INDEX


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_equals_torch_summed(smoothing):
    expected = functional.cross_entropy(
        LOGITS[LABELED], TARGETS[LABELED], reduction="sum", label_smoothing=smoothing
    )
    assert torch.allclose(loss_sums.cross_entropy(LOGITS, TARGETS, smoothing=smoothing), expected)


def test_class_weights_scale_samples():
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0])
    expected = functional.cross_entropy(
        LOGITS[LABELED], TARGETS[LABELED], weight=weights, reduction="sum"
    )
    assert torch.allclose(loss_sums.cross_entropy(LOGITS, TARGETS, weights), expected)


def test_focal_loss_equals_the_formula():
    shares = torch.softmax(LOGITS[LABELED], -1)[torch.arange(5), TARGETS[LABELED]]
    expected = (-((1 - shares) ** 2) * shares.log()).sum()
    assert torch.allclose(loss_sums.cross_entropy(LOGITS, TARGETS, gamma=2.0), expected)
    counted, bits = LABELED.float(), (torch.arange(28).reshape(7, 4) % 3 == 0).float()
    right = torch.where(bits > 0, LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    expected = ((-((1 - right) ** 2) * right.log()).mean(-1) * counted).sum()
    assert torch.allclose(
        loss_sums.binary_cross_entropy(LOGITS, bits, counted, 2.0), expected, atol=1e-5
    )
    plain = (
        functional.binary_cross_entropy_with_logits(
            LOGITS[LABELED], bits[LABELED], reduction="none"
        )
        .mean(-1)
        .sum()
    )
    assert torch.allclose(loss_sums.binary_cross_entropy(LOGITS, bits, counted), plain)


def test_squared_error_ignores_rows_of_weight_zero():
    assert (
        loss_sums.squared_error(
            torch.tensor([1.0, 5.0]), torch.tensor([3.0, 0.0]), torch.tensor([1, 0])
        ).item()
        == 4.0
    )


def test_contrastive_loss_is_lower_for_matching_pairs():
    first = torch.eye(4)
    near = loss_sums.contrastive(first, first, torch.ones(4), 0.1)
    far = loss_sums.contrastive(first, first.roll(1, 0), torch.ones(4), 0.1)
    assert near < 0.01 < far
    cosines = first @ first.T / 0.1
    expected = -(torch.log_softmax(cosines, 1).diagonal().sum())
    assert torch.allclose(near, expected)
    some = loss_sums.contrastive(first, first, torch.tensor([1, 1, 0, 0]), 0.1)
    assert torch.allclose(some * 2, near)


def test_contrastive_loss_does_not_depend_on_which_side_is_first():
    first, second = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([1, 1, 0, 1, 0])
    found = loss_sums.contrastive(first, second, counted, 0.1)
    assert torch.allclose(found, loss_sums.contrastive(second, first, counted, 0.1))

    cosines = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1) / 0.1
    forward = torch.log_softmax(cosines, 1).diagonal()
    backward = torch.log_softmax(cosines, 0).diagonal()
    assert torch.allclose(found, -((forward + backward) / 2 * counted).sum())
    assert not torch.allclose(forward, backward)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: loss_sums.cross_entropy(x, torch.full((7,), IGNORE_INDEX), torch.ones(4), 2.0),
        lambda x: loss_sums.binary_cross_entropy(x, torch.zeros(7, 4), torch.zeros(7)),
        lambda x: loss_sums.squared_error(x[:, 0], torch.zeros(7), torch.zeros(7)),
        lambda x: loss_sums.contrastive(x, x, torch.zeros(7), 0.1),
    ],
)
def test_gradient_exists_and_is_zero_without_labels(loss):
    logits = LOGITS.clone().requires_grad_()
    found = loss(logits)
    found.backward()
    assert found.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
