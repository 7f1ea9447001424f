"""The chunked head loss equals torch's cross-entropy, alone and inside models."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.model.causal_lm import CausalLM
from dist_ft.model.losses import head_loss as module
from dist_ft.model.losses.head_loss import head_loss


def operands(
    dtype: torch.dtype = torch.float32, count: int = 13
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(count, 8, dtype=dtype, requires_grad=True)
    weight = (3 * torch.randn(29, 8)).to(dtype).requires_grad_()
    targets = torch.randint(0, 29, (count,))
    targets[count // 2] = IGNORE_INDEX
    return hidden, weight, targets


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    return cross_entropy(
        (hidden @ weight.t()).float(),
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=smoothing,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("rows", [1, 5, 13, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_equal_cross_entropy(monkeypatch, rows, dtype, tolerance, smoothing):
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * 4 * 29)
    results = []
    for way in (plain, head_loss):
        hidden, weight, targets = operands(dtype)
        loss = way(hidden, weight, targets, smoothing)
        (loss / 7).backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_target_of_vanishing_probability_has_a_finite_loss():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [500.0]])
    assert head_loss(hidden, weight, torch.tensor([0])).item() == 500.0


def test_ignored_targets_give_zero_loss_and_gradients():
    hidden, weight, _ = operands(count=2)
    loss = head_loss(hidden, weight, torch.full((2,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any() and not weight.grad.any()


def test_frozen_head_gets_no_gradient():
    hidden, weight, targets = operands()
    head_loss(hidden, weight.requires_grad_(False), targets).backward()
    assert weight.grad is None and hidden.grad.any()


def tiny(kind: str):
    from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "attn_implementation": "sdpa",
    }
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0))
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=kind == "tied"))


@pytest.mark.parametrize(("kind", "chunked"), [("llama", True), ("tied", True), ("granite", False)])
def test_models_that_change_their_logits_are_detected(kind, chunked):
    model = tiny(kind)
    ids = torch.arange(20).reshape(2, 10)
    targets = torch.arange(1, 21)
    logits = model(ids, use_cache=False).logits.reshape(-1, 32)
    expected = cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ours = CausalLM(model)
    actual = ours(ids, torch.arange(10).expand(2, 10), torch.arange(20), targets, ((10,), (10,)))
    actual.backward()
    assert ours._use_chunked_loss is chunked
    torch.testing.assert_close(actual, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model(ids, use_cache=False).logits.reshape(-1, 32), logits
    )  # others still get logits
